"""The comparison of methods on the embedded pipeline, in a few updates."""

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from gdmd_lightning.callbacks.evaluation_budget import EvaluationBudget
from gdmd_lightning.cli import _signals_raise, main
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.studies import arms, timed_checkpoint
from gdmd_lightning.studies.arms import Arm, Run, run_arm
from gdmd_lightning.studies.comparison import Comparison, Start
from gdmd_lightning.studies.recorded import settings_of
from gdmd_lightning.studies.scorecards import Row, Scorecard, TrainingCost, read_scorecard, write_scorecard
from gdmd_lightning.studies.watch import Watch

# With these, an update of DMD takes 44 evaluations and one of GDMD 84.
CHEAP = ["--data.batch_size=8", "--data.group_size=4", "--model.matching.fake_score_updates=1"]
SMALL = {
    "count": 6,
    "watch": {"per_task": 1, "samples": 2},
    "start": {"evaluations": 40},
    "evaluations": 120,
    "points": 2,
    "seeds": [0],
    "fit": CHEAP,
}


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """``compare(seeds=[0, 1])`` runs a small comparison with these settings changed; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(**changes: object) -> str:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
        main(["compare", "--config", "compare_shapes.yaml", "--config", "small.yaml"])
        return capsys.readouterr().out

    return run


def rows(path: Path, count: int = 6) -> tuple[Row, ...]:
    return read_scorecard(path, prompts="shapes", count=count).rows


def shapes(path: Path) -> float:
    return rows(path)[0].scores["shapes/overall"].mean


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compare_pairs_methods_by_seed_at_equal_evaluations_and_resumes(compare, tmp_path):
    printed = compare(seeds=[0, 1])
    out = tmp_path / "runs" / "compare"
    report = (out / "results.md").read_text()
    assert report in printed
    for name in ("dmd", "gdmd"):
        for seed in (0, 1):
            costs = [rows(out / f"seed{seed}" / name / f"scores_{budget}.json")[0].training for budget in (60, 120)]
            for cost, budget in zip(costs, (60, 120), strict=True):
                assert budget <= cost.evaluations < budget + cost.evaluations / cost.updates
            assert costs[0].seconds < costs[1].seconds
    line = re.search(r"^\| GDMD \|.*", report, re.MULTILINE)[0].split("|")
    above_teacher, above_dmd = (float(cell.split("±")[0]) for cell in (line[11], line[12]))
    dmd, gdmd = ([shapes(out / f"seed{s}" / name / "scores_120.json") for s in (0, 1)] for name in ("dmd", "gdmd"))
    assert abs(above_dmd - sum(b - a for a, b in zip(dmd, gdmd, strict=True)) / 2) < 6e-4
    assert abs(above_teacher - (sum(gdmd) / 2 - shapes(out / "teacher.json"))) < 6e-4
    entries = json.loads((out / "scores.json").read_text())
    assert len(entries) == 3 + 2 + 2 * 2 * 2  # teachers, starts, methods x seeds x points
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    assert compare(seeds=[0, 1]).endswith(report + f"\npage: {Path('runs/compare/index.html')}\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")} == checkpoints


class Napping(Comparison):
    """Seeds that take ten seconds and leave a file when they begin."""

    def _seed(self, seed):
        (self.out / f"begun{seed}").touch()
        time.sleep(10)
        (self.out / f"ended{seed}").touch()
        yield ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_of_compare_in_processes_ends_running_seeds_and_begins_no_others(tmp_path, number):
    def begun():
        return {path.name for path in tmp_path.iterdir()}

    def stop():
        while begun() != {"begun0", "begun1"}:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    arm = Arm(["shapes.yaml", "shapes_dmd.yaml"])
    comparison = Napping({"DMD": arm}, Start(arm, 40), 60, out=tmp_path, seeds=[0, 1, 2, 3, 4], processes=2)
    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    with pytest.raises(KeyboardInterrupt), _signals_raise():
        list(comparison.train_and_score())
    stopping.join()
    assert begun() == {"begun0", "begun1"}


class Outside(HTMLParser):
    """Collects what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.found += [value for value in values if not value.startswith(("data:", "#"))]


