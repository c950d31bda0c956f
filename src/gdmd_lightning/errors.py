"""Errors that a user can act on: what is wrong, where, and how to fix it."""


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
