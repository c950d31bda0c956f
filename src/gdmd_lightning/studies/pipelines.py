"""Pictures of any diffusers pipeline, drawn into a directory that is scored like any other."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from PIL import Image
from tqdm import tqdm

from gdmd_lightning.configuration.suggestions import did_you_mean
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.hub import loading_problem
from gdmd_lightning.files import atomic_file, files_digest, write_atomically
from gdmd_lightning.pictures import LIST, picture_name
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.streams import named_seed
from gdmd_lightning.studies.folders import LISTS

SETTINGS = "drawn_with.json"


@dataclass(frozen=True)
class Drawing:
    """How a pipeline draws.

    Args:
        path: Directory or hub id of the pipeline.
        steps: Sampling steps.
        guidance_scale: Guidance scale.
        height, width: In pixels; None for the pipeline's own.
        dtype: Precision of its networks.
        seed: Seed of all noise; every picture has its own streams.
        arguments: Further arguments of the pipeline's call, such as ``max_sequence_length``, as
            :func:`checked_arguments` gives them.
    """

    path: str
    steps: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)


# Arguments of calls that are given otherwise: by options, and because pictures are files.
_OF_OPTIONS = {
    "prompt": "--prompts",
    "num_inference_steps": "--steps",
    "guidance_scale": "--pipeline_guidance",
    "height": "--height",
    "width": "--width",
    "generator": "--seed",
    "latents": "--seed",
    "num_images_per_prompt": "--per_prompt",
}
_OF_PICTURES = ("output_type", "return_dict")
_OF_STEPS = ("sigmas", "timesteps")


def checked_arguments(path: str, arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Further arguments of a pipeline's call, sorted, with tuples where the call has them; reads only its index.

    Args:
        path: Directory or hub id of the pipeline.
        arguments: Plain values by name, as JSON and YAML have them.
        steps: Sampling steps.

    Raises:
        UserError: If the call has no such argument or takes no such value, or an option decides about it.
    """
    import diffusers

    if not arguments:
        return {}
    kind = getattr(diffusers, str(_index(path).get("_class_name")), None)
    if kind is None:
        what = f"{path!r} holds no pipeline of diffusers, so they cannot be checked"
        raise UserError(what, where="--pipeline_arguments", remedy="leave them out")
    known = dict(inspect.signature(kind.__call__, eval_str=True).parameters)
    # Some calls take any name, as **kwargs, and ignore it.
    hints = {name: each.annotation for name, each in known.items() if name != "self" and each.kind != each.VAR_KEYWORD}
    checked = {}
    for name, value in sorted(arguments.items()):
        where = f"--pipeline_arguments.{name}"
        if name in _OF_OPTIONS:
            raise UserError("another option decides about it", where=where, remedy=f"use {_OF_OPTIONS[name]}")
        if name in _OF_PICTURES:
            raise UserError("a pipeline must return pictures", where=where, remedy="leave it out")
        if name not in hints:
            what = f"a {kind.__name__} is not called with it"
            raise UserError(what, where=where, remedy=did_you_mean(name, hints.keys() - {*_OF_OPTIONS, *_OF_PICTURES}))
        for given in (value, tuple(value)) if isinstance(value, list) else (value,):
            if _is_of(given, hints[name]):
                checked[name] = given
                break
        else:
            expected = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else str(hints[name])
            raise UserError(f"expected {expected or hints[name]}, got {value!r}", where=where)
        if name in _OF_STEPS and value is not None and len(value) != steps:
            raise UserError(f"{len(value)} values for {steps} steps", where=where, remedy=f"use --steps {len(value)}")
    return checked


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value has the kind of a type; not what is inside of it, which pipelines annotate loosely."""
    if hint in (Any, inspect.Parameter.empty):
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(hint))
    kind = get_origin(hint) or hint
    return type(value) in ((int, float) if kind is float else (kind,))  # a bool is no int here


def draw_pictures(drawing: Drawing, prompts: Sequence[Prompt], per_prompt: int, out: Path, device: str) -> None:
    """Draw the pictures that a directory lacks, one by one, and list them as ``sample`` does.

    ``drawn_with.json`` in the directory names what they were drawn with: the settings, the prompts, and a digest of
    every file of a local pipeline, hidden ones excepted, so that weights replaced under the same path are noticed.
    Of a hub id only the name is known. Pictures of anything else are neither continued nor replaced.

    Args:
        drawing: The pipeline and its settings.
        prompts: The prompts.
        per_prompt: Pictures of each prompt.
        out: The directory.
        device: Where the pipeline runs.

    Raises:
        UserError: If the pipeline cannot be loaded or fails, or the directory has pictures drawn with other weights,
            settings or prompts, or by something else.
    """
    _refuse_others(out)
    wanted = [(row, number, prompt) for row, prompt in enumerate(prompts) for number in range(per_prompt)]
    what = {**asdict(drawing), "content": _content(drawing.path), "prompts": [prompt.text for prompt in prompts]}
    settings = json.dumps(what, indent=1) + "\n"
    if (out / SETTINGS).is_file() and (out / SETTINGS).read_text(encoding="utf-8") != settings:
        raise UserError(
            "its pictures were drawn with other weights, settings or prompts",
            where=str(out),
            remedy="remove it, use another --out, or score it with --pictures",
        )
    missing = [each for each in wanted if not _is_picture(out / picture_name(*each[:2]))]
    pipeline = _load(drawing, device) if missing else None
    for row, number, prompt in tqdm(missing, desc=f"drawing {out.name}", unit="picture"):
        picture = _draw(pipeline, drawing, prompt.text, named_seed("drawn", drawing.seed, row, number))
        if not (out / SETTINGS).is_file():  # a pipeline that cannot be loaded, or fails at once, leaves nothing
            write_atomically(out / SETTINGS, settings)
        with atomic_file(out / picture_name(row, number)) as part:
            picture.save(part, "PNG")
    # Metadata on its own: it may have a key "text", such as what a picture should say.
    rows = [
        {"file": picture_name(row, n), "prompt": prompt.text, "row": row, "number": n, "metadata": prompt.metadata}
        for row, n, prompt in wanted
    ]
    write_atomically(out / LIST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _refuse_others(out: Path) -> None:
    """Fail if a directory has pictures, or a list of them, without the settings that they were drawn with."""
    if (out / SETTINGS).is_file() or not out.is_dir():
        return
    known = Image.registered_extensions()
    others = sorted(each.name for each in out.iterdir() if each.name in LISTS or each.suffix.lower() in known)
    if others:
        raise UserError(
            f"it has {others[0]!r}, which was not drawn by --pipeline",
            where=str(out),
            remedy="use another name or --out, or score it with --pictures",
        )


def _content(path: str) -> str | None:
    """Digest of a local pipeline's files; None of a hub id."""
    directory = Path(path)
    if not directory.is_dir():
        return None
    # Hidden files, such as the hub's records of downloads in .cache, are no part of a pipeline.
    shown = (each for each in directory.rglob("*") if not any(p.startswith(".") for p in each.relative_to(path).parts))
    return files_digest(directory, (each for each in shown if each.is_file()))


