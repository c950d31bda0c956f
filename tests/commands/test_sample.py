"""Sampling: a picture depends on seed, row and number only, and is complete or absent."""

import errno
import json
import os
import signal
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli_command, cli_environment, write_fast_config
from PIL import Image

from gdmd_lightning.cli import main
from gdmd_lightning.configuration import restore, training
from gdmd_lightning.configuration.devices import usable_device
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.streams import draw_noise
from gdmd_lightning.studies import sampling

PREFIX = "gdmd_lightning: error: "
TEXTS = ["a red circle", "two blue squares", "a green triangle above a café", "painting of a \u26f0"]
# The batch size decides the order in which sums are added, hence the last bits of a network's output; near a
# rounding boundary they change an 8-bit pixel by one.
ROUNDING = 1


@pytest.fixture
def checkpoint(recorded_run) -> Path:
    return recorded_run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def stochastic(tiny_pipeline, tmp_path_factory) -> Path:
    """A checkpoint whose sampler adds fresh noise between steps."""
    directory = tmp_path_factory.mktemp("stochastic")
    arguments = write_fast_config(directory / "fast.yaml", tiny_pipeline, directory)
    training.run([*arguments, "--trainer.max_steps=1", "--model.sampler=Renoise"])
    return (directory / "run" / "checkpoints" / "last.ckpt").rename(directory / "renoise.ckpt")


@pytest.fixture(scope="module")
def loaded() -> dict[str, DistillationModule]:
    """Modules that this file's commands have loaded."""
    return {}


@pytest.fixture(autouse=True)
def load_once(loaded, monkeypatch) -> None:
    """Sampling changes no module, and every picture has its own noise; loading would take most of the time."""

    def load(path, *device, **options):
        where = Path(path)
        key = f"{where} {where.stat().st_mtime_ns} {device} {options}" if where.is_file() else ""
        if key not in loaded:
            module = load_module(path, *device, **options)
            if not key:
                return module
            loaded[key] = module
        return loaded[key]

    monkeypatch.setattr(restore, "load_module", load)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    main(["sample", *map(str, arguments)])


def pixels(directory: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(directory.glob("*.png"))}


def greatest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> int:
    """The greatest difference of a pixel, out of 255."""
    assert one.keys() == other.keys()
    return max(int(np.abs(one[name] - other[name]).max()) for name in one)


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.png")}


def listed(directory: Path) -> list[dict]:
    """The rows of a directory's list."""
    return [json.loads(line) for line in (directory / "pictures.jsonl").read_text("utf-8").splitlines()]


# A picture depends on seed, row and number.


@pytest.mark.parametrize("kind", [pytest.param("ode", marks=pytest.mark.slow), "renoise"])
def test_sample_picture_does_not_depend_on_batch_or_count(checkpoint, stochastic, prompts, tmp_path, kind):
    path = stochastic if kind == "renoise" else checkpoint
    run(path, prompts, tmp_path / "one", "--batch_size", 1, "--per_prompt", 2)
    run(path, prompts, tmp_path / "three", "--batch_size", 3, "--per_prompt", 2)
    run(path, prompts, tmp_path / "few", "--batch_size", 3, "--count", 2)
    one, three, few = (pixels(tmp_path / name) for name in ("one", "three", "few"))
    assert list(one) == [f"{row:06d}-{number}.png" for row in range(4) for number in range(2)]
    assert greatest_difference(one, three) <= ROUNDING
    assert list(few) == ["000000-0.png", "000001-0.png"]
    assert greatest_difference(few, {name: one[name] for name in few}) <= ROUNDING
    # Otherwise the claim would hold for pictures that are all alike.
    assert np.abs(one["000000-0.png"] - one["000000-1.png"]).max() > 10 * ROUNDING


def test_sample_seed_changes_pictures(checkpoint, prompts, tmp_path):
    for seed in (0, 1):
        run(checkpoint, prompts, tmp_path / str(seed), "--seed", seed)
    assert greatest_difference(pixels(tmp_path / "0"), pixels(tmp_path / "1")) > 10 * ROUNDING


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_sample_pictures_equal_those_of_the_module_from_the_same_noise(checkpoint, stochastic, prompts, tmp_path, kind):
    path = stochastic if kind == "renoise" else checkpoint
    run(path, prompts, tmp_path / "out", "--seed", 5)
    module = load_module(str(path), trust=["tiny"])
    rngs = [sampling.Picture(row, 0, Prompt("")).rng(5) for row in range(4)]
    noise = torch.stack([torch.randn(module.latent_shape, generator=rng) for rng in rngs])
    images = module.generate(noise, TEXTS) if kind == "ode" else module.generate(noise, TEXTS, rngs=rngs)
    expected = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    assert greatest_difference(pixels(tmp_path / "out"), {f"{row:06d}-0.png": expected[row] for row in range(4)}) == 0


