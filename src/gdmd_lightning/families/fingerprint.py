"""Fingerprints by content: of a network's weights, and of everything that affects an embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ENDS = 16
"""Number of values at each end of a tensor that enter the hash in order."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype with the same number of bytes per value."""

AT_ONCE = 1 << 24
"""Values copied and summed at once, at most 128 MiB."""

PROBE = "A photo of TWO red circles left of a blue-green triangle, 3 déjà vu!"


def text_fingerprint(components: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hash of a pipeline's text encoders and tokenizers, and of the settings they are used with.

    It does not depend on paths, devices, the number of threads or library versions. Every bit of the weights
    counts.

    Args:
        components: The pipeline's components by name; only names that start with ``text_encoder`` or
            ``tokenizer`` are used.
        settings: Everything else that affects an embedding.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(*values: object) -> None:
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())

    add(settings)
    for name, part in sorted(components.items()):
        if part is None:
            continue
        if name.startswith("text_encoder"):
            add(name, type(part).__name__, _stable_settings(part.config.to_dict()))
            for key, tensor in part.state_dict().items():
                add(key, list(tensor.shape), str(tensor.dtype), _tensor_bits(tensor))
        elif name.startswith("tokenizer"):
            add(name, type(part).__name__, sorted(part.get_vocab().items()))
            # One word at a time: a tokenizer warns about texts longer than its model accepts.
            add([part(word).input_ids for word in PROBE.split()])
            add(part.special_tokens_map, part.padding_side, part.model_max_length, part.chat_template)
    return digest.hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """Hash of a network's weights: names, shapes, dtypes and every bit, wherever they were loaded from.

    It is one pass over the weights in memory: a few seconds for 8 GB on one core.

    Returns:
        32 hexadecimal digits.
    """
    return fingerprint(network.state_dict().items())


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a network's tensors, in the order of its state dict; see :func:`weights_fingerprint`."""
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in tensors:
        digest.update(json.dumps([key, list(tensor.shape), str(tensor.dtype), _tensor_bits(tensor)]).encode())
    return digest.hexdigest()


def _stable_settings(config: Any) -> Any:
    """Remove the path a configuration was loaded from and the versions that wrote it."""
    if isinstance(config, dict):
        kept = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
        return {key: _stable_settings(value) for key, value in kept.items() if key != "transformers_version"}
    return config


def _tensor_bits(tensor: Tensor) -> list[int]:
    """Bits of both ends in order, and the sum of all bits: integer sums are the same on every device.

    The sum runs over 64-bit words, several times faster than over single values. Words of a tensor that was read from
    a file and is not aligned to 64 bits are copied first. Trailing values that do not fill a word are covered by the
    end.
    """
    bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
    parts = bits[: len(bits) // 8 * 8].split(AT_ONCE)
    words = (part if _is_aligned(part) else part.clone() for part in parts)
    return [*bits[:ENDS].tolist(), *bits[-ENDS:].tolist(), sum(int(word.view(torch.int64).sum()) for word in words)]


def _is_aligned(part: Tensor) -> bool:
    return part.data_ptr() % 8 == 0 and int(part.storage_offset()) * part.element_size() % 8 == 0
