"""What a family of models must say of itself, so that nothing above it asks which family it is.

Above this door everything is ``x0``, ``sigma`` and a :class:`Conditioning`; networks, tokenizers, time
embeddings and autoencoders stay behind it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.fingerprint import text_fingerprint
from gdmd_lightning.families.loading import check_pipeline
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.locations import resolve
from gdmd_lightning.schedules import x0_from_velocity

Pipeline = Any
"""A ``diffusers.DiffusionPipeline``. To build the help, jsonargparse runs imports under ``TYPE_CHECKING`` too, and
diffusers takes seconds, so its classes stand in no signature here.
"""


class ModelFamily(ABC):
    """A pipeline on disk or on the hub, and how to use its network.

    Args:
        path: A directory written by ``DiffusionPipeline.save_pretrained``, ``package:`` and a path inside this
            package, or a hub id (``org/name``), which is the one case in which the network is used.

    Raises:
        UserError: If the directory is missing, is no diffusers pipeline, or is of another family.
    """

    pipeline_class: ClassVar[str]
    network_component: ClassVar[str] = "transformer"
    guided_passes: ClassVar[int] = 2

    def __init__(self, path: str) -> None:
        self.path = resolve(str(path))
        check_pipeline(self.path, self.pipeline_class)
        self.pipeline: Pipeline | None = None
        self._empty: Conditioning | None = None
        self._fingerprint: str | None = None

    # What each family says of itself.

    @abstractmethod
    def load(self) -> nn.Module:
        """Load all weights; returns the denoising network and keeps text encoders and autoencoder."""

    def sketch(self) -> nn.Module:
        """As :meth:`load`, with shapes for weights: every network on the meta device, nothing read but configurations.

        Raises:
            UserError: If a configuration is missing, or this family has no sketch.
        """
        raise UserError(f"{type(self).__name__} has no sketch", where="family", remedy="give it sketch()")

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        """One row of the shapes and precision that :meth:`encode` would give; what it says is undefined.

        Raises:
            UserError: If this family cannot tell.
        """
        raise UserError(f"{type(self).__name__} has no blank", where="family", remedy="give it blank_conditioning()")

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Embed prompts, ``B`` rows on the family's device. No gradient."""

    @abstractmethod
    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction as a flow velocity ``eps - x0``, ``[B, C, H, W]`` at levels ``sigma`` ``[B]``.

        The conditioning comes in the network's precision, the state in its own: cast it for the network alone.
        """

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """``(C, H, W)`` of a picture's latent.

        Raises:
            UserError: If autoencoder and patches do not divide the resolution.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1] of latents; carries gradient if asked to."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of pictures ``[B, 3, H, W]`` in [0, 1]. No gradient."""

    @property
    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the modules that get LoRA."""

    @abstractmethod
    def to_pipeline(self, network: nn.Module, steps: int, *, stochastic: bool) -> Pipeline:
        """A diffusers pipeline around ``network`` whose plain call with ``steps`` steps samples as ours does.

        Args:
            network: The generator.
            steps: Its number of steps; the scheduler visits :meth:`few_step_sigmas`.
            stochastic: Re-noise between the steps (DMD2) instead of Euler steps.
        """

    @abstractmethod
    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Levels of a few-step generator of this family, ``[steps + 1]``, from most noise to 0."""

    @abstractmethod
    def teacher_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Levels that the pipeline's own scheduler would visit in ``steps`` steps, ``[steps + 1]``."""

    def teacher_start(self, steps: int) -> float:
        """What the pipeline's scheduler makes of ``sigma_1 noise``, the latents it starts from, as a factor."""
        return 1.0

    def sampling_arguments(self) -> dict[str, Any]:
        """Arguments beside prompt, steps and guidance that a call of the pipeline needs to repeat our pictures."""
        return {}

    def loading_arguments(self) -> dict[str, Any]:
        """Arguments beside the path that ``from_pretrained`` needs for a pipeline saved by :meth:`to_pipeline`."""
        return {}

    # What follows from it.

    def predict_velocity(
        self,
        network: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The velocity, guided ``u + w (c - u)`` in one batched pass unless ``w`` is 1.

        Source: Classifier-free guidance (2207.12598), Eq. 6, in the scale's usual form.
        """
        if guidance_scale == 1.0:
            return self._told(network, x_sigma, sigma, conditioning)
        both = Conditioning.concat([self.empty.expand(len(x_sigma)), conditioning])
        v = self._told(network, torch.cat([x_sigma, x_sigma]), torch.cat([sigma, sigma]), both)
        unconditional, conditional = v.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _told(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Told in the network's own precision, answered in the state's."""
        told = conditioning.cast(next(network.parameters()).dtype)
        return self.velocity(network, x_sigma, sigma, told).to(x_sigma.dtype)

    def predict_x0(
        self,
        network: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The clean latent that the network sees in ``x_sigma``, guided as :meth:`predict_velocity`."""
        v = self.predict_velocity(network, x_sigma, sigma, conditioning, guidance_scale)
        return x0_from_velocity(x_sigma, v, sigma)

    @property
    def empty(self) -> Conditioning:
        """The empty prompt's conditioning, one row, encoded once."""
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    def encoding_settings(self) -> dict[str, Any]:
        """What of this object shapes an embedding: by default all the constructor's arguments but the path, each of
        which must then stand on the object under its name.
        """
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "path"}

    def text_fingerprint(self) -> str:
        """A hash of all that shapes an embedding, see :func:`text_fingerprint`; the same at any path."""
        if self._fingerprint is None:
            self._fingerprint = text_fingerprint(self.loaded.components, self.encoding_settings())
        return self._fingerprint

    def free_text_encoders(self) -> None:
        """Give the text encoders' memory back. Afterwards :meth:`encode` refuses; :attr:`empty` and
        :meth:`text_fingerprint` were asked before and go on to answer.
        """
        parts = self.loaded.components.items()
        encoders = [name for name, part in parts if name.startswith("text_encoder") and part is not None]
        if not encoders:
            return
        self._empty, self._fingerprint = self.empty, self.text_fingerprint()
        for name in encoders:
            setattr(self.loaded, name, None)
        # In front of every family's own, which would fail with an AttributeError.
        self.encode = _encode_without_encoders  # type: ignore[method-assign]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def loaded(self) -> Pipeline:
        """The pipeline, after :meth:`load`."""
        if self.pipeline is None:
            raise RuntimeError(f"{type(self).__name__}.load() must run before the pipeline is used")
        return self.pipeline

    def save_lora(self, directory: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write an adapter of the network as the file that the pipeline's ``load_lora_weights`` reads.

        Args:
            directory: Gets ``pytorch_lora_weights.safetensors``.
            layers, metadata: As :meth:`AdapterRoles.lora_of` gives them.
        """
        name = self.network_component
        adapter = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
        type(self.loaded).save_lora_weights(directory, safe_serialization=True, **adapter)

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Let the autoencoder work on one picture, or one tile, at a time."""
        if slicing:
            self.loaded.vae.enable_slicing()
        if tiling:
            self.loaded.vae.enable_tiling()

    def to(self, device: torch.device) -> None:
        """Move text encoders and autoencoder; the network moves with the module that owns it."""
        for component in self.loaded.components.values():
            if isinstance(component, nn.Module):
                component.to(device)
        self._empty = None if self._empty is None else self._empty.to(device)


def _encode_without_encoders(texts: Sequence[str]) -> Conditioning:
    raise UserError(
        f"the text encoders are freed, and {texts[0][:80]!r} was not embedded before",
        where="prompt",
        remedy="set embedding_cache.free_encoders to false, or use prompts of the run's source and callbacks alone",
    )
