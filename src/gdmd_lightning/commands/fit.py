"""``fit``: train a generator; stops cleanly on SIGINT, SIGTERM, SIGHUP and SLURM's warning."""

from __future__ import annotations

from gdmd_lightning.configuration.configs import fit_arguments


def main(arguments: list[str]) -> int:
    """``fit --config NAME ...``."""
    fit_arguments(arguments)  # fails before the imports, which take seconds
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    from gdmd_lightning.callbacks.interruption import interrupted_checkpoint
    from gdmd_lightning.configuration.lost_ranks import ending_with_launcher
    from gdmd_lightning.configuration.training import run, stopped_by

    with ending_with_launcher():
        cli = run(arguments)
    stop = stopped_by(cli)
    if not stop.received:
        return 0
    if not cli.trainer.is_global_zero and isinstance(cli.trainer.strategy.launcher, _SubprocessScriptLauncher):
        # Lightning kills the main process when one that it started ends with another status.
        return 0
    if cli.trainer.is_global_zero:
        if stop.stopped:
            resume = f"resume with --ckpt_path {interrupted_checkpoint(cli.trainer)}"
            print(f"stopped by signal {stop.received} after {cli.model.updates} updates; {resume}")
        else:
            print(f"signal {stop.received} came with the last update; the run is complete")
    return 128 + stop.received
