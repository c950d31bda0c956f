"""``fit``: train a generator; stops cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

from gdmd_lightning.callbacks.interruption import interrupted_checkpoint
from gdmd_lightning.configuration.training import run, signal_received


def main(arguments: list[str]) -> int:
    """``fit --config NAME ...``."""
    cli = run(arguments)
    number = signal_received(cli)
    if number:
        print(f"stopped by signal {number}; resume with --ckpt_path {interrupted_checkpoint(cli.trainer)}")
        return 128 + number
    return 0
