"""What an update of every method costs, counted next to the closed form; exits with status 1 if any cell differs.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/evaluations.py [--methods DMD GDMD] [--steps K] [--fake_score_updates C]
    [--targets M] [--trained_steps S] [--inner_epochs E] [--output table.md]

Each method trains in Lightning on a tiny Stable Diffusion 3 pipeline with random weights: full weights, a guided
teacher, 2 samples per prompt, as many prompts as steps, no micro-batches. Hooks on the networks count evaluations of
single latents by role; decodings and rewards are counted where the decoder and the reward are called. All is per sample
and update, with each method's own defaults except for the numbers above.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from counting import Asked
from random_teachers import Brightness, train, write_pipeline

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.samplers import CPS

Numbers = Mapping[str, int]
"""``K`` steps, ``C`` fake-score updates, ``M`` targets, ``S`` trained steps of RTDMD, ``E`` inner epochs."""
EXAMPLE: Numbers = {"K": 4, "C": 3, "M": 2, "S": 2, "E": 1}
ROLES = ("generator", "teacher", "fake_score", "old")
GROUP = 2
"""Samples per prompt."""
ROLLOUT = "(K + 1) / 2"
"""Of the generator per sample: backward simulation to evenly covered levels, and the step with gradient."""


@dataclass(frozen=True)
class Row:
    """A method and what it costs per sample and update.

    Args:
        method: The method.
        evaluations: Formulas in the letters of :data:`Numbers`, by role; roles that are never asked are left out.
        judged: Formula of the pictures decoded, each of which is judged.
        options: Settings of the method for the numbers.
    """

    method: type[DistillationModule]
    evaluations: Mapping[str, str]
    judged: str = "0"
    options: Callable[[Numbers], dict[str, Any]] = lambda numbers: {}

    def formulas(self) -> dict[str, str]:
        """All of them, by column."""
        return {**self.evaluations, "decodings": self.judged, "rewards": self.judged}


def _gdmd(policy: Policy, generator: str = ROLLOUT, **old: str) -> Row:
    def options(numbers: Numbers) -> dict[str, Any]:
        return {"targets": TargetGroup(numbers["M"]), "policy": policy}

    return Row(GDMD, {"generator": generator, "teacher": "2 M", "fake_score": "M + C", **old}, "M", options)


MATCHING = {"generator": ROLLOUT, "teacher": "2", "fake_score": "1 + C"}
ROWS = {
    "DMD": Row(DMD, MATCHING),
    "DMD2": Row(DMD2, {**MATCHING, "fake_score": "2 + 3 C"}, options=lambda n: {"images": ShapesImages()}),
    "GDMD, `policy.form: weighted`": _gdmd(Policy(form="weighted")),
    "GDMD, `policy.at: state`": _gdmd(Policy(at="state"), old="1"),
    "GDMD, `policy.at: target`": _gdmd(Policy(at="target"), f"{ROLLOUT} + M", old="M"),
    "GNDM": Row(GNDM, MATCHING),
    "GNDMR": Row(GNDMR, {**MATCHING, "generator": f"{ROLLOUT} + 1", "old": "1"}, "1"),
    "AC-DMD": Row(ACDMD, {**MATCHING, "fake_score": "1 + 3 C"}),
    "DMDR, `joint: refl`": Row(DMDR, MATCHING, "1", lambda n: {"joint": "refl"}),
    "DMDR, `joint: grpo`": Row(
        DMDR, {**MATCHING, "generator": f"{ROLLOUT} + 2 K - 1"}, "1", lambda n: {"joint": "grpo"}
    ),
    "DMDR, `joint: nft`": Row(
        DMDR, {**MATCHING, "generator": f"{ROLLOUT} + K", "old": "2 K"}, "1", lambda n: {"joint": "nft"}
    ),
    "RTDMD": Row(
        RTDMD,
        {"generator": "K + S + 1", "teacher": "2", "fake_score": "1 + 3 C"},
        "2",
        lambda n: {"grpo": GRPO(CPS(), clip=1e-5, log_prob="squared_error", train_steps=n["S"])},
    ),
    "ReFL": Row(ReFL, {"generator": "K"}, "1"),
    "Flow-GRPO": Row(
        FlowGRPO,
        {"generator": "K + E (K - 1)", "teacher": "E (K - 1)"},
        "1",
        lambda n: {"inner_epochs": n["E"]},
    ),
    "DiffusionNFT": Row(
        DiffusionNFT,
        {"generator": "E K", "teacher": "E K", "old": "K + E K"},
        "1",
        lambda n: {"inner_epochs": n["E"]},
    ),
}
HEAD = ("method", "generator", "teacher", "fake score", "old", "all networks", "DMD = 1", "decodings", "rewards")


def value(formula: str, numbers: Numbers) -> float:
    """A formula such as ``(K + 1) / 2 + 5 M``, with multiplication written as a space."""
    return float(eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula), {}, dict(numbers)))


def expected(name: str, numbers: Numbers) -> dict[str, float]:
    """The closed forms of a method as numbers, by column."""
    return {column: value(formula, numbers) for column, formula in ROWS[name].formulas().items()}


def networks(costs: Mapping[str, float]) -> float:
    """Evaluations of all networks together."""
    return sum(costs.get(role, 0.0) for role in ROLES)


def settings(name: str, numbers: Numbers, reward: Reward) -> dict[str, Any]:
    """What the method is built with, except its family and the size of pictures."""
    method = ROWS[name].method
    found = ROWS[name].options(numbers) | {"steps": numbers["K"]}
    if issubclass(method, MatchingModule):
        interval = "step" if method in (ACDMD, RTDMD) else "whole"
        found["matching"] = Matching(guidance_scale=2.5, fake_score_updates=numbers["C"], interval=interval)
    if method not in (DMD, DMD2, GNDM, ACDMD):
        found["reward"] = reward
    return found


class Counting(pl.Callback):
    """Counts from the first update on."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.asked = Asked(module)