@pytest.mark.parametrize("teacher", ["tiny", pytest.param("of Shapes", marks=pytest.mark.slow)])
def test_compare_continues_with_a_larger_budget_in_a_moved_directory_and_writes_a_page(
    compare, tmp_path, tiny_pipeline, monkeypatch, teacher
):
    fit = [*CHEAP, *([f"--model.family.path={tiny_pipeline}"] if teacher == "tiny" else [])]
    methods = {"DMD": {"configs": ["shapes.yaml", "shapes_dmd.yaml"]}}
    only = {"methods": methods, "evaluations": 60, "points": 1, "fit": fit}
    with monkeypatch.context() as patched:  # only the last page is read
        patched.setattr(Comparison, "report", lambda comparison: "")
        compare(**only)
        (tmp_path / "runs" / "compare").rename(tmp_path / "moved")
        compare(**{**only, "evaluations": 120, "points": 2, "out": "moved"})
    directory = tmp_path / "moved" / "seed0" / "dmd"
    (checkpoint,) = (directory / "checkpoints").iterdir()
    assert checkpoint.name == "last.ckpt"
    (before,) = rows(directory / "scores_120.json")
    assert read_checkpoint(str(checkpoint), in_memory=False)["global_step"] == before.training.updates == 3
    # Interrupted between training and scoring, it scores what was trained and still knows the cost.
    (directory / "scores_120.json").unlink()
    compare(**{**only, "evaluations": 120, "points": 2, "out": "moved"})
    (after,) = rows(directory / "scores_120.json")
    assert (after.scores, after.watched, after.training) == (before.scores, before.watched, before.training)
    page = Outside()
    text = (tmp_path / "moved" / "index.html").read_text()
    page.feed(text)
    assert page.found == []
    assert "script" not in page.tags
    assert text.count("<svg") == 3
    assert "DMD, graded reward: " in text


class Killed(BaseException):
    """Ends a training as SIGKILL would: nothing is saved."""


@pytest.fixture
def clock(monkeypatch):
    """A list of the seconds so far; an update takes a thousand, a save at an interval a million."""
    now, save = [0.0], timed_checkpoint.TimedCheckpoint._save_checkpoint
    for module in (arms, timed_checkpoint):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_save(keeper, *args):
        save(keeper, *args)
        now[0] += 1e6

    monkeypatch.setattr(timed_checkpoint.TimedCheckpoint, "_save_checkpoint", slow_save)
    monkeypatch.setattr(timed_checkpoint, "EVERY", 0.0)
    return now


def trained(run, clock, monkeypatch, killed_after=None):
    """The cost of training to 200 evaluations, in at least four updates; a kill loses the last of those done."""
    check, updates = EvaluationBudget.on_train_batch_end, []

    def update(budget, *args):
        clock[0] += 1e3
        updates.append(1)
        if len(updates) == killed_after:
            raise Killed
        check(budget, *args)

    with monkeypatch.context() as patched:
        patched.setattr(EvaluationBudget, "on_train_batch_end", update)
        return arms._train(run, 200, None)


def test_an_arm_that_is_killed_continues_to_the_bit_and_counts_all_seconds(tmp_path, tiny_pipeline, monkeypatch, clock):
    extra = (*CHEAP, f"--model.family.path={tiny_pipeline}")
    whole, parts = (Run("DMD", arms.DMD, tmp_path / name, 0, extra=extra) for name in ("whole", "parts"))
    cost = trained(whole, clock, monkeypatch)
    assert cost.updates > 3
    assert cost.seconds == 1e3 * cost.updates
    for kill in (3, 2):  # updates 1 and 2, then 3, are kept
        with pytest.raises(Killed):
            trained(parts, clock, monkeypatch, kill)
    assert trained(parts, clock, monkeypatch) == cost
    expected, found = (read_checkpoint(str(run.checkpoint))["state_dict"] for run in (whole, parts))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_seconds_of_an_arm_that_an_earlier_version_left_unfinished_are_unknown(
    tmp_path, tiny_pipeline, monkeypatch, clock
):
    run = Run("DMD", arms.DMD, tmp_path / "run", 0, extra=(*CHEAP, f"--model.family.path={tiny_pipeline}"))
    with pytest.raises(Killed):
        trained(run, clock, monkeypatch, 2)
    there = torch.load(run.checkpoint, weights_only=True)
    torch.save({**there, "callbacks": {}}, run.checkpoint)
    with pytest.raises(Killed):  # what it continues is unknown, too
        trained(run, clock, monkeypatch, 3)
    assert trained(run, clock, monkeypatch).seconds is None


