"""The table of costs in ``docs/performance.md`` against what one update of every method is counted to ask."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import SHAPE, Liking, World

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.advantages import TargetGroup
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
from gdmd_lightning.samplers import CPS

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
EXAMPLE = {"K": 4, "C": 3, "M": 2, "S": 2, "E": 1}
OTHER = {"K": 2, "C": 2, "M": 3, "S": 1, "E": 3}
ROWS = {
    "DMD": (DMD, lambda n: {}),
    "DMD2": (DMD2, lambda n: {"images": ShapesImages()}),
    "GDMD, `policy.form: weighted`": (
        GDMD,
        lambda n: {"targets": TargetGroup(n["M"]), "policy": Policy(form="weighted")},
    ),
    "GDMD, `policy.at: state`": (GDMD, lambda n: {"targets": TargetGroup(n["M"]), "policy": Policy(at="state")}),
    "GDMD, `policy.at: target`": (GDMD, lambda n: {"targets": TargetGroup(n["M"]), "policy": Policy(at="target")}),
    "GNDM": (GNDM, lambda n: {}),
    "GNDMR": (GNDMR, lambda n: {}),
    "AC-DMD": (ACDMD, lambda n: {}),
    "DMDR, `joint: refl`": (DMDR, lambda n: {"joint": "refl"}),
    "DMDR, `joint: grpo`": (DMDR, lambda n: {"joint": "grpo"}),
    "DMDR, `joint: nft`": (DMDR, lambda n: {"joint": "nft"}),
    "RTDMD": (
        RTDMD,
        lambda n: {"grpo": GRPO(CPS(), clip=1e-5, log_prob="squared_error", train_steps=n["S"])},
    ),
    "ReFL": (ReFL, lambda n: {}),
    "Flow-GRPO": (FlowGRPO, lambda n: {"inner_epochs": n["E"]}),
    "DiffusionNFT": (DiffusionNFT, lambda n: {"inner_epochs": n["E"]}),
}


def documented() -> dict[str, list[str]]:
    """Cells of the table by method: networks, decodings, rewards, networks relative to DMD."""
    section = PAGE.read_text(encoding="utf-8").split("## Cost of every method")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows[2:]}


def value(formula: str, numbers: dict[str, int]) -> float:
    """A cell such as `` `(K + 1) / 2 + 5 M` ``, with multiplication written as a space."""
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula.strip("`")), {}, numbers)


def world_of(name: str, numbers: dict[str, int], reward: Liking) -> World:
    """A world of a method with these numbers."""
    method, options = ROWS[name]
    more = options(numbers) | {"steps": numbers["K"]}
    if issubclass(method, MatchingModule):
        interval = "step" if method in (ACDMD, RTDMD) else "whole"
        more["matching"] = Matching(guidance_scale=2.5, fake_score_updates=numbers["C"], interval=interval)
    if method not in (DMD, DMD2, GNDM, ACDMD):
        more["reward"] = reward
    world = World(method, prompts=4, each=2, **more)
    if method is DMD2:
        world.batch = replace(world.batch, real_x0=torch.randn(len(world.batch), *SHAPE))
    return world


def counted(name: str, numbers: dict[str, int]) -> list[float]:
    """Networks, decodings and rewards per sample in one update."""
    reward = Liking()
    world = world_of(name, numbers, reward)
    decoded: list[int] = []
    decode = world.module.family.decode
    world.module.family.decode = lambda latents: decoded.append(len(latents)) or decode(latents)
    world.update()
    judged = sum(len(images) for images, _ in reward.asked)
    size = len(world.batch)
    return [world.roles.evaluations.total() / size, sum(decoded) / size, judged / size]


@pytest.mark.parametrize("name", ROWS)
def test_no_random_stream_is_drawn_from_twice_in_an_update(name, monkeypatch):
    world, asked = world_of(name, EXAMPLE, Liking()), []
    stream = world.module.stream

    def recorded(purpose, turn=0):
        asked.append((purpose, turn))
        return stream(purpose, turn)

    monkeypatch.setattr(world.module, "stream", recorded)
    world.update()
    assert asked
    assert len(asked) == len(set(asked)), asked


def test_every_method_has_a_row():
    assert set(documented()) == set(ROWS)


@pytest.mark.parametrize("numbers", [EXAMPLE, OTHER], ids=["example", "other"])
@pytest.mark.parametrize("name", ROWS)
def test_documented_cost_is_what_is_counted(name, numbers):
    *formulas, _ = documented()[name]
    assert counted(name, numbers) == [value(formula, numbers) for formula in formulas]


def test_relative_cost_is_that_of_the_example():
    table = documented()
    dmd = value(table["DMD"][0], EXAMPLE)
    for name, (networks, _, _, relative) in table.items():
        assert relative == f"{value(networks, EXAMPLE) / dmd:.2f}", name
