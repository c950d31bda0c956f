"""Errors that a user can act on: what is wrong, where, and how to fix it."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input from the user, with a message of one line.

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
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            line = f"{line}; {self.remedy}"
        return " ".join(line.split())

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
