"""Measure the demo (total time, time to the first step, peak memory) and the start-up of the command line.

.venv/bin/python benchmarks/demo.py [arguments of demo]
"""

import re
import resource
import subprocess
import sys
import time


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def command_line() -> None:
    module = (sys.executable, "-m", "gdmd_lightning")
    reference = min(seconds(sys.executable, "-c", "import lightning.pytorch.cli") for _ in range(3))
    print(f"import lightning.pytorch.cli: {reference:.2f} s")
    for arguments in (("--help",), ("fit", "--help"), ("fit", "--config", "shapes.yaml", "--print_config")):
        taken = min(seconds(*module, *arguments) for _ in range(3))
        print(f"{' '.join(arguments)}: {taken:.2f} s, {taken / reference:.2f} times the import")


def demo(arguments: list[str]) -> None:
    began, first, tail = time.perf_counter(), None, []
    bar = '--fit=["--trainer.callbacks+=TQDMProgressBar"]'  # a bar whose output is parsed below
    command = [sys.executable, "-u", "-m", "gdmd_lightning", "demo", bar, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while chunk := process.stdout.read1(4096):
        text = chunk.decode(errors="replace")
        tail.append(text)
        if first is None and re.search(r"[1-9]\d*/\d+ \[.*loss=", text):
            first = time.perf_counter() - began
    process.wait()
    whole = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print("".join(tail)[-4000:])
    print(f"\nstatus {process.returncode}; first step shown after {first or float('nan'):.1f} s; ", end="")
    print(f"{whole / 60:.2f} minutes; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    command_line()
    demo(sys.argv[1:])
