"""Inputs of Qwen's vision-language models from pictures on tensors, so that gradient reaches the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.preprocessing import normalized, resized
from gdmd_lightning.families.pretrained import load_any


def load_processor(path: str, where: str) -> Any:
    """The processor of a Qwen-VL model: tokenizer, chat template and the sizes of pictures.

    Raises:
        UserError: If it does not load, or has no chat template.
    """
    from transformers import AutoProcessor

    processor = load_any(AutoProcessor, path, where)
    if not getattr(processor, "chat_template", None):
        remedy = "give the directory or hub id of a Qwen-VL model with its processor and chat template"
        raise UserError(f"{path!r} has no chat template", where=where, remedy=remedy)
    return processor


def patches(images: Tensor, processor: Any, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Cut pictures into patches as the model's processor does, but without rounding to 8 bits.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        processor: The model's image processor.
        low, high: Pictures are resized to a number of pixels between the two, with the same aspect ratio as nearly as
            sides allow that are multiples of a merged patch.

    Returns:
        Patches ``[B * h * w, 3 * frames * patch * patch]``, and their grids ``(1, h, w)``, ``[B, 3]``.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    size = smart_resize(*images.shape[-2:], factor=patch * merge, min_pixels=low, max_pixels=high)
    pixels = normalized(resized(images, *size), tuple(processor.image_mean), tuple(processor.image_std))
    rows, columns = size[0] // patch, size[1] // patch
    # Merged patches are neighbors in the sequence.
    cells = pixels.unflatten(3, (columns // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)
    # A picture is a film of equal frames.
    films = cells.unsqueeze(3).expand(-1, -1, -1, frames, -1, -1).flatten(0, 1).flatten(1)
    return films, torch.tensor([[1, rows, columns]] * len(images), device=images.device)


def chats(processor: Any, texts: Sequence[str]) -> list[str]:
    """A message of the user with a picture and a text, for each text, up to where the model answers."""
    out: list[str] = []
    for text in texts:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        out.append(processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return out


def model_inputs(
    processor: Any, texts: Sequence[str], images: Tensor, low: int, high: int, padding: str, where: str
) -> dict[str, Tensor]:
    """What the model's ``forward`` takes, for one picture and one chat for each text.

    Args:
        processor: The model's processor.
        texts: Chats of :func:`chats`, each with one place for a picture.
        images: ``[B, 3, H, W]`` in [0, 1].
        low, high: See :func:`patches`.
        padding: ``left`` or ``right``.
        where: What needs them, for the message.

    Raises:
        UserError: If a text has further places for pictures, which only a token in a prompt can be.
    """
    pixels, grid = patches(images, processor.image_processor, low, high)
    return {"pixel_values": pixels, **text_inputs(processor, texts, grid, padding, where)}


def text_inputs(processor: Any, texts: Sequence[str], grid: Tensor, padding: str, where: str) -> dict[str, Tensor]:
    """What the model's ``forward`` takes besides the pictures' patches.

    Args:
        processor: The model's processor.
        texts: Chats of :func:`chats`, each with one place for a picture.
        grid: Grids of the pictures, all equal, ``[B, 3]``; see :func:`patches`.
        padding: ``left`` or ``right``.
        where: What needs them, for the message.

    Raises:
        UserError: If a text has further places for pictures, which only a token in a prompt can be.
    """
    count = int(grid[0].prod()) // processor.image_processor.merge_size**2
    whole = [text.replace(processor.image_token, processor.image_token * count, 1) for text in texts]
    options = {"padding": True, "padding_side": padding, "return_tensors": "pt", "add_special_tokens": False}
    tokens = processor.tokenizer(whole, **options).to(grid.device)
    places = tokens.input_ids == processor.image_token_id
    if bool((places.sum(1) != count).any()):
        first = int((places.sum(1) != count).nonzero()[0])
        raise UserError(
            f"prompt {first + 1} of the batch contains the token {processor.image_token}",
            where=where,
            remedy="remove it from the prompt",
        )
    return {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "mm_token_type_ids": places.to(torch.int),
        "image_grid_thw": grid,
    }


def picture_features(tower: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """What the language model is given of pictures of one size, ``[B, 1 + layers, tokens, width]``.

    Args:
        tower: The model's visual tower.
        pixels, grid: See :func:`patches`.

    Returns:
        The embeddings of its last layer, then those of the intermediate layers that Qwen3-VL adds to hidden states.
    """
    out = tower(pixels.type(tower.dtype), grid_thw=grid, return_dict=True)
    parts = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    return torch.stack([part.unflatten(0, (len(grid), -1)) for part in parts], dim=1)


@contextmanager
def encoded(tower: Any, features: Tensor) -> Iterator[None]:
    """Let a visual tower give these features instead of encoding pictures.

    Args:
        tower: The model's visual tower.
        features: Of :func:`picture_features`, in the order of the pictures.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    last, *layers = (features[:, layer].flatten(0, 1) for layer in range(features.shape[1]))
    out = BaseModelOutputWithPooling(pooler_output=last)
    out.deepstack_features = layers
    # Releases of transformers differ in how features get from the tower into the embeddings, but all of them ask it.
    tower.forward = lambda *_, **__: out
    try:
        yield
    finally:
        del tower.forward


def check_texts(texts: Sequence[str], tokens: Sequence[str], where: str) -> None:
    """Fail early if a prompt contains a token that has a meaning of its own.

    Raises:
        UserError: The message names the prompt and the token.
    """
    for text in texts:
        for token in tokens:
            if token in text:
                raise UserError(f"prompt {text[:80]!r} contains the token {token}", where=where, remedy="remove it")
