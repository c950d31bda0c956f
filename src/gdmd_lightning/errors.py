"""Errors that a person can act on: what was wrong, where, and what would be right."""


class UserError(Exception):
    """A mistake in what the user gave us, told in one line.

    The command line prints it without a traceback (``--debug`` keeps it) and exits with status 2.

    Args:
        what: What was wrong, naming the offending value.
        where: The file, option, row or component at fault.
        remedy: What would be right.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            line = f"{line}; {self.remedy}"
        return " ".join(line.split())