def _is_picture(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # absent, truncated or damaged
        return False
    return True


def _index(path: str) -> dict[str, Any]:
    """The content of a pipeline's ``model_index.json``."""
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(path))
    except Exception as error:  # diffusers and the hub raise many unrelated types
        raise _not_loaded(path, error) from error


def _not_loaded(path: str, error: Exception) -> UserError:
    problem, remedy = loading_problem(path, error)
    return UserError(f"{path!r} {problem}", where="--pipeline", remedy=remedy)


def _load(drawing: Drawing, device: str) -> Any:
    from diffusers import DiffusionPipeline

    index = _index(drawing.path)
    try:
        # Parts that were saved as None, such as SD3's largest text encoder, are asked for by name otherwise.
        without = {name: None for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is None}
        pipeline = DiffusionPipeline.from_pretrained(drawing.path, dtype=getattr(torch, drawing.dtype), **without)
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen unrelated types here
        raise _not_loaded(drawing.path, error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _draw(pipeline: Any, drawing: Drawing, text: str, seed: int) -> Image.Image:
    size = {name: value for name in ("height", "width") if (value := getattr(drawing, name)) is not None}
    try:
        with _global_streams(named_seed("steps", seed), pipeline.device):
            picture: Image.Image = pipeline(
                prompt=text,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                **size,
                **drawing.arguments,
            ).images[0]
    except Exception as error:  # a pipeline may raise anything
        what = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(what, where=f"--pipeline {drawing.path}") from error
    return picture


@contextmanager
def _global_streams(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global streams and put them back: a scheduler draws the noise of its steps from them.

    Some pipelines, such as those of SD3 and FLUX.2, do not pass their generator to the scheduler.
    """
    on_device = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(on_device):
        torch.manual_seed(seed)
        yield
