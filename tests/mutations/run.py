"""Apply each one-line error of ``mutations.py`` to a copy of ``src/`` and see that its tests fail.

Slow tests run only where the fast ones do not notice it; see before that they pass without any error.

Usage: ``python tests/mutations/run.py [--list] [--jobs N] [part of a name ...]``. The working tree is never changed.
The heavy libraries are imported once; each error is tested in a fork of this process.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from mutations import MUTATIONS, Mutation  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Check that the tests notice one-line errors.")
    parser.add_argument("names", nargs="*", help="parts of names; all errors if there is none")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--jobs", type=int, default=1, help="errors tested at once")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or any(name in m.name for name in options.names)]
    stale = [m.name for m in chosen if (ROOT / "src/gdmd_lightning" / m.file).read_text().count(m.old) != 1]
    if stale:
        print("The old text is not found exactly once:", *stale, sep="\n  ")
        return 2
    if options.list:
        print(*(f"{m.name}  ({m.file})" for m in chosen), sep="\n")
        return 0
    _import_libraries()
    return _report(_run([None, *chosen], options.jobs))


def _import_libraries() -> None:
    import diffusers  # noqa: F401
    import jsonargparse  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline  # noqa: F401

    torch.set_num_threads(1)


def _run(chosen: list[Mutation | None], jobs: int) -> dict[str, int]:
    """Exit status of the tests by name; without any error under ``""``."""
    waiting, running, found = list(chosen), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop(0)
            place = Path(tempfile.mkdtemp(prefix="mutation-"))
            child = os.fork()
            if child == 0:
                _child(mutation, place)
            running[child] = (mutation, place, time.monotonic())
        child, status = os.waitpid(-1, 0)
        mutation, place, start = running.pop(child)
        name = "" if mutation is None else mutation.name
        found[name] = os.waitstatus_to_exitcode(status)
        words = {0: "passed", 1: "failed"}.get(found[name], f"stopped with {found[name]}")
        print(f"{time.monotonic() - start:5.1f} s  tests {words}: {name or 'no error'}", flush=True)
        if not name and found[name] != 0:
            print((place / "output").read_text()[-3000:])
        shutil.rmtree(place)
    return found


def _child(mutation: Mutation | None, place: Path) -> None:
    """Run the tests on a copy of the sources and leave this process."""
    import signal

    import pytest

    signal.alarm(TIMEOUT * (10 if mutation is None else 1))  # an endless loop is noticed too
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "configs").symlink_to(ROOT / "configs")
    if mutation is not None:
        file = place / "src/gdmd_lightning" / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
    tests = sorted({test for m in MUTATIONS for test in m.tests}) if mutation is None else mutation.tests
    sys.path.insert(0, str(place / "src"))
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(place / "src")
    os.chdir(ROOT)
    output = os.open(place / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--basetemp={place / 'tmp'}"]
    for speed in ("not slow",) if mutation is None else ("not slow", "slow"):
        status = pytest.main([*arguments, "-m", speed, *(f"tests/{test}" for test in tests)])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            break
        status = pytest.ExitCode.OK
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))  # slow is not yet noticed
        signal.alarm(5 * TIMEOUT)
    sys.stdout.flush()
    os._exit(int(status))


def _report(found: dict[str, int]) -> int:
    clean = found.pop("")
    if clean != 0:
        print("The tests fail without any error; mend them first.")
        return 2
    survived = [name for name, status in found.items() if status == 0]
    # 2 is an error while tests are collected: the code does not even import, so it proves nothing.
    broken = [name for name, status in found.items() if status not in (0, 1) and status >= 0]
    print(f"{len(found) - len(survived) - len(broken)} of {len(found)} errors are noticed.")
    for title, names in (("Not noticed:", survived), ("Do not run:", broken)):
        if names:
            print(title, *names, sep="\n  ")
    return 1 if survived or broken else 0


if __name__ == "__main__":
    sys.exit(main())
