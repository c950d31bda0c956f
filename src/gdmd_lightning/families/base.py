"""The contract of a model family: everything about a model that the rest of the package must not know.

Above this module there are only latents, ``sigma`` and :class:`Conditioning`. Networks, tokenizers, time
embeddings and autoencoders stay below it.
"""

from __future__ import annotations

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from gdmd_lightning.constructed import Constructed
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.fingerprint import text_fingerprint
from gdmd_lightning.families.loading import BuildNetwork, check_pipeline
from gdmd_lightning.families.resolution import Grid
from gdmd_lightning.families.sketch import ARCHITECTURES
from gdmd_lightning.families.truncation import cut_notice, silence_length_warnings
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.locations import resolve

Pipeline = Any
"""A ``diffusers.DiffusionPipeline``. The class itself appears in no signature: jsonargparse also runs the
imports under ``TYPE_CHECKING`` to build the help, and importing diffusers takes seconds.
"""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``predict(x_sigma [B, ...], sigma [B], rows [B]) -> velocity [B, ...]``, as samplers call it."""


class ModelFamily(Constructed, ABC):
    """A pipeline on disk or on the Hugging Face hub, and how to use its network.

    Args:
        path: A directory written by ``DiffusionPipeline.save_pretrained``, ``package:`` and a path inside
            this package, or a hub id (``org/name``), which is downloaded.

    Raises:
        UserError: If the directory is missing, is not a diffusers pipeline, or belongs to another family.
    """

    pipeline_class: ClassVar[str]
    """Name of the diffusers class."""

    network_component: ClassVar[str] = "transformer"
    """Name of the denoising network in the pipeline."""

    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    """Classes of the equal blocks that ``model.speed.compile`` compiles; diffusers has no list of SD3's."""

    guided_passes: ClassVar[int] = 2
    """Network evaluations per guided sample."""

    dtype: str = "float32"
    """Precision of the weights."""

    build_network: BuildNetwork | None = None
    """How :meth:`load` builds the denoising network; ``None`` for diffusers' own way, whole on every rank."""

    _encoders_freed = False
    _cut_reported = False

    def __init__(self, path: str) -> None:
        self.path = resolve(str(path))
        check_pipeline(self.path, self.pipeline_class)
        self.pipeline: Pipeline | None = None
        self._empty: Conditioning | None = None
        self._fingerprint: str | None = None

    # What each family implements.

    @abstractmethod
    def load(self) -> nn.Module:
        """Load all weights; return the denoising network and keep text encoders and autoencoder."""

    def sketch(self) -> nn.Module:
        """Like :meth:`load`, but on the meta device: shapes without weights, from the configurations.

        Raises:
            UserError: If a configuration is missing, or the family does not implement this.
        """
        raise UserError(f"{type(self).__name__} has no sketch", where="family", remedy="implement sketch()")

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        """One row with the shapes and dtypes that :meth:`encode` returns; its values are undefined.

        Raises:
            UserError: If the family does not implement this.
        """
        raise UserError(f"{type(self).__name__} has no blank", where="family", remedy="implement blank_conditioning()")

    def feature_module(self, network: nn.Module) -> nn.Module:
        """The submodule of ``network`` with the output that :meth:`features` returns.

        Raises:
            UserError: If the family does not implement this.
        """
        raise UserError(f"{type(self).__name__} has no features", where="family", remedy="implement feature_module()")

    def grid(self, network: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid | None:
        """The sizes of pictures that these configurations allow.

        Args:
            network: Configuration of the denoising network.
            autoencoder: Configuration of the autoencoder.

        Returns:
            ``None`` if only :meth:`latent_shape` checks sizes, which needs the loaded pipeline.
        """
        return None

    def feature_width(self, network: nn.Module) -> int:
        """``D`` of :meth:`features`.

        Raises:
            UserError: If the family does not implement this.
        """
        raise UserError(f"{type(self).__name__} has no features", where="family", remedy="implement feature_width()")

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> Conditioning:
        """Embed prompts. :meth:`encode` calls this, without gradient, unless the encoders are freed."""

    @abstractmethod
    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction as a flow velocity ``eps - x0``, ``[B, C, H, W]``.

        Args:
            network: The denoising network.
            x_sigma: Noisy latents, ``[B, C, H, W]``, in their own dtype; cast only what the network sees.
            sigma: Noise levels in [0, 1], ``[B]``.
            conditioning: ``B`` rows in the network's dtype.
        """

    def error_weight(self, sigma: Tensor) -> Tensor | None:
        """What turns the squared error of a velocity at levels ``[B]`` into that of the network's own prediction.

        Returns:
            A factor for each level, ``[B]``; ``None`` for 1, if the network predicts the velocity.
        """
        return None

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of the latent of an image.

        Args:
            height: In pixels.
            width: In pixels.

        Raises:
            UserError: If the resolution is not a multiple of what autoencoder and patches need.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images ``[B, 3, H, W]`` in [0, 1]; differentiable."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images ``[B, 3, H, W]`` in [0, 1] to latents. No gradient."""

    @property
    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that get LoRA adapters."""

    @abstractmethod
    def to_pipeline(
        self, network: nn.Module, steps: int, latent_shape: tuple[int, int, int], *, stochastic: bool
    ) -> Pipeline:
        """Build a diffusers pipeline around ``network`` that samples as we do when called with ``steps`` steps.

        Args:
            network: The generator.
            steps: Its number of steps; the scheduler visits :meth:`few_step_sigmas`.
            latent_shape: ``(C, H, W)``, as returned by :meth:`latent_shape`.
            stochastic: Add fresh noise between the steps (DMD2) instead of taking Euler steps.
        """

    def check_export(self, steps: int, *, stochastic: bool) -> None:
        """Fail if :meth:`to_pipeline` has no scheduler for these steps; by default it has one for all.

        Raises:
            UserError: If it has none; the message says which numbers of steps work.
        """

    @abstractmethod
    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Sigmas of a few-step generator, ``[steps + 1]``, descending to 0.

        Args:
            steps: Number of steps.
            latent_shape: ``(C, H, W)``; some families add more noise to larger images.
        """

    @abstractmethod
    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """A copy of the pipeline's own scheduler, set to ``steps`` steps as the pipeline's call sets it.

        It has a timestep for each network evaluation: schedulers of a higher order have more than ``steps``.
        """

    def _scheduler_output(self, predict: Predict, scheduler: Any, x: Tensor, timestep: Tensor) -> Tensor:
        """What the network predicts, in its own terms, in a step of the pipeline's scheduler, ``[B, C, H, W]``.

        By default a velocity on states of the flow, with levels of a thousandth of the timesteps.

        Args:
            predict: The network's velocity.
            scheduler: From :meth:`teacher_scheduler`.
            x: The scheduler's states, ``[B, C, H, W]``.
            timestep: One of its timesteps, a scalar.
        """
        return predict(x, (timestep / 1000).to(x).expand(len(x)), torch.arange(len(x)))

    def sampling_arguments(self) -> dict[str, Any]:
        """Arguments that a call of the pipeline needs for our images, besides prompt, steps and guidance."""
        return {}

    def loading_arguments(self) -> dict[str, Any]:
        """Further arguments that ``from_pretrained`` needs for a pipeline made by :meth:`to_pipeline`."""
        return {}

    # What all families share.

    def sample_teacher(self, predict: Predict, noise: Tensor, steps: int, rngs: list[torch.Generator]) -> Tensor:
        """Sample in the loop of the pipeline, with its own scheduler.

        Args:
            predict: The teacher's velocity.
            noise: Standard normal, ``[B, C, H, W]``.
            steps: Sampling steps.
            rngs: A random stream for each sample, for schedulers that draw noise in their steps.

        Returns:
            Latents as :meth:`decode` takes them, ``[B, C, H, W]``.
        """
        scheduler = self.teacher_scheduler(steps, (noise.shape[1], noise.shape[2], noise.shape[3]))
        # As the pipelines call it: the step of a TCDScheduler has another eta of its own.
        taken = inspect.signature(scheduler.step).parameters
        options = {key: value for key, value in {"generator": rngs, "eta": 0.0}.items() if key in taken}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # FlowMatch schedulers start from unit noise
        for timestep in scheduler.timesteps:
            output = self._scheduler_output(predict, scheduler, x, timestep)
            x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
        return x

    def check_resolution(self, height: int, width: int) -> None:
        """Fail before any weights are loaded if the pipeline cannot make pictures of this size.

        This reads configurations of local pipelines and of the models whose configurations are shipped. For others,
        and where a file is broken, loading comes first; :meth:`latent_shape` checks the same afterwards.

        Raises:
            UserError: If it cannot.
        """
        place = next((p for p in (Path(self.path).expanduser(), ARCHITECTURES / self.path) if p.is_dir()), None)
        if place is None:
            return
        try:
            network, autoencoder = (
                json.loads((place / part / "config.json").read_text(encoding="utf-8"))
                for part in (self.network_component, "vae")
            )
            grid = self.grid(network, autoencoder)
        except (OSError, ValueError, LookupError, TypeError):
            return  # the loader says which part is broken
        if grid is not None:
            grid.check(height, width)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Embed prompts, one row each, on the text encoders' device. No gradient.

        Reports once that long prompts are cut, with the first one as an example.

        Raises:
            UserError: If the text encoders have been freed.
        """
        if self._encoders_freed:
            raise UserError(
                f"the text encoders are freed, and {texts[0][:80]!r} was not embedded before",
                where="prompt",
                remedy="set embedding_cache.free_encoders to false, or use only prompts of the run's source and "
                "callbacks",
            )
        if self.pipeline is not None and not self._cut_reported:
            silence_length_warnings(self.pipeline)
            if notice := cut_notice(texts, self.token_limits(), self.token_count):
                self._cut_reported = True
                rank_zero_info(notice)
        return self._encode(texts)

    def token_limits(self) -> dict[str, int]:
        """Tokens of a prompt that are kept, by tokenizer; by default none are known, and nothing is reported."""
        return {}

    def token_count(self, tokenizer: str, text: str) -> int:
        """Number of tokens that a tokenizer of the pipeline makes of a text, including the special ones."""
        return len(getattr(self.loaded, tokenizer)(text).input_ids)

    def predict_velocity(
        self,
        network: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The velocity with classifier-free guidance, ``u + w (c - u)``, in one batched pass.

        Args:
            network: The denoising network.
            x_sigma: Noisy latents, ``[B, C, H, W]``.
            sigma: Noise levels in [0, 1], ``[B]``.
            conditioning: ``B`` rows, in any dtype.
            guidance_scale: ``w``; 1 means no guidance, which skips the unconditional half of the batch.

        Returns:
            Velocity in the dtype of ``x_sigma``, ``[B, C, H, W]``.

        Source: Classifier-free guidance (2207.12598), Eq. 6, with ``w`` as the scale in common use.
        """
        if guidance_scale == 1.0:
            return self._call_network(network, x_sigma, sigma, conditioning)
        unconditional, conditional = self._both_velocities(network, x_sigma, sigma, conditioning)
        return unconditional + guidance_scale * (conditional - unconditional)

    def guidance(
        self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """What guidance adds to the velocity, ``(w - 1)(c - u)``; two network evaluations per sample.

        Arguments and shape as in :meth:`predict_velocity`.
        """
        unconditional, conditional = self._both_velocities(network, x_sigma, sigma, conditioning)
        return (guidance_scale - 1) * (conditional - unconditional)

    def _both_velocities(
        self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional velocity in one batched pass, ``[B, C, H, W]`` each."""
        both = Conditioning.concat([self.empty.expand(len(x_sigma)), conditioning])
        v = self._call_network(network, torch.cat([x_sigma, x_sigma]), torch.cat([sigma, sigma]), both)
        unconditional, conditional = v.chunk(2)
        return unconditional, conditional

    def _call_network(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity in the dtype of ``x_sigma``; the conditioning is cast to the network's dtype."""
        cast = conditioning.cast(next(network.parameters()).dtype)
        return self.velocity(network, x_sigma, sigma, cast).to(x_sigma.dtype)

    def features(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Image features from the middle of the network, for the head of a discriminator.

        Args:
            network: The denoising network; gradient reaches ``x_sigma`` even if its weights are frozen.
            x_sigma: Noisy latents, ``[B, C, H, W]``.
            sigma: Noise levels in [0, 1], ``[B]``.
            conditioning: ``B`` rows, in any dtype.

        Returns:
            Output of :meth:`feature_module` in the dtype of ``x_sigma``, ``[B, tokens, D]``.

        Source: DMD2 (2405.14867), section 4.3, which takes the features of the fake score's UNet.
        """
        outputs: list[Any] = []
        hook = self.feature_module(network).register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
        try:
            self._call_network(network, x_sigma, sigma, conditioning)
        finally:
            hook.remove()
        return self._image_tokens(outputs[0], x_sigma).to(x_sigma.dtype)

    def _image_tokens(self, output: Any, x_sigma: Tensor) -> Tensor:
        """Output of :meth:`feature_module` for latents ``x_sigma`` as image tokens, ``[B, tokens, D]``."""
        # Blocks with two streams return text first.
        image: Tensor = output[-1] if isinstance(output, tuple) else output
        return image.flatten(2).transpose(1, 2) if image.ndim == 4 else image

    @property
    def empty(self) -> Conditioning:
        """The conditioning of the empty prompt, one row, encoded once."""
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def encoding_settings(self) -> dict[str, Any]:
        """The settings that affect an embedding.

        By default all arguments of the constructor except the path, and those of its bases that it passes on unseen
        (``**options``); each must be an attribute of the same name.

        Raises:
            UserError: If one is not.
        """
        names = _arguments(type(self))
        for name in names:
            if not hasattr(self, name):
                raise UserError(
                    f"it does not keep its argument {name!r}",
                    where=type(self).__name__,
                    remedy=f"set self.{name} in the constructor, or override encoding_settings",
                )
        return {name: getattr(self, name) for name in names}

    def text_fingerprint(self) -> str:
        """Hash of all that affects an embedding, see :func:`text_fingerprint`; independent of the path."""
        if self._fingerprint is None:
            self._fingerprint = text_fingerprint(self.loaded.components, self.encoding_settings())
        return self._fingerprint

    def free_text_encoders(self) -> None:
        """Free the memory of the text encoders.

        Afterwards :meth:`encode` raises an error. :attr:`empty` and :meth:`text_fingerprint` still work,
        since both are computed here first.
        """
        parts = self.loaded.components.items()
        encoders = [name for name, part in parts if name.startswith("text_encoder") and part is not None]
        if not encoders:
            return
        self._empty, self._fingerprint = self.empty, self.text_fingerprint()
        for name in encoders:
            setattr(self.loaded, name, None)
        self._encoders_freed = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def loaded(self) -> Pipeline:
        """The pipeline; available after :meth:`load` or :meth:`sketch`."""
        if self.pipeline is None:
            raise RuntimeError(f"{type(self).__name__}.load() must run before the pipeline is used")
        return self.pipeline

    def components(self, **own: Any) -> dict[str, Any]:
        """Parts for :meth:`to_pipeline`, with ``own`` instead of the pipeline's.

        The autoencoder has the pipeline's dtype: diffusers turns it into float32 itself where that is needed.
        """
        vae, dtype = self.loaded.vae, getattr(torch, self.dtype)
        if vae.dtype != dtype:
            vae = copy.deepcopy(vae).to(dtype)
        return {**self.loaded.components, "vae": vae, **own}

    def save_lora(self, directory: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write an adapter of the network in the format that the pipeline's ``load_lora_weights`` reads.

        Args:
            directory: Where ``pytorch_lora_weights.safetensors`` is written.
            layers: The adapter's tensors by name, as peft names them.
            metadata: The adapter's peft configuration.
        """
        name = self.network_component
        adapter = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
        type(self.loaded).save_lora_weights(directory, safe_serialization=True, **adapter)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Let the autoencoder process one image (slicing) or one tile (tiling) at a time."""
        if slicing:
            self.loaded.vae.enable_slicing()
        if tiling:
            self.loaded.vae.enable_tiling()

    def channels_last(self) -> None:
        """Keep the weights of the autoencoder's convolutions with their channels last in memory."""
        self.loaded.vae.to(memory_format=torch.channels_last)

    def to(self, device: torch.device) -> None:
        """Move text encoders and autoencoder; the network moves with the module that owns it."""
        for component in self.loaded.components.values():
            if isinstance(component, nn.Module):
                component.to(device)
        self._empty = None if self._empty is None else self._empty.to(device)


def _arguments(kind: type) -> list[str]:
    """Names of a constructor's arguments, and of those of its bases that it passes on unseen, except the path."""
    unseen = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names: dict[str, None] = {}
    for each in kind.__mro__:
        if "__init__" in vars(each):
            _, *given = inspect.signature(vars(each)["__init__"]).parameters.values()
            names |= dict.fromkeys(one.name for one in given if one.kind not in unseen)
            if not any(one.kind in unseen for one in given):
                break
    return [name for name in names if name != "path"]