@pytest.fixture
def right_arms(monkeypatch) -> None:
    """Methods are not parsed before anything else is checked."""
    monkeypatch.setattr(Arm, "check", lambda *_: None)


@pytest.fixture
def finished(tmp_path, right_arms) -> None:
    """A finished comparison in the default directory, scored on 1200 prompts."""
    scores = {f"{name}/overall": Interval(0.5, 0.4, 0.6) for name in ("geneval", "shapes", "hps_like")}
    row = Row("DMD", 4, 0.01, scores, {}, TrainingCost(2, 200, 1.0))
    for place, evaluations in (("start", 40), ("dmd", 120)):
        run = tmp_path / "runs" / "compare" / "seed0" / place
        write_scorecard(Scorecard("shapes", 1200, (row,)), run / f"scores_{evaluations}.json")
        (run / "checkpoints").mkdir()
        provenance = {"updates": 2, "evaluations": 200}
        torch.save({"state_dict": {}, "provenance": provenance}, run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"points": 1, "evaluations": 60}, "last.ckpt: trained for 200 network evaluations; 60 requested"),
        ({"start": {"evaluations": 50}}, "start from a start of another length"),
        ({"count": 12}, ".json: scored with count 1200; count 12 requested"),
    ],
)
def test_compare_refuses_a_directory_of_another_comparison(finished, complaint, tmp_path, changed, expected):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, "count": 1200, **changed}))
    line = complaint("compare", "--config", "compare_shapes.yaml", "--config", "small.yaml")
    assert expected in line
    assert "use another --out" in line


GDMD = Arm(["shapes.yaml"], {"model.lambda_policy": 2})
BEGUN = Comparison({"DMD": GDMD}, Start(GDMD, 40), 120, points=1, seeds=[0], watch=Watch(1, 2))


@pytest.fixture
def begun(tmp_path, right_arms, monkeypatch) -> Comparison:
    """A comparison whose first start is trained and which was stopped while it trained a method."""
    comparison = replace(BEGUN, out=tmp_path / "out")

    def train(run, budget, seconds):
        run.checkpoint.parent.mkdir(parents=True)
        provenance = {"updates": 1, "evaluations": 44}
        torch.save({"state_dict": {}, "provenance": provenance}, run.checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "_train", train)
    for run in (comparison.start_of(0), comparison.run_of("DMD", 0)):
        with pytest.raises(KeyboardInterrupt):
            run_arm(run, [40], comparison.scored_on, comparison.count, comparison.watch)
    return comparison


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"methods": {"DMD": Arm(GDMD.configs, {"model.lambda_policy": 50})}},
            "DMD: model.lambda_policy is 50.0 (was 2.0)",
        ),
        ({"watch": Watch(1, 3)}, "start: watch.samples is 3 (was 2)"),
        ({"fit": ["--data.batch_size=8"], "seeds": [1]}, "start: data.batch_size is 8 (was 64)"),
    ],
    ids=["method", "watch", "fit, for another seed"],
)
def test_compare_refuses_other_settings_than_a_run_has_begun_with(begun, changes, expected):
    with pytest.raises(UserError, match=re.escape(f"{expected} in {begun.out}; use another --out")):
        replace(begun, **changes).check()


def test_compare_continues_with_more_evaluations_seeds_and_methods(begun):
    methods = {**begun.methods, "other": Arm(["shapes.yaml", "shapes_dmd.yaml"])}
    replace(begun, methods=methods, evaluations=240, points=2, seeds=[0, 1]).check()


@pytest.mark.parametrize(
    ("added", "value"),
    [
        ("model.kl_reference", "start"),
        ("model.nft.old_decay.limit", 0.4),
        ("model.family.use_t5", False),
        ("model.sampler.eta", 0.5),
        ("data.shuffle_buffer", 10),
        ("trainer.detect_anomaly", True),
        ("watch.samples", 3),
    ],
)
def test_a_setting_that_was_added_since_was_at_its_default(begun, tmp_path, added, value):
    """It continues a directory of an earlier version, and no other value does."""
    arm = Arm(["shapes.yaml", "shapes_nft.yaml"], {"model.sampler": "CPS"})
    begun = replace(begun, methods={"NFT": arm}, control="NFT", watch=Watch())
    run = begun.run_of("NFT", 0)
    with pytest.raises(KeyboardInterrupt):
        run_arm(run, [40], begun.scored_on, begun.count, begun.watch)
    shutil.rmtree(begun.start_of(0).directory)
    recorded = json.loads(settings_of(run.directory).read_text())
    default = recorded.pop(added)
    settings_of(run.directory).write_text(json.dumps(recorded))
    begun.check()
    if added == "watch.samples":
        other = replace(begun, watch=Watch(samples=value))
    else:
        other = replace(begun, methods={"NFT": replace(arm, fit={**arm.fit, added: value})})
    with pytest.raises(UserError, match=re.escape(f"NFT: {added} is {value!r} (was {default!r}) in")):
        other.check()


