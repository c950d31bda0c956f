"""The benchmarks of scaling: fits that find known laws, closed forms that are counted, and both commands."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import tiny
from processes import run_ranks
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import predicting  # noqa: E402
import scaling  # noqa: E402

from gdmd_lightning.families.sd3 import SD3Family  # noqa: E402

ROW = scaling.Row(parameters=1000, flops=10**6, activations=4000, decoding=0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("scaling") / "pipeline")


def test_fit_finds_the_law_that_made_its_points():
    points = [[1.0, x, x * x] for x in (1.0, 2.0, 5.0, 1e3)]
    found = scaling.fit(points, [3 + 2 * x + 0.5 * xx for _, x, xx in points])
    assert found.coefficients == pytest.approx((3, 2, 0.5))
    assert found.error < 1e-9
    assert found([1.0, 10.0, 100.0]) == pytest.approx(73)


def test_costs_are_not_negative():
    """The line through these points has a cost of less than nothing at 0; the best of those that have none has 0."""
    found = scaling.fit([[1.0, x] for x in (1.0, 2.0, 4.0)], [0.5, 2.0, 5.0])
    assert found.coefficients[0] == 0
    assert 0.5 < found.coefficients[1] < 1.25


def test_largest_size_is_predicted_without_having_been_seen():
    """A point that breaks the law is far off only because the fit that predicts it did not see it."""
    sizes = [(1, n) for n in (1, 2, 3, 4, 5)]
    rows = {size: scaling.Row(1000 * size[1] ** 2, 10**6 * size[1] ** 3, 4000 * size[1], 0) for size in sizes}
    found = {
        p: scaling.Found(*(2 * sum(f) if p.size == sizes[-1] else sum(f) for f in parts(p, rows)))
        for p in scaling.points_of(sizes)
    }
    errors = scaling.fitted(rows, found)["seconds"]["held_out"]
    assert errors["size"] == pytest.approx([-0.5])
    assert errors["samples"] != pytest.approx([0.0], abs=1e-6)


def parts(point, rows):
    made = scaling.features(point, rows[point.size])
    return made["seconds"], [0.0], [int(value) for value in made["peak"]]


def test_closed_form_of_operations_is_what_an_update_computes(pipeline):
    row, point = scaling.row_of(SD3Family(str(pipeline), max_sequence_length=0), 32, 32), scaling.Point((1, 1))
    module = scaling.method("GDMD", pipeline, point.targets, scaling.FAKE_SCORE_UPDATES, scaling.STEPS)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Counting(scaling.pl.Callback):
        def on_train_batch_start(self, *_):
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

        def on_train_batch_end(self, *_):
            self.counter.__exit__(None, None, None)

    counting = Counting()
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused one
        scaling.train(module, 2, point.samples, point.group, counting)
    assert counting.counter.get_total_flops() == pytest.approx(point.flops(row), rel=0.02)


def test_bytes_are_those_of_gathers_and_scatters():
    asked = predicting.Work(
        evaluations=0, teacher=0, trained=0, calls=5, teacher_calls=3, learning=2, backward=1, decoded=0
    )
    assert asked.sent(ROW, gpus=1) == 0
    assert asked.sent(ROW, gpus=4) == 1000 * (4 * (5 + 2) + 2 * 3 + 4 * 1) * 3 / 4


def test_operations_recompute_what_has_a_backward_pass():
    asked = predicting.Work(10, 4, 2, 0, 0, 0, 0, decoded=0)
    assert asked.flops(ROW) == 10**6 * (10 + 4 + 3 * 2)
    machine = predicting.Machine(tflops=2.0, utilization=0.5, bandwidth_gb=3.0)
    assert machine.seconds(4e12, 6e9) == (4.0, 2.0)


def test_rates_lie_between_no_overlap_and_all_of_it():
    assert predicting.Prediction("m", "weak", 8, 4, 30.0, 10.0, 1.0).updates == (90.0, 120.0)


def test_work_of_many_micro_batches_grows_by_equal_parts(pipeline, monkeypatch):
    monkeypatch.setattr(predicting, "work", functools.cache(predicting.work))  # three updates are counted by two
    one, two, three = (predicting.work(n * 16, 4, pipeline) for n in (1, 2, 3))
    assert one.evaluations == 16 * (2.5 + 1 + 4 + 10 + 4 + 4)  # samples twice, and targets of three roles
    assert one.teacher == 16 * 8
    assert one.trained == 16 * (1 + 4 + 10)
    assert one.decoded == 64
    for name, value in vars(three).items():
        assert value - getattr(two, name) == getattr(two, name) - getattr(one, name)


@pytest.mark.parametrize("arguments", [("--samples", "6"), ("--global_batch", "100"), ("--utilization", "0")])
def test_prediction_refuses_what_is_not_a_machine_or_whole_groups(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predicting.py", *arguments])
    with pytest.raises(SystemExit):
        predicting.main()
    assert "must be" in capsys.readouterr().err


@pytest.mark.slow
def test_measuring_command_writes_table_fit_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["scaling.py", "--sizes", "1x1", "1x2", "--updates", "2", "--output", str(tmp_path)]
    )
    scaling.main()
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert len(content["measured"]) == 9
    assert all(each["seconds"] > 0 and each["peak"] > 4 * each["parameters"] for each in content["measured"])
    assert all(math.isfinite(c) for fit in content["fits"].values() for c in fit["coefficients"])
    assert (tmp_path / "scaling.png").stat().st_size < 100_000
    assert "seconds = " in capsys.readouterr().out


@pytest.mark.slow
def test_predicting_command_prints_a_line_for_each_number_of_gpus(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predicting.py", "--gpus", "8", "--global_batch", "32"])
    predicting.main()
    printed = capsys.readouterr().out
    assert "Prediction. Assumed: 400 TFLOP/s" in printed
    assert len([each for each in printed.splitlines() if each.startswith(("| SD3", "| FLUX"))]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_closed_form_of_bytes_is_what_two_processes_send(strategy, tmp_path):
    place = tiny.save_pipeline(tmp_path / "pipeline", layers=2, heads=4)
    run_ranks(BENCHMARKS / "rank_bytes.py", place, strategy, tmp_path / "found")
    found = json.loads((tmp_path / "found-0").read_text())
    parameters = scaling.row_of(SD3Family(str(place), max_sequence_length=0), 32, 32).parameters
    calls, learning = (sum(each[i] for each in found["asked"].values()) for i in (0, 1))
    assert found["bytes"]["c10d::_allgather_base_"] == pytest.approx(4 * parameters * (calls + learning), rel=0.02)
    backward = learning - found["asked"]["generator"][1] / 2
    assert found["bytes"]["c10d::_reduce_scatter_base_"] == pytest.approx(4 * parameters * backward, rel=0.02)
