"""Soft-TIFA, the rule of GenEval 2: how probable a model finds the right answers, averaged over a prompt's atoms.

Source: GenEval 2 (2512.16853); facebookresearch/GenEval2, ``evaluation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

Mean = Literal["geometric", "arithmetic"]
MEANS = get_args(Mean)


def answer_log_probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """``log sum_i P(tokens_i)``, a scalar; a token that is there twice counts twice, as in the original.

    Args:
        logits: Of the first token of the answer, ``[vocabulary]``.
        tokens: The first token of each spelling of the right answer.
    """
    return logits.float().log_softmax(-1)[list(tokens)].logsumexp(-1)


def soft_tifa(log_probabilities: Tensor, mean: Mean) -> Tensor:
    """Mean of the right answers' probabilities, a scalar.

    ``arithmetic``, Soft-TIFA AM: ``1/n sum_i p_i``, an estimate for atoms. ``geometric``, Soft-TIFA GM:
    ``(prod_i p_i)^(1/n)``, an estimate for whole prompts.

    Args:
        log_probabilities: ``log p_i`` of the ``n`` questions of a prompt, ``[n]``.
        mean: Which.
    """
    if mean == "geometric":
        return log_probabilities.mean().exp()
    return log_probabilities.exp().mean()
