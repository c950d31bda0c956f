"""Prompts that are longer than a text encoder takes: said once, instead of twice per prompt by the libraries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdmd_lightning.errors import shortened

_REPEATED = (
    "The following part of your input was truncated",  # diffusers, per prompt and tokenizer
    "Token indices sequence length is longer than",  # transformers, per tokenizer
)


def silence_length_warnings(pipeline: Any) -> None:
    """Keep the libraries from warning about each long prompt; their other messages stay."""
    for name in (type(pipeline).__module__, "transformers.tokenization_utils_base"):
        logging.getLogger(name).addFilter(_is_other_message)  # added once, however often this is called


def _is_other_message(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REPEATED)


def cut_notice(texts: Sequence[str], limits: Mapping[str, int], token_count: Callable[[str, str], int]) -> str | None:
    """One line about the first text that a text encoder will cut, or None if all are encoded whole.

    Args:
        texts: Prompts.
        limits: Tokens that are kept, by tokenizer.
        token_count: Number of tokens of a text, ``token_count(tokenizer, text)``.
    """
    for text in texts:
        most = max((count for name, limit in limits.items() if (count := token_count(name, text)) > limit), default=0)
        if most:
            kept = ", ".join(f"{name} {limit}" for name, limit in limits.items())
            return (
                f"prompts are cut to the tokens that the text encoders take ({kept}); "
                f"the first such prompt has {most}: {shortened(text, 60)!r}"
            )
    return None