def test_compare_takes_runs_without_recorded_settings_as_they_are(begun):
    """An earlier version recorded none, so they cannot be known later either."""
    run = begun.run_of("DMD", 0)
    settings_of(run.directory).unlink()
    changed = replace(run, arm=Arm(GDMD.configs, {"model.lambda_policy": 50}))
    replace(begun, methods={"DMD": changed.arm}).check()
    with pytest.raises(FileExistsError):
        run_arm(changed, [40], begun.scored_on, begun.count, begun.watch)
    assert not settings_of(run.directory).exists()


def test_compare_forgets_settings_with_which_nothing_was_trained(begun):
    run = begun.run_of("DMD", 0)
    shutil.rmtree(run.checkpoint.parent)
    changed = replace(begun, methods={"DMD": Arm(GDMD.configs, {"model.lambda_policy": 50})})
    changed.check()
    with pytest.raises(KeyboardInterrupt):
        run_arm(changed.run_of("DMD", 0), [40], begun.scored_on, begun.count, begun.watch)
    assert json.loads(settings_of(run.directory).read_text())["model.lambda_policy"] == 50


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("--points=0", "--points: it is 0; use an integer of at least 1"),
        ("--evaluations=-5", "--evaluations: it is -5"),
        ("--start.evaluations=0", "--start.evaluations: it is 0"),
        ("--seeds=[1,1]", "seeds: they are [1, 1]; give each seed once"),
        ("--control=GDDM", "control: 'GDDM' is not a method; use one of: DMD, GDMD"),
        ("--task=cats", "task: unknown task 'cats'; use one of: shapes"),
        ('--methods={"DMD":{"configs":["shapes.yaml"],"fit":{"model.lambda":1}}}', "DMD: "),
        ('--methods={"DMD":{"configs":["shapes.yml"]}}', "no configuration 'shapes.yml'"),
        ('--methods={"DMD":{"configs":["shapes.yaml"]},"dmd":{"configs":["shapes.yaml"]}}', "methods: 'dmd' has the"),
        ('--methods={"Start":{"configs":["shapes.yaml"]}}', "control: 'DMD' is not a method"),
        ("--methods={}", "methods: there are none"),
        (
            '--methods={"DMD":{"configs":["shapes.yaml"],"fit":{"data.batch_size":6}}}',
            "DMD: data.group_size: group_size 4 does not divide batch_size 6",
        ),
        (
            '--methods={"DMD":{"configs":["shapes.yaml","shapes_dmdr.yaml"],"fit":{"model.reward":"ShapesReward"}}}',
            "DMD: model.reward: 'shapes' is not differentiable",
        ),
        (
            '--methods={"DMD":{"configs":["shapes.yaml","shapes_nft.yaml"],"fit":{"data.group_size":1}}}',
            "DMD: data.group_size: it is 1, but DiffusionNFT compares the samples of a prompt",
        ),
        ('--methods={"DMD":{"configs":["shapes.yaml"],"fit":{"model.height":64}}}', "DMD: it makes pictures of 64x32"),
        ('--fit=["--data.group_size=5"]', "start: data.group_size: group_size 5 does not divide"),
    ],
)
def test_compare_refuses_wrong_settings_before_training(complaint, setting, expected, monkeypatch):
    monkeypatch.setattr(Comparison, "train_and_score", lambda _: pytest.fail("it would have trained"))
    assert expected in complaint("compare", "--config", "compare_shapes.yaml", setting)


def test_compare_refuses_a_wrong_count_before_training(complaint, right_arms):
    assert "evaluation count: 7 prompts" in complaint("compare", "--config", "compare_shapes.yaml", "--count=7")
