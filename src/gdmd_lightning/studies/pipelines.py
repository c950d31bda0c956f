"""Pictures of any diffusers pipeline, drawn into a directory that is scored like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

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
    """

    path: str
    steps: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0


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
    write_atomically(out / SETTINGS, settings)  # a pipeline that cannot be loaded leaves nothing
    for row, number, prompt in tqdm(missing, desc=f"drawing {out.name}", unit="picture"):
        picture = _draw(pipeline, drawing, prompt.text, named_seed("drawn", drawing.seed, row, number))
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


def _load(drawing: Drawing, device: str) -> Any:
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(drawing.path)
        # Parts that were saved as None, such as SD3's largest text encoder, are asked for by name otherwise.
        without = {name: None for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is None}
        pipeline = DiffusionPipeline.from_pretrained(drawing.path, dtype=getattr(torch, drawing.dtype), **without)
    except Exception as error:  # diffusers, transformers and safetensors raise a dozen unrelated types here
        problem, remedy = loading_problem(drawing.path, error)
        raise UserError(f"{drawing.path!r} {problem}", where="--pipeline", remedy=remedy) from error
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
