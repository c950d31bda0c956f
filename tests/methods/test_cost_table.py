"""The table of costs in ``docs/performance.md``: closed forms against what an update is counted to ask."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from world import SHAPE, Liking, World

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import evaluations  # noqa: E402
from counting import Asked  # noqa: E402
from evaluations import EXAMPLE, ROWS  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
OTHER = {"K": 2, "C": 2, "M": 3, "S": 1, "E": 3}


def world_of(name: str, numbers: dict[str, int], reward: Liking) -> World:
    """A world of a method with these numbers."""
    world = World(ROWS[name].method, prompts=4, each=2, **evaluations.settings(name, numbers, reward))
    if name == "DMD2":
        world.batch = replace(world.batch, real_x0=torch.randn(len(world.batch), *SHAPE))
    return world


def counted(name: str, numbers: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """What one update asks per sample, by column, and what the roles themselves counted."""
    world = world_of(name, numbers, Liking())
    asked, size = Asked(world.module), len(world.batch)
    world.update()
    return asked.per_sample(size), {role: count / size for role, count in world.roles.evaluations.items()}


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


@pytest.mark.parametrize("numbers", [EXAMPLE, OTHER], ids=["example", "other"])
@pytest.mark.parametrize("name", ROWS)
def test_closed_form_is_what_is_counted(name, numbers):
    found, own = counted(name, numbers)
    assert found == evaluations.expected(name, numbers)
    assert own == {role: found[role] for role in evaluations.ROLES if role in found}
    assert not evaluations.differs(name, numbers, found)


def test_page_has_the_table_that_the_command_prints():
    lines = (evaluations.line(name, EXAMPLE, evaluations.expected(name, EXAMPLE)) for name in ROWS)
    section = PAGE.read_text(encoding="utf-8").split("## Cost of every method")[1].split("\n## ")[0]
    documented = [line for line in section.splitlines() if line.startswith("|")]
    assert documented == list(evaluations.table(lines))


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluations.py", *arguments])
    return evaluations.main()


def test_command_counts_real_updates_and_writes_its_table(monkeypatch, tmp_path, capsys):
    file, smaller = tmp_path / "table.md", ("--methods", "ReFL", "--steps", "2", "--updates", "1")
    assert run(monkeypatch, *smaller, "--output", str(file)) == 0
    assert file.read_text() in capsys.readouterr().out
    assert file.read_text().splitlines()[2:] == ["| ReFL | `K` = 2 | 0 | 0 | 0 | 2 | 0.27 | 1 | 1 |"]


def test_command_fails_where_a_count_differs_from_its_closed_form(monkeypatch, capsys):
    wrong = replace(ROWS["ReFL"], evaluations={"generator": "K + 1"})
    monkeypatch.setitem(ROWS, "ReFL", wrong)
    assert run(monkeypatch, "--methods", "ReFL", "--steps", "2", "--updates", "1") == 1
    assert "`K + 1` = 3, **counted 2**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--methods", "DMD3"), "no row begins with DMD3"), (("--steps", "0"), "all numbers must be at least 1")],
)
def test_command_refuses_what_it_cannot_count(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