def counted(name: str, numbers: Numbers, pipeline: Path, updates: int) -> dict[str, float]:
    """What real updates on a pipeline ask, per sample and update."""
    family = SD3Family(str(pipeline), max_sequence_length=0)
    module = ROWS[name].method(family, height=32, width=32, **settings(name, numbers, Brightness()))
    counting, samples = Counting(), GROUP * numbers["K"]
    train(module, updates, samples, GROUP, counting)
    return counting.asked.per_sample(updates * samples)


def line(name: str, numbers: Numbers, costs: Mapping[str, float]) -> str:
    """A method's line of the table: each closed form, and what was counted instead where it differs."""
    formulas, closed = ROWS[name].formulas(), expected(name, numbers)

    def cell(column: str) -> str:
        formula, found = formulas.get(column, "0"), costs.get(column, 0.0)
        if found != closed.get(column, 0.0):
            return f"`{formula}` = {closed.get(column, 0.0):g}, **counted {found:g}**"
        return formula if formula.isdigit() else f"`{formula}` = {found:g}"

    total = networks(costs)
    relative = total / networks(expected("DMD", numbers))
    cells = [name, *map(cell, ROLES), f"{total:g}", f"{relative:.2f}", cell("decodings"), cell("rewards")]
    return f"| {' | '.join(cells)} |"


def differs(name: str, numbers: Numbers, costs: Mapping[str, float]) -> bool:
    """Whether any count is not the closed form."""
    closed = expected(name, numbers)
    return any(costs.get(column, 0.0) != closed.get(column, 0.0) for column in costs.keys() | closed.keys())


def table(lines: Iterator[str]) -> Iterator[str]:
    """Lines below their head."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    yield from lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="first words of rows, such as DMD GDMD; all")
    parser.add_argument("--steps", dest="K", type=int, default=EXAMPLE["K"], help="steps of the generator")
    parser.add_argument("--fake_score_updates", dest="C", type=int, default=EXAMPLE["C"])
    parser.add_argument("--targets", dest="M", type=int, default=EXAMPLE["M"], help="of GDMD, per sample")
    parser.add_argument("--trained_steps", dest="S", type=int, default=EXAMPLE["S"], help="of RTDMD")
    parser.add_argument("--inner_epochs", dest="E", type=int, default=EXAMPLE["E"], help="of Flow-GRPO, DiffusionNFT")
    parser.add_argument("--updates", type=int, default=2, help="updates that are counted")
    parser.add_argument("--output", type=Path, help="file to write the table to, as Markdown")
    options = parser.parse_args()
    numbers = {letter: getattr(options, letter) for letter in EXAMPLE}
    if min(*numbers.values(), options.updates) < 1:
        parser.error("all numbers must be at least 1")
    names = [name for name in ROWS if not options.methods or name.split(",")[0] in options.methods]
    if unknown := set(options.methods or ()) - {name.split(",")[0] for name in ROWS}:
        parser.error(f"--methods: no row begins with {', '.join(sorted(unknown))}")
    wrong: list[str] = []

    def lines(pipeline: Path) -> Iterator[str]:
        for name in names:
            costs = counted(name, numbers, pipeline, options.updates)
            if differs(name, numbers, costs):
                wrong.append(name)
            yield line(name, numbers, costs)

    printed: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for each in table(lines(write_pipeline(Path(directory), 1, 1))):
                print(each, flush=True)
                printed.append(each)
        except UserError as error:
            parser.error(str(error))
    if options.output is not None:
        options.output.write_text("\n".join(printed) + "\n", encoding="utf-8")
    print(f"\n{len(names) - len(wrong)} of {len(names)} methods cost what the closed form says", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
