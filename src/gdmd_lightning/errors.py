"""Errors that a user can act on: what is wrong, where, and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 500
"""Characters of a message: a few lines of a terminal."""


class UserError(Exception):
    """Invalid input from the user, with a message of one line of at most :data:`LONGEST` characters.

    The command line prints it without a traceback (unless ``--debug`` is given) and exits with status 2.

    Args:
        what: What is wrong, including the invalid value.
        where: The file, option, row or component that is wrong.
        remedy: How to fix it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        where, what, remedy = (one_line(part) for part in (self.where, self.what, self.remedy))
        if len(_message(where, what, remedy)) > LONGEST:
            where = without_middle(where, 120)
            what, remedy = shortened(_short_values(what), 240), _short_values(remedy)
            remedy = shortened(remedy, LONGEST - len(_message(where, what, " ")) + 1)
        return _message(where, what, remedy)

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook too; IPython calls this."""
        return [f"error: {self}"]


class WriteError(UserError, OSError):
    """A file or directory could not be written: full disk, missing permission, wrong kind of path."""


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended a command early.

    Args:
        number: The signal's number; the command line exits with ``128 + number``.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


def one_line(text: object) -> str:
    """A text with each run of white space, and each character that does not print, as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters, cut between two words if it is longer."""
    if len(text) <= most:
        return text
    cut = text[: most - 3]
    # A single word may be longer than all that fits.
    words = cut[: cut.rfind(" ")] if " " in cut[most // 2 :] else cut[:-1]
    return f"{words.rstrip()} ..."


def without_middle(text: str, most: int) -> str:
    """A text of at most ``most`` characters; a longer one loses its middle: in a path both ends matter."""
    head = (most - 3) // 2
    return text if len(text) <= most else f"{text[:head]}...{text[len(text) - (most - 3 - head) :]}"


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names for a message: ``'a', 'b' and 297 more``; each is cut if it is long."""
    every = list(names)
    shown = [without_middle(repr(name), 40) for name in every[:most]]
    if not shown:
        return "none"
    rest = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(shown) + rest


def _message(where: str, what: str, remedy: str) -> str:
    line = f"{where}: {what}" if where else what
    return f"{line}; {remedy}" if remedy else line


def _short_values(text: str) -> str:
    """A text whose long words and long quoted values have lost their middles."""
    quoted = re.sub(r"(?<!\w)('[^']{80,}'|\"[^\"]{80,}\")(?!\w)", lambda found: without_middle(found[0], 80), text)
    return re.sub(r"\S{81,}", lambda found: without_middle(found[0], 80), quoted)
