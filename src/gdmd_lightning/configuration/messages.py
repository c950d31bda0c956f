"""jsonargparse's errors about wrong arguments, turned into one readable line.

Its messages list every type that a value could have had, several levels deep. A person needs the key, the
value and the right form; these are at the end of the chain of causes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gdmd_lightning.errors import UserError

LENGTH = 300


def readable_error(error: BaseException, command: str) -> UserError:
    """Turn an error of a parser or a constructor into a :class:`UserError`.

    If one of its causes is a :class:`UserError` already, return that.

    Args:
        error: The error, with its causes.
        command: The command whose ``--help`` the message points to.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    keys: list[str] = []
    for cause in chain:
        found = re.match(r'Parser key "([^"]+)":', str(cause))
        if found and keys[-1:] != [found[1]]:
            keys.append(found[1])
    return UserError(shortened(_explanation(chain)), where=".".join(keys) or command, remedy=f"see {command} --help")


def shortened(text: object) -> str:
    """A text on one line, cut after :data:`LENGTH` characters."""
    line = " ".join(str(text).split()).rstrip(".")
    return line if len(line) <= LENGTH else f"{line[:LENGTH]} ..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explanation(chain: list[BaseException]) -> str:
    """What was wrong, from the deepest error whose text says it."""
    deepest, text = chain[-1], str(chain[-1])
    if isinstance(deepest, ImportError | AttributeError | KeyError) and len(chain) > 1:
        text = str(chain[-2])
    if found := re.match(r"Expected a (.+?)\. Got value: (.*)", text, re.DOTALL):
        union = re.search(r"Subtypes: \[(.+)\]\n", str(chain[-2])) if len(chain) > 1 else None
        return f"expected {_type_name(union[1] if union else found[1])}, got {found[2]!r}"
    if found := re.match(r"Expected a dot import path string: (.*)", text):
        return f"unknown class {found[1]!r}"
    if found := re.search(r"ption '(.+)' is not accepted|does not accept option '(.+)'", text):
        return f"unknown key {found[1] or found[2]!r}"
    return text


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:\w+\.)*Literal\[([^\]]+)\]", r"one of \1", text)
    return text.replace(", one of", " or").replace(", NoneType", " or null")
