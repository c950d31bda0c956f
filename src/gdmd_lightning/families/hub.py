"""Why a model of the Hugging Face hub cannot be loaded, for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LOGIN = "accept its license on https://huggingface.co/{}, then log in with: hf auth login"
LENGTH = 300


def loading_problem(path: str, error: BaseException) -> tuple[str, str]:
    """What is wrong and how to fix it, for an error of ``from_pretrained``.

    The libraries bury the hub's answer under advice of their own, so the causes are searched for its types.

    Args:
        path: Directory or hub id.
        error: The error.
    """
    if Path(path).expanduser().exists():
        return f"cannot be loaded: {_cut(error)}", "save or download it again"
    names = {type(cause).__name__ for cause in _causes(error)}
    text = " ".join(str(cause) for cause in _causes(error))
    if "GatedRepoError" in names or "gated repo" in text:
        return "is gated: the hub gives it only to users who accepted its license", LOGIN.format(path)
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError"} or "is not a valid model identifier" in text:
        return "is not on the hub, or is private", "check its name; for a private one log in with: hf auth login"
    if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"} or "is not cached locally" in text:
        return "is not on this machine, and the hub cannot be reached", (
            f"download it where there is a network: hf download {path} (HF_HUB_OFFLINE must not be set)"
        )
    return f"cannot be loaded: {_cut(error)}", "save or download it again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cut(error: BaseException) -> str:
    """The message on one line, cut between words."""
    line = " ".join(str(error).split()).rstrip(".")
    return line if len(line) <= LENGTH else f"{line[:LENGTH].rpartition(' ')[0]} ..."