def test_generate_fresh_noise_of_a_picture_does_not_depend_on_the_batch(stochastic):
    """With one stream for the batch, the second picture's noise would depend on the first picture."""
    module = load_module(str(stochastic), trust=["tiny"])
    noise = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(0))
    streams = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    both = module.generate(noise, TEXTS[:2], rngs=streams)
    alone = module.generate(noise[1:], TEXTS[1:2], rngs=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    # By default its noise determines its fresh noise, too, and the seed that the module trains with does not.
    by_default = module.generate(noise, TEXTS[:2])
    module.seed += 1
    torch.testing.assert_close(by_default[1:], module.generate(noise[1:], TEXTS[1:2]), atol=1e-5, rtol=0)
    assert not torch.allclose(by_default[1:], alone, atol=1e-3)


def test_sample_teacher_pictures_equal_those_of_generate_teacher(checkpoint, prompts, tmp_path):
    run(checkpoint, prompts, tmp_path / "out", "--teacher_steps", 2, "--guidance_scale", 2.5)
    module = load_module(str(checkpoint), trust=["tiny"])
    rngs = [sampling.Picture(row, 0, Prompt("")).rng(0) for row in range(4)]
    images = module.generate_teacher(draw_noise((4, *module.latent_shape), rngs, module.device), TEXTS, 2, 2.5)
    expected = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    assert greatest_difference(pixels(tmp_path / "out"), {f"{row:06d}-0.png": expected[row] for row in range(4)}) == 0


# Continuing.


def test_sample_makes_only_missing_pictures(checkpoint, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, prompts, out)
    before, dated = pixels(out), times(out)
    (out / "000001-0.png").unlink()
    (out / "000003-0.png").unlink()
    run(checkpoint, prompts, out)
    assert greatest_difference(pixels(out), before) <= ROUNDING
    after = times(out)
    assert {name for name in after if after[name] != dated[name]} == {"000001-0.png", "000003-0.png"}
    assert "2 made, 2 existed" in capsys.readouterr().out


def test_sample_complete_directory_loads_no_model(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    run(checkpoint, prompts, tmp_path / "out")
    dated = times(tmp_path / "out")
    monkeypatch.setattr(restore, "load_module", None)
    run(checkpoint, prompts, tmp_path / "out")
    assert times(tmp_path / "out") == dated
    assert "all pictures existed" in capsys.readouterr().out


def test_sample_adds_more_pictures_per_prompt(checkpoint, prompts, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, prompts, out, "--count", 2)
    dated = times(out)
    run(checkpoint, prompts, out, "--per_prompt", 2)
    assert len(times(out)) == 8
    assert {name: times(out)[name] for name in dated} == dated


def test_existing_pictures_leaves_out_truncated_or_damaged_ones(tmp_path):
    origin = sampling.Origin(0, "last.ckpt", "0", 16, 16)
    wanted = [sampling.Picture(0, 0, Prompt("a red circle"))]
    picture = torch.arange(16 * 16 * 3, dtype=torch.uint8).view(16, 16, 3)
    content = sampling.encode_png(picture, {"prompt": "a red circle", **origin.text_chunks()})
    place = tmp_path / "000000-0.png"
    place.write_bytes(content)
    complete = sampling.Existing({place.name}, wanted=1, missing=0)
    nothing = sampling.Existing(set(), wanted=1, missing=1)
    assert sampling.existing_pictures(tmp_path, wanted, origin) == complete
    # PIL does not notice if the checksum of the empty last chunk (four bytes) is missing.
    for length in range(len(content) - 4):
        place.write_bytes(content[:length])
        assert sampling.existing_pictures(tmp_path, wanted, origin) == nothing, length
    middle = content.index(b"IDAT") + 10
    place.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert sampling.existing_pictures(tmp_path, wanted, origin) == nothing


@pytest.mark.slow
def test_sample_continues_after_kill_9_and_keeps_complete_pictures(checkpoint, tmp_path):
    arguments = [checkpoint, "shapes", tmp_path / "out", "--count", 100, "--batch_size", 2]
    process = subprocess.Popen(
        cli_command("sample", *arguments), env=cli_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        limit = time.monotonic() + 200
        # The list appears after the first picture.
        while not list(tmp_path.glob("out/*.jsonl")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    left = times(tmp_path / "out")
    assert 0 < len(left) < 100
    named = {row["file"] for row in listed(tmp_path / "out")}
    assert named <= set(left)
    assert len(named) >= len(left) - 1  # killed between a picture and its line
    for name in left:
        Image.open(tmp_path / "out" / name).load()
    run(*arguments)
    assert len(pixels(tmp_path / "out")) == 100
    assert {name: times(tmp_path / "out")[name] for name in left} == left
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".jsonl"}


def test_sample_interrupted_keeps_finished_batches(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    real, calls = sampling.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sampling, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, prompts, tmp_path / "out", "--batch_size", 3)
    assert stop.value.code == 128 + signal.SIGINT
    names = [f"00000{row}-0.png" for row in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "pictures.jsonl"]
    assert [row["file"] for row in listed(tmp_path / "out")] == names
    assert "run the same command again to continue" in capsys.readouterr().out


def test_sample_list_is_right_while_a_directory_is_completed(checkpoint, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(checkpoint, prompts, out)
    whole = (out / "pictures.jsonl").read_text("utf-8")
    (out / "000000-0.png").unlink()
    (out / "000002-0.png").unlink()
    (out / "pictures.jsonl").write_text(whole + '{"file": "0000', "utf-8")  # as after a full disk
    real, seen = sampling.generate, []

    def watched(*arguments):
        seen.append([row["file"] for row in listed(out)])
        return real(*arguments)

    monkeypatch.setattr(sampling, "generate", watched)
    run(checkpoint, prompts, out, "--batch_size", 1)
    assert seen == [["000001-0.png", "000003-0.png"], ["000001-0.png", "000003-0.png", "000000-0.png"]]
    assert (out / "pictures.jsonl").read_text("utf-8") == whole


def test_sample_full_disk_leaves_only_whole_lines(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    real = sampling._line
    monkeypatch.setattr(sampling, "_line", lambda picture, origin: Halved(real(picture, origin)))
    with pytest.raises(SystemExit):
        run(checkpoint, prompts, tmp_path / "out")
    place = tmp_path / "out" / "pictures.jsonl"
    assert f"{PREFIX}{place}: cannot be written: only " in capsys.readouterr().err
    assert place.read_text() == ""


class Halved(bytes):
    """A line of which the disk takes less than its length."""

    def __len__(self) -> int:
        return 2 * super().__len__()


def test_wanted_pictures_are_streamed(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(5_000)))
    wanted = sampling.wanted_pictures(str(path), "prompt", "train", None, 2)
    origin = sampling.Origin(0, "last.ckpt", "0", 32, 32)
    tracemalloc.start()
    try:
        existing = sampling.existing_pictures(tmp_path, wanted, origin)
        sampling.write_list(wanted, origin, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (existing.wanted, existing.missing) == (10_000, 10_000)
    assert len(listed(tmp_path)) == 10_000
    assert peak < 1e6


# Sizes and devices.


def test_sample_at_another_size(checkpoint, prompts, tmp_path, refused):
    out = tmp_path / "out"
    run(checkpoint, prompts, out, "--height", 16, "--width", 24, "--count", 2)
    assert {picture.shape for picture in pixels(out).values()} == {(16, 24, 3)}
    assert Image.open(out / "000000-0.png").text["size"] == "24x16"
    assert {(row["height"], row["width"]) for row in listed(out)} == {(16, 24)}
    module = load_module(str(checkpoint), size=(16, 24), trust=["tiny"])
    noise = draw_noise((1, *module.latent_shape), [sampling.Picture(1, 0, Prompt("")).rng(0)], module.device)
    expected = (255 * module.generate(noise, TEXTS[1:2])).round()[0].permute(1, 2, 0).int().numpy()
    assert np.abs(pixels(out)["000001-0.png"] - expected).max() <= ROUNDING
    assert "000000-0.png: made with size '24x16', not '32x32'" in refused()
    assert "000000-0.png: made with size '24x16', not '24x32'" in refused("--width", 24)
    dated = times(out)
    run(checkpoint, prompts, out, "--height", 16, "--width", 24)
    assert len(times(out)) == 4
    assert {name: times(out)[name] for name in dated} == dated


def test_sample_reports_a_size_that_the_family_cannot_make(checkpoint, prompts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, prompts, tmp_path / "out", "--height", 18)
    assert stop.value.code == 2
    assert "18x32 is not a multiple of " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sample_reports_a_checkpoint_without_its_size(refused, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    for broken in ({}, {"configuration": "model: 3"}, {"configuration": "model: {init_args: {height: x, width: 1}}"}):
        torch.save({**content, "provenance": broken}, tmp_path / "last.ckpt")
        assert "has no configuration" in refused(checkpoint=tmp_path / "last.ckpt")


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_usable_device_is_chosen(monkeypatch, there, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    assert usable_device("auto") == chosen
    assert usable_device("mps") == "mps"


# Metadata of pictures.


def test_sample_picture_carries_prompt_seed_method_and_checkpoint(checkpoint, prompts, tmp_path):
    run(checkpoint, prompts, tmp_path / "out", "--seed", 7)
    for row, text in enumerate(TEXTS):
        chunks = Image.open(tmp_path / "out" / f"{row:06d}-0.png").text
        assert (chunks["prompt"], chunks["seed"], chunks["method"], chunks["checkpoint"]) == (
            text,
            "7",
            "GDMD",
            "last.ckpt",
        )
        assert chunks["sampled"] == "averaged generator"


def test_sample_lists_pictures_with_the_metadata_of_their_prompts(checkpoint, tmp_path, capsys):
    rows = [
        {"caption": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]},
        {"caption": "a square", "tag": "single_object", "include": [{"class": "square", "count": 1}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(checkpoint, tmp_path / "p.jsonl", tmp_path / "out", "--column", "caption", "--per_prompt", 2)
    assert listed(tmp_path / "out") == [
        {
            "file": f"{row:06d}-{number}.png",
            "prompt": rows[row]["caption"],
            "row": row,
            "number": number,
            "seed": 0,
            "height": 32,
            "width": 32,
            "metadata": rows[row],
        }
        for row in range(2)
        for number in range(2)
    ]
    said = capsys.readouterr().out
    assert f"pictures: {tmp_path / 'out'} (4 made, 0 existed)" in said
    assert float(said.split("seconds per picture: ")[1]) > 0


# Mistakes, reported before the model is loaded.


@pytest.fixture
def refused(capsys, monkeypatch, checkpoint, prompts, tmp_path):
    """``refused(...)`` returns the error line of ``sample``; no model is loaded and no picture touched."""
    usual = {"checkpoint": checkpoint, "prompts": prompts, "out": tmp_path / "out"}

    def error_line(*arguments: object, **given: object) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(restore, "load_module", lambda *_, **__: pytest.fail("the model was loaded"))
            before = times(tmp_path / "out")
            with pytest.raises(SystemExit) as stop:
                run(*{**usual, **given}.values(), *arguments)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(PREFIX)]
        assert times(tmp_path / "out") == before
        assert len(line) < 600
        return line.removeprefix(PREFIX)

    return error_line


def test_sample_refuses_a_directory_with_pictures_of_another_origin(
    refused, checkpoint, stochastic, prompts, tmp_path, capsys
):
    run(checkpoint, prompts, tmp_path / "out")
    capsys.readouterr()
    first = tmp_path / "out" / "000000-0.png"
    line = refused("--seed", 1)
    assert line.startswith(f"{first}: made with seed '0', not '1'; give another directory")
    assert f"{first}: made with seed '0', not '1'" in refused("--seed", 1, "--count", 1)
    assert "made with checkpoint 'last.ckpt', not 'renoise.ckpt'" in refused(checkpoint=stochastic)
    namesake = tmp_path / "last.ckpt"
    namesake.write_bytes(stochastic.read_bytes())
    assert "made with another checkpoint of the same name" in refused(checkpoint=namesake)
    assert "not 'teacher, 2 steps, guidance 3'" in refused("--teacher_steps", 2)
    prompts.write_text("\n".join([TEXTS[0], "a blue square" + 500 * "!"]))
    line = refused()
    assert line.startswith(f"{tmp_path / 'out' / '000001-0.png'}: made with prompt 'two blue squares', not 'a blue")


def test_sample_does_not_overwrite_other_pictures(refused, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "000002-0.png")
    assert "000002-0.png: not written by sample; give another directory" in refused()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch_size", 0], "--batch_size: it is 0; use an integer of at least 1"),
        (["--per_prompt", 0], "--per_prompt: it is 0; use an integer of at least 1"),
        (["--count", 0], "--count: it is 0; use an integer of at least 1"),
        (["--teacher_steps", -1], "--teacher_steps: it is -1; use an integer of at least 0"),
        (["--guidance_scale", 9], "--guidance_scale: only for the teacher; give --teacher_steps, or leave it out"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used: "),
        (["--device", "meta"], "--device: 'meta' cannot be used: "),
        (["--height", 0], "--height: it is 0; use an integer of at least 1"),
        (["--no_such_option", 1], "sample: unknown option '--no_such_option'; see sample --help"),
        (["--seed", "many"], "seed: expected int, got 'many'"),
    ],
)
def test_sample_reports_a_wrong_option(refused, tmp_path, arguments, expected):
    assert refused(*arguments).startswith(expected)
    assert not (tmp_path / "out").exists()


def test_sample_reports_a_wrong_checkpoint(refused, checkpoint, tmp_path):
    assert refused(checkpoint="none.ckpt").startswith("checkpoint: no checkpoint 'none.ckpt'; ")
    assert "is a directory; give a .ckpt written by fit; sample an exported pipeline" in refused(checkpoint=tmp_path)
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    assert "is not a readable checkpoint" in refused(checkpoint=tmp_path / "cut.ckpt")
    assert not (tmp_path / "out").exists()


def test_sample_reports_wrong_prompts(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    assert "there is no prompt in it" in refused(prompts=tmp_path / "empty.txt")
    assert refused(prompts="none.txt").startswith("none.txt: no such file; ")
    (tmp_path / "late.jsonl").write_text('{"prompt": "a circle"}\n{"prompt": 3}\n')
    assert "late.jsonl:2: the prompt is of type int" in refused(prompts=tmp_path / "late.jsonl")
    assert refused(prompts="shapes").startswith(
        "shapes: this source is endless; give the number of prompts with --count"
    )
    assert not (tmp_path / "out").exists()


def test_sample_reports_an_unusable_directory(refused, prompts):
    assert refused(out=prompts) == f"{prompts}: this is a file; give a directory"
    assert refused(out=prompts / "out").startswith(f"{prompts / 'out'}: cannot be written to: Not a directory; ")
    assert refused(out="/proc/pictures").startswith("/proc/pictures: cannot be written to: ")


# Failures while sampling.


def test_sample_full_disk_leaves_no_incomplete_picture(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 5:  # of a picture and its directory in turn
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, prompts, tmp_path / "out")
    assert stop.value.code == 2
    place = tmp_path / "out" / "000002-0.png"
    assert f"{PREFIX}{place}: cannot be written: No space left on device; free disk space" in capsys.readouterr().err
    assert set(pixels(tmp_path / "out")) == {"000000-0.png", "000001-0.png"}
    assert [row["file"] for row in listed(tmp_path / "out")] == ["000000-0.png", "000001-0.png"]
    assert len(list((tmp_path / "out").iterdir())) == 3
    run(checkpoint, prompts, tmp_path / "out")
    assert len(pixels(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (lambda *_, **__: torch.full((2, 3, 8, 8), torch.nan), "checkpoint: picture 000000-0.png is not finite; "),
        (lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()), "use a smaller --batch_size"),
    ],
    ids=["not finite", "out of memory"],
)
def test_sample_failing_generator_leaves_no_picture(
    checkpoint, prompts, tmp_path, monkeypatch, capsys, failing, expected
):
    monkeypatch.setattr("gdmd_lightning.methods.base.DistillationModule.generate", failing)
    with pytest.raises(SystemExit):
        run(checkpoint, prompts, tmp_path / "out", "--count", 2)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sample_as_a_process_prints_only_useful_lines(run_cli, checkpoint, prompts, tmp_path):
    done = run_cli("sample", checkpoint, prompts, "out", check=True)
    assert done.stdout.splitlines()[0] == "pictures: out (4 made, 0 existed)"
    assert done.stdout.splitlines()[1].startswith("seconds per picture: ")
    assert "sampling: 100%" in done.stderr
    for noise in ("Warning", "Traceback", "Loading"):
        assert noise not in done.stdout + done.stderr
    assert len(pixels(tmp_path / "out")) == 4


def test_sample_that_cannot_load_its_teacher_leaves_no_directory(checkpoint, prompts, tmp_path, capsys):
    arguments = [checkpoint, prompts, tmp_path / "out", "--trust", "tiny", "--teacher", tmp_path / "nowhere"]
    with pytest.raises(SystemExit):
        run(*arguments)
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        run(*arguments)
    assert (tmp_path / "out").is_dir()
