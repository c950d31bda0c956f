"""Report what training a configuration needs per GPU, before anything is downloaded, and which options save memory.

Parameters are counted and one update is followed without weights, on torch's meta device.
"""

from __future__ import annotations

import argparse

from gdmd_lightning.configuration.configs import fit_arguments
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.errors import UserError
from gdmd_lightning.ranges import Positive


def main(arguments: list[str]) -> int:
    """``plan``; all arguments it does not know are those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="gdmd_lightning plan",
        description=__doc__,
        epilog="All other arguments are those of fit: --config shapes.yaml --model.memory.vae_slicing=true ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu_memory", type=float, default=24.0, metavar="GIB", help="memory of one GPU (24)")
    options, rest = parser.parse_known_args(arguments)
    check_options(options, gpu_memory=Positive)
    if not rest:
        raise UserError("no configuration to plan", remedy="plan --config shapes.yaml")
    fit_arguments(rest, "plan")
    from gdmd_lightning.configuration.training import parse
    from gdmd_lightning.planning.report import GIB, batch_line, plan_of_settings, savings, table

    settings = parse(rest, "plan")
    found, strategy = plan_of_settings(settings)
    print(
        "\n".join(
            [batch_line(settings, strategy.ranks), *([strategy.words] if strategy.words else []), "", table(found)]
        )
    )
    left = options.gpu_memory - found.total / GIB
    if left >= 0:
        print(f"\nfits in {options.gpu_memory:g} GiB: yes, with {left:.2f} GiB to spare")
        return 0
    print(
        f"\nfits in {options.gpu_memory:g} GiB: no, {-left:.2f} GiB short. Each of these alone would save "
        "(each takes seconds):",
        flush=True,
    )
    for saving in savings(rest, settings, found, int(options.gpu_memory * GIB)):
        print(f"{(found.total - saving.total) / GIB:>9.2f} GiB  {' '.join(saving.arguments)}", flush=True)
    return 0
