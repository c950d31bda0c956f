"""Directories that belong to one process, or to one command: locks, and marks of what a command wrote."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from gdmd_lightning.errors import UserError, WriteError
from gdmd_lightning.files import write_atomically

LOCK = ".lock"
MARK = ".gdmd_lightning.json"
PROGRAM = "gdmd_lightning"


class DirectoryLock:
    """Reserves a directory for this process; the kernel ends it with the process, so no lock is ever stale.

    Args:
        directory: The directory; created if it is missing.

    Raises:
        UserError: If another process, or another run in this one, has reserved it.
        WriteError: If it cannot be created or written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = self._reserve(directory / LOCK)

    def _reserve(self, path: Path) -> IO[str]:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                reason = f"cannot be written: {error.strerror}"
                raise WriteError(reason, where=str(path.parent), remedy="give another directory") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    file.close()
                    raise UserError(
                        f"another run writes to this directory (process {holder})",
                        where=str(path.parent),
                        remedy="wait until it ends, or use another directory",
                    ) from error
                # Some network file systems have no locks; a run there is not protected, but it works.
            with suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()  # the previous owner removed it between open and lock
        with suppress(OSError):
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}\n")
            file.flush()
        return file

    def release(self) -> None:
        """Give the directory back, and remove it if nothing was written to it."""
        if self._file.closed:
            return
        with suppress(OSError):
            (self.directory / LOCK).unlink()
            self.directory.rmdir()  # fails if there is something in it
        self._file.close()


def claim(directory: Path, command: str, entries: tuple[str, ...]) -> None:
    """Empty a directory for a command that writes ``entries`` into it, and mark it as the command's.

    Only entries that the mark of an earlier run lists are deleted.

    Args:
        directory: The directory; may be missing.
        command: The command.
        entries: Names of the files and directories that it will write.

    Raises:
        UserError: If the directory has content but no mark of this command, or an entry that the mark does not list.
        WriteError: If it cannot be written to.
    """
    earlier = _marked(directory, command)
    present = [path for path in directory.iterdir() if path.name != LOCK] if directory.exists() else []
    foreign = present if earlier is None else [p for p in present if p.name in entries and p.name not in earlier]
    if foreign:
        raise UserError(
            f"it has files that {command} did not write, such as {min(path.name for path in foreign)}",
            where=str(directory),
            remedy="give another --out, or remove them",
        )
    for name in earlier or ():
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    content = {"program": PROGRAM, "command": command, "entries": list(entries)}
    write_atomically(directory / MARK, json.dumps(content) + "\n")


def _marked(directory: Path, command: str) -> tuple[str, ...] | None:
    """The entries that a command's mark lists, or None without such a mark."""
    try:
        content = json.loads((directory / MARK).read_text(encoding="utf-8"))
        names = tuple(str(name) for name in content["entries"])
        ours = content["program"] == PROGRAM and content["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A path instead of a name could point outside the directory.
    plain = all(name not in ("", ".", "..") and Path(name).name == name for name in names)
    return names if ours and plain else None
