"""Load diffusers pipelines, with errors that name the faulty part."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.autoencoder import keep_range
from gdmd_lightning.families.hub import loading_problem

_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
_ADAPTER = re.compile(r"\.(base_layer|lora_[AB])\.")
"""In names of weights that peft has wrapped, or added."""


@dataclass(frozen=True)
class NetworkFiles:
    """A denoising network on disk, for whoever constructs and fills it elsewhere.

    Args:
        kind: The network's diffusers class.
        config: Its configuration.
        weights: Its ``.safetensors`` files.
        dtype: Precision that the family loads it in.
    """

    kind: Any
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    dtype: Any

    def construct(self) -> nn.Module:
        """The network with random weights."""
        network: nn.Module = self.kind.from_config(dict(self.config))
        return network


BuildNetwork = Callable[[NetworkFiles], nn.Module]
"""Constructs a network and fills it with its weights."""


def load_pipeline(
    cls: Any,
    path: str,
    dtype: str,
    *,
    may_lack: Sequence[str] = (),
    drop: Sequence[str] = (),
    network: str = "transformer",
    build: BuildNetwork | None = None,
) -> Any:
    """Load ``cls.from_pretrained(path)`` from safetensors; freeze its modules and set evaluation mode.

    Args:
        cls: The pipeline's class.
        path: Directory or hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        may_lack: Components that the class requires but that a directory may have saved as empty.
        drop: Components not to load.
        network: Name of the denoising network.
        build: Builds the denoising network in another way than diffusers does.

    Raises:
        UserError: If the dtype is unknown, or a file of the pipeline is missing or corrupt.
    """
    import torch
    from diffusers.utils import logging

    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"unknown dtype {dtype!r}", where="family.dtype", remedy="use float32, bfloat16 or float16")
    directory = Path(path).expanduser()
    empty = set(drop)
    if directory.is_dir():
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        empty |= {part for part in may_lack if index.get(part, [None])[0] is None}
        _refuse_adapters(directory, empty)
    built = {} if build is None else {network: build(network_files(path, network, getattr(torch, dtype)))}
    logging.disable_progress_bar()
    try:
        pipeline = cls.from_pretrained(
            str(directory) if directory.is_dir() else path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            low_cpu_mem_usage=True,
            **dict.fromkeys(empty),
            **built,
        )
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen unrelated types here
        problem, remedy = loading_problem(path, error)
        raise UserError(f"the pipeline {path!r} {problem}", where="family.path", remedy=remedy) from error
    finally:
        logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            if directory.is_dir() and name not in built:
                _check_complete(component, directory / name)
            component.requires_grad_(False).eval()
    keep_range(pipeline.vae)
    return pipeline


def network_files(path: str, network: str, dtype: Any) -> NetworkFiles:
    """Find a pipeline's denoising network; one on the hub is downloaded.

    Args:
        path: Directory or hub id of the pipeline.
        network: Name of the network in it.
        dtype: Precision to load it in.

    Raises:
        UserError: If a file is missing.
    """
    import diffusers

    directory = Path(path).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(path, allow_patterns=["model_index.json", f"{network}/*"]))
        except Exception as error:  # unrelated types: no such model, no access, no network
            problem, remedy = loading_problem(path, error)
            raise UserError(f"the pipeline {path!r} {problem}", where="family.path", remedy=remedy) from error
    try:
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers, index[network][1])
        config = kind.load_config(str(directory / network))
        files = weight_files(directory / network) or [directory / network / _DIFFUSERS]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(
            f"the {network} of {path!r} cannot be loaded: {' '.join(str(error).split())[:200]}",
            where="family.path",
            remedy="save or download it again",
        ) from error
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(f"no file {missing[0]!r}", where="family.path", remedy="save or download it again")
    return NetworkFiles(kind, config, tuple(files), dtype)


def weight_files(directory: Path) -> list[Path]:
    """The ``.safetensors`` files that ``from_pretrained`` reads of a component, none of a variant such as fp16."""
    for name in (_DIFFUSERS, _TRANSFORMERS):
        whole, shards = directory / name, directory / f"{name}.index.json"
        # If a directory has both, diffusers reads the shards, and transformers the whole.
        if shards.is_file() and not (whole.is_file() and name == _TRANSFORMERS):
            names = json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values()
            return sorted({directory / Path(shard).name for shard in names})
        if whole.is_file():
            return [whole]
    return []


def _held(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in a component's files, by name."""
    from safetensors import safe_open

    held: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        with safe_open(file, "pt") as content:
            held |= {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    return held


def _refuse_adapters(directory: Path, empty: Collection[str]) -> None:
    """Refuse a pipeline that was saved with LoRA attached: under such names the libraries find no weights.

    Raises:
        UserError: If a component, of those that are loaded, was saved so.
    """
    for part in sorted(each for each in directory.iterdir() if each.is_dir() and each.name not in empty):
        try:
            attached = any(_ADAPTER.search(name) for name in _held(part))
        except Exception:  # broken files are for from_pretrained to complain about
            continue
        if attached:
            raise UserError(
                f"{str(part)!r} was saved with LoRA attached",
                where="family.path",
                remedy="call fuse_lora(), to keep what it learned, then unload_lora_weights(), and save it again",
            )


def _check_complete(component: nn.Module, directory: Path) -> None:
    """Check that a component's files hold all of its weights.

    transformers initializes missing weights at random, and diffusers leaves them without values. Both rename some
    when loading, so one of another name and the same shape is taken for it.

    Raises:
        UserError: If weights are missing.
    """
    held = _held(directory)
    needed: dict[str, Tensor] = dict(component.named_parameters())
    needed |= {name: buffer for name, buffer in component.named_buffers() if buffer.is_meta}
    others, missing = Counter(shape for name, shape in held.items() if name not in needed), []
    for name, weight in needed.items():
        shape = tuple(weight.shape)
        if name in held:
            continue
        if weight.is_meta or not others[shape]:
            missing.append(name)
        others[shape] -= 1
    if missing:
        raise UserError(
            f"the pipeline cannot be loaded: {str(directory)!r} lacks {len(missing):,} of its {len(needed):,} weights, "
            f"such as {missing[0]!r}",
            where="family.path",
            remedy="save or download it again",
        )


def check_flow_scheduler(scheduler: Any) -> None:
    """Check that a pipeline calls its network with ``x_sigma`` at the time ``1000 sigma``.

    Raises:
        UserError: If its scheduler makes it do otherwise.
    """
    if scheduler.config.num_train_timesteps != 1000:
        raise UserError(
            f"the scheduler has {scheduler.config.num_train_timesteps} timesteps (num_train_timesteps)",
            where="family.path",
            remedy="use a model of 1000 timesteps",
        )
    if scheduler.config.get("invert_sigmas"):
        raise UserError(
            "the scheduler's levels are inverted (invert_sigmas)",
            where="family.path",
            remedy="use a model whose noise decreases with its timesteps",
        )


def check_pipeline(path: str, pipeline_class: str) -> None:
    """Check that ``path`` holds a diffusers pipeline of the given class; read only its index.

    Args:
        path: Directory, or hub id, of which only the form is checked.
        pipeline_class: Name of the expected class.

    Raises:
        UserError: If the pipeline is missing, broken or of another class.
    """
    where = "family.path"
    directory = Path(path).expanduser()
    if not directory.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
            return
        raise UserError(f"no directory {path!r}", where=where, remedy="give a diffusers directory or a hub id org/name")
    index = directory / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path!r} has no readable model_index.json",
            where=where,
            remedy="give a directory written by save_pretrained",
        ) from error
    except ValueError as error:
        raise UserError(f"{index} is not JSON ({error})", where=where, remedy="save the pipeline again") from error
    name = found.get("_class_name") if isinstance(found, dict) else None
    if name != pipeline_class:
        raise UserError(
            f"{path!r} holds a {name}, not a {pipeline_class}", where=where, remedy="choose the family that matches it"
        )
    for part, (library, _) in ((k, v) for k, v in found.items() if isinstance(v, list)):
        if library is not None and not (directory / part).is_dir():
            raise UserError(f"{path!r} lacks its component {part!r}", where=where, remedy="save the pipeline again")
