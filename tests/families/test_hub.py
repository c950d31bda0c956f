"""A model that the hub does not give is explained in one line, with what to do about it."""
# ruff: noqa: E501

import pytest

from gdmd_lightning.families.hub import loading_problem


class GatedRepoError(OSError):
    """Stands for the hub's class of this name."""


class RepositoryNotFoundError(OSError):
    """Stands for the hub's class of this name."""


class LocalEntryNotFoundError(OSError):
    """Stands for the hub's class of this name."""


@pytest.mark.parametrize(
    ("cause", "what", "remedy"),
    [
        (GatedRepoError("401 Client Error"), "is gated: ", "accept its license on https://huggingface.co/org/model, then "),
        (RepositoryNotFoundError("404"), "is not on the hub, or is private", "check its name; for a private one log in with: hf auth login"),
        (LocalEntryNotFoundError("offline"), "is not on this machine, and the hub cannot be reached", "hf download org/model"),
        (ValueError("word " * 100), "cannot be loaded: word word", "save or download it again"),
    ],
)  # fmt: skip
def test_cause_under_the_libraries_own_error_is_named(cause, what, remedy):
    error = OSError("We couldn't connect. " + "advice " * 200)
    error.__cause__ = cause
    if isinstance(cause, ValueError):
        error = cause
    found, advice = loading_problem("org/model", error)
    assert found.startswith(what)
    assert remedy in advice
    assert len(found) < 330
    assert not found.endswith("wo ...")


def test_directory_that_does_not_load_is_not_blamed_on_the_hub(tmp_path):
    what, remedy = loading_problem(str(tmp_path), GatedRepoError("broken file"))
    assert (what, remedy) == ("cannot be loaded: broken file", "save or download it again")
