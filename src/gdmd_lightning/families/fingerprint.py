"""A name for what shapes a prompt's embedding, so that stored embeddings of another model are recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ENDS = 16
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
AT_ONCE = 1 << 24
PROBE = "A photo of TWO red circles left of a blue-green triangle, 3 déjà vu!"


def text_fingerprint(components: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A hash of a pipeline's text encoders and tokenizers, and of the settings with which they are used.

    It depends on no path, no device, no number of threads and no version number, and sees every bit of the weights.

    Args:
        components: The pipeline's components by name; those whose names start with ``text_encoder`` or ``tokenizer``
            count.
        settings: What else shapes an embedding.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(*values: object) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())

    add(settings)
    for name, part in sorted(components.items()):
        if part is None:
            continue
        if name.startswith("text_encoder"):
            add(name, type(part).__name__, _lasting(part.config.to_dict()))
            for key, tensor in part.state_dict().items():
                add(key, list(tensor.shape), str(tensor.dtype), _sample(tensor))
        elif name.startswith("tokenizer"):
            add(name, type(part).__name__, sorted(part.get_vocab().items()))
            # A word at a time, since a tokenizer warns of texts that are longer than its model takes.
            add([part(word).input_ids for word in PROBE.split()])
            add(part.special_tokens_map, part.padding_side, part.model_max_length, part.chat_template)
    return digest.hexdigest()


def _lasting(config: Any) -> Any:
    """A configuration without the path it came from and the versions that wrote it."""
    if isinstance(config, dict):
        kept = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
        return {key: _lasting(value) for key, value in kept.items() if key != "transformers_version"}
    return config


def _sample(tensor: Tensor) -> list[int]:
    """The bits of both ends in order, and the sum of all: integers add up to the same on every device.

    They are added in words of 64 bits, several times as fast as one by one, and copied, since a tensor that was read
    from a file need not begin at such a word; the last few, which fill no word, are among those of the end.
    """
    bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
    words = (part.clone().view(torch.int64) for part in bits[: len(bits) // 8 * 8].split(AT_ONCE))
    return [*bits[:ENDS].tolist(), *bits[-ENDS:].tolist(), sum(int(word.sum()) for word in words)]
