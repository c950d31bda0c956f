"""Prompts in, pictures out: a picture is a function of seed, row and number, and is whole or absent."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cli_command, cli_environment, write_fast_config
from PIL import Image

from gdmd_lightning.cli import main
from gdmd_lightning.commands import fit, sample
from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.samplers import draw_noise

PREFIX = "gdmd_lightning: error: "
TEXTS = ["a red circle", "two blue squares", "a green triangle above a café", "painting of a \u26f0"]
# A batch's size decides in which order sums are added up, so the last bits of a network's output and, at the edge
# between two levels, a pixel's level.
LEVELS = 1


@pytest.fixture
def checkpoint(recorded_run) -> Path:
    return recorded_run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def stochastic(tiny_pipeline, tmp_path_factory) -> Path:
    """Of a run whose sampler redraws noise on its way."""
    directory = tmp_path_factory.mktemp("stochastic")
    arguments = write_fast_config(directory / "fast.yaml", tiny_pipeline, directory)
    fit.run([*arguments, "--trainer.max_steps=1", "--model.sampler.kind=renoise"])
    return (directory / "run" / "checkpoints" / "last.ckpt").rename(directory / "renoise.ckpt")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def run(*arguments: object) -> None:
    main(["sample", *map(str, arguments)])


def pixels(directory: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(directory.glob("*.png"))}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> int:
    """The greatest difference of a pixel, in levels of 255."""
    assert one.keys() == other.keys()
    return max(int(np.abs(one[name] - other[name]).max()) for name in one)


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.png")}


# The picture of a seed, a row and a number.


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_a_picture_is_the_same_whatever_the_batch_and_the_count(checkpoint, stochastic, prompts, tmp_path, kind):
    path = stochastic if kind == "renoise" else checkpoint
    run(path, prompts, tmp_path / "one", "--batch_size", 1, "--per_prompt", 2)
    run(path, prompts, tmp_path / "three", "--batch_size", 3, "--per_prompt", 2)
    run(path, prompts, tmp_path / "few", "--batch_size", 3, "--count", 2)
    one, three, few = (pixels(tmp_path / name) for name in ("one", "three", "few"))
    assert list(one) == [f"{row:06d}-{number}.png" for row in range(4) for number in range(2)]
    assert apart(one, three) <= LEVELS
    assert list(few) == ["000000-0.png", "000001-0.png"]
    assert apart(few, {name: one[name] for name in few}) <= LEVELS
    # Or the claim would hold of pictures that are all alike.
    assert np.abs(one["000000-0.png"] - one["000000-1.png"]).max() > 10 * LEVELS


def test_another_seed_gives_other_pictures(checkpoint, prompts, tmp_path):
    for seed in (0, 1):
        run(checkpoint, prompts, tmp_path / str(seed), "--seed", seed)
    assert apart(pixels(tmp_path / "0"), pixels(tmp_path / "1")) > 10 * LEVELS


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_the_pictures_are_those_that_the_module_generates_from_the_same_noise(
    checkpoint, stochastic, prompts, tmp_path, kind
):
    path = stochastic if kind == "renoise" else checkpoint
    run(path, prompts, tmp_path / "out", "--seed", 5)
    module = load_module(str(path))
    streams = [sample.picture_stream(5, row, 0) for row in range(4)]
    noise = torch.stack([torch.randn(module.latent_shape, generator=stream) for stream in streams])
    images = module.generate(noise, TEXTS) if kind == "ode" else module.generate(noise, TEXTS, streams=streams)
    levels = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    assert apart(pixels(tmp_path / "out"), {f"{row:06d}-0.png": levels[row] for row in range(4)}) == 0


def test_a_stochastic_samplers_fresh_noise_is_the_pictures_own(stochastic):
    """From one stream for the batch, the second picture's noise would depend on the first's being there."""
    module = load_module(str(stochastic))
    noise = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(0))
    streams = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)]
    both = module.generate(noise, TEXTS[:2], streams=streams)
    alone = module.generate(noise[1:], TEXTS[1:2], streams=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(module.generate(noise, TEXTS[:2])[1:], module.generate(noise[1:], TEXTS[1:2]), atol=1e-3)


def test_the_teachers_pictures_are_those_of_its_own_loop(checkpoint, prompts, tmp_path):
    run(checkpoint, prompts, tmp_path / "out", "--teacher_steps", 2, "--guidance_scale", 2.5)
    module = load_module(str(checkpoint))
    streams = [sample.picture_stream(0, row, 0) for row in range(4)]
    images = module.generate_teacher(draw_noise((4, *module.latent_shape), streams, module.device), TEXTS, 2, 2.5)
    levels = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    assert apart(pixels(tmp_path / "out"), {f"{row:06d}-0.png": levels[row] for row in range(4)}) == 0


# Noise of a stream a row.


def test_one_stream_draws_what_torch_draws_from_it():
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = draw_noise((2, 4, 8, 8), one, torch.device("cpu"))
    assert torch.equal(drawn, torch.randn(2, 4, 8, 8, generator=other))


def test_a_rows_noise_is_its_streams_alone():
    def streams(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = draw_noise((2, 4, 8, 8), streams(3, 4), torch.device("cpu"))
    assert torch.equal(both[1:], draw_noise((1, 4, 8, 8), streams(4), torch.device("cpu")))


def test_streams_that_are_not_one_a_row_are_refused():
    with pytest.raises(ValueError, match="1 streams for 2 rows"):
        draw_noise((2, 4, 8, 8), [torch.Generator()], torch.device("cpu"))


# Going on.


def test_what_was_deleted_is_made_again_and_nothing_else_is(checkpoint, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, prompts, out)
    before, dated = pixels(out), times(out)
    (out / "000001-0.png").unlink()
    (out / "000003-0.png").unlink()
    run(checkpoint, prompts, out)
    assert apart(pixels(out), before) <= LEVELS
    after = times(out)
    assert {name for name in after if after[name] != dated[name]} == {"000001-0.png", "000003-0.png"}
    assert "2 made, 2 there before" in capsys.readouterr().out


def test_a_full_directory_needs_no_model(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    run(checkpoint, prompts, tmp_path / "out")
    dated = times(tmp_path / "out")
    monkeypatch.setattr(sample, "load_module", None)
    run(checkpoint, prompts, tmp_path / "out")
    assert times(tmp_path / "out") == dated
    assert "nothing was left to make" in capsys.readouterr().out


def test_more_pictures_a_prompt_are_added_to_those_that_are_there(checkpoint, prompts, tmp_path):
    out = tmp_path / "out"
    run(checkpoint, prompts, out, "--count", 2)
    dated = times(out)
    run(checkpoint, prompts, out, "--per_prompt", 2)
    assert len(times(out)) == 8
    assert {name: times(out)[name] for name in dated} == dated


def test_a_picture_that_is_cut_off_or_damaged_is_made_again(tmp_path):
    origin = sample.Origin(0, "last.ckpt", "0")
    wanted = [sample.Wanted(0, 0, sample.Prompt("a red circle"))]
    picture = torch.arange(16 * 16 * 3, dtype=torch.uint8).view(16, 16, 3)
    content = sample._png(picture, {"prompt": "a red circle", **origin.written()})
    place = tmp_path / "000000-0.png"
    place.write_bytes(content)
    assert sample.already_there(tmp_path, wanted, origin) == {place.name}
    # What PIL does not miss is the checksum, four bytes, of the empty last chunk.
    for length in range(len(content) - 4):
        place.write_bytes(content[:length])
        assert sample.already_there(tmp_path, wanted, origin) == set(), length
    middle = content.index(b"IDAT") + 10
    place.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert sample.already_there(tmp_path, wanted, origin) == set()


@pytest.mark.slow
def test_kill_9_leaves_whole_pictures_and_the_same_command_makes_the_rest(checkpoint, tmp_path):
    arguments = [checkpoint, "shapes", tmp_path / "out", "--count", 100, "--batch_size", 2]
    process = subprocess.Popen(
        cli_command("sample", *arguments), env=cli_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        limit = time.monotonic() + 200
        while not list(tmp_path.glob("out/*.png")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    left = times(tmp_path / "out")
    assert 0 < len(left) < 100
    assert not (tmp_path / "out" / "pictures.jsonl").exists()
    for name in left:
        Image.open(tmp_path / "out" / name).load()
    run(*arguments)
    assert len(pixels(tmp_path / "out")) == 100
    assert {name: times(tmp_path / "out")[name] for name in left} == left
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".jsonl"}


def test_an_interrupt_keeps_the_batches_before_it(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    real, calls = sample.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, prompts, tmp_path / "out", "--batch_size", 3)
    assert stop.value.code == 128 + signal.SIGINT
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"00000{row}-0.png" for row in range(3)}
    assert "the same command goes on" in capsys.readouterr().out


# What pictures say of themselves.


def test_a_picture_tells_its_prompt_seed_method_and_checkpoint(checkpoint, prompts, tmp_path):
    run(checkpoint, prompts, tmp_path / "out", "--seed", 7)
    for row, text in enumerate(TEXTS):
        told = Image.open(tmp_path / "out" / f"{row:06d}-0.png").text
        assert (told["prompt"], told["seed"], told["method"], told["checkpoint"]) == (text, "7", "GDMD", "last.ckpt")
        assert told["sampled"] == "averaged generator"


def test_prompts_with_metadata_are_listed_with_it(checkpoint, tmp_path, capsys):
    rows = [
        {"caption": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]},
        {"caption": "a square", "tag": "single_object", "include": [{"class": "square", "count": 1}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(checkpoint, tmp_path / "p.jsonl", tmp_path / "out", "--column", "caption", "--per_prompt", 2)
    listed = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert listed == [
        {"file": f"{row:06d}-{number}.png", "prompt": rows[row]["caption"], "seed": 0, "metadata": rows[row]}
        for row in range(2)
        for number in range(2)
    ]
    said = capsys.readouterr().out
    assert f"pictures: {tmp_path / 'out'} (4 made, 0 there before)" in said
    assert float(said.split("seconds a picture: ")[1]) > 0


# Mistakes, told before the model is loaded.


@pytest.fixture
def refused(capsys, monkeypatch, checkpoint, prompts, tmp_path):
    """``refused(...)`` is the one line with which ``sample`` refuses, with no model loaded and no picture touched."""
    usual = {"checkpoint": checkpoint, "prompts": prompts, "out": tmp_path / "out"}

    def told(*arguments: object, **given: object) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(sample, "load_module", lambda *_: pytest.fail("the model was loaded"))
            before = times(tmp_path / "out")
            with pytest.raises(SystemExit) as stop:
                run(*{**usual, **given}.values(), *arguments)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(PREFIX)]
        assert times(tmp_path / "out") == before
        assert len(line) < 600
        return line.removeprefix(PREFIX)

    return told


def test_a_directory_with_pictures_of_another_origin_is_refused(
    refused, checkpoint, stochastic, prompts, tmp_path, capsys
):
    run(checkpoint, prompts, tmp_path / "out")
    capsys.readouterr()
    first = tmp_path / "out" / "000000-0.png"
    line = refused("--seed", 1)
    assert line.startswith(f"{first}: it was made with seed '0', not '1'; give another directory")
    assert f"{first}: it was made with seed '0', not '1'" in refused("--seed", 1, "--count", 1)
    assert "it was made with checkpoint 'last.ckpt', not 'renoise.ckpt'" in refused(checkpoint=stochastic)
    namesake = tmp_path / "last.ckpt"
    namesake.write_bytes(stochastic.read_bytes())
    assert "it was made with another checkpoint of the same name" in refused(checkpoint=namesake)
    assert "not 'teacher, 2 steps, guidance 3'" in refused("--teacher_steps", 2)
    prompts.write_text("\n".join([TEXTS[0], "a blue square" + 500 * "!"]))
    line = refused()
    assert line.startswith(
        f"{tmp_path / 'out' / '000001-0.png'}: it was made with prompt 'two blue squares', not 'a blue"
    )


def test_a_picture_of_somebody_elses_is_not_overwritten(refused, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "000002-0.png")
    assert "000002-0.png: it is no picture of this command; give another directory" in refused()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch_size", 0], "--batch_size: 0 is too few; use at least 1"),
        (["--per_prompt", 0], "--per_prompt: 0 is too few; use at least 1"),
        (["--count", 0], "--count: 0 is too few; use at least 1"),
        (["--teacher_steps", -1], "--teacher_steps: -1 is too few; use at least 0"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used: "),
        (["--no_such_option", 1], "sample: unrecognized arguments: --no_such_option"),
        (["--seed", "many"], "seed: expected int, got 'many'"),
    ],
)
def test_a_wrong_option_is_told(refused, tmp_path, arguments, told):
    assert refused(*arguments).startswith(told)
    assert not (tmp_path / "out").exists()


def test_a_wrong_checkpoint_is_told(refused, checkpoint, tmp_path):
    assert refused(checkpoint="none.ckpt").startswith("checkpoint: no checkpoint 'none.ckpt'; ")
    assert "is a directory; give a .ckpt that fit has written; an exported pipeline" in refused(checkpoint=tmp_path)
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    assert "is not a readable checkpoint" in refused(checkpoint=tmp_path / "cut.ckpt")
    assert not (tmp_path / "out").exists()


def test_wrong_prompts_are_told(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    assert "there is no prompt in it" in refused(prompts=tmp_path / "empty.txt")
    assert refused(prompts="none.txt").startswith("none.txt: no such file; ")
    (tmp_path / "late.jsonl").write_text('{"prompt": "a circle"}\n{"prompt": 3}\n')
    assert "late.jsonl:2: the prompt is of type int" in refused(prompts=tmp_path / "late.jsonl")
    assert refused(prompts="shapes").startswith("shapes: it has no end; say how many of its prompts with --count")
    assert not (tmp_path / "out").exists()


def test_a_place_that_takes_no_pictures_is_told(refused, prompts):
    assert refused(out=prompts) == f"{prompts}: it is a file; give a directory"
    assert refused(out=prompts / "out").startswith(f"{prompts / 'out'}: cannot be written to: Not a directory; ")
    assert refused(out="/proc/pictures").startswith("/proc/pictures: cannot be written to: ")


# What can go wrong later.


def test_a_full_disk_is_one_line_and_leaves_no_half_picture(checkpoint, prompts, tmp_path, monkeypatch, capsys):
    real, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, prompts, tmp_path / "out")
    assert stop.value.code == 2
    place = tmp_path / "out" / "000002-0.png"
    assert f"{PREFIX}{place}: cannot be written: No space left on device; make room" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"000000-0.png", "000001-0.png"}
    run(checkpoint, prompts, tmp_path / "out")
    assert len(pixels(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (lambda *_, **__: torch.full((2, 3, 8, 8), torch.nan), "checkpoint: picture 000000-0.png is not finite; "),
        (lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()), "use a smaller --batch_size"),
    ],
    ids=["not finite", "out of memory"],
)
def test_a_generator_that_fails_is_one_line_and_leaves_no_picture(
    checkpoint, prompts, tmp_path, monkeypatch, capsys, trouble, told
):
    monkeypatch.setattr("gdmd_lightning.methods.base.DistillationModule.generate", trouble)
    with pytest.raises(SystemExit):
        run(checkpoint, prompts, tmp_path / "out", "--count", 2)
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_as_a_process_it_says_where_pictures_lie_and_nothing_a_reader_cannot_act_on(
    run_cli, checkpoint, prompts, tmp_path
):
    done = run_cli("sample", checkpoint, prompts, "out", check=True)
    assert done.stdout.splitlines()[0] == "pictures: out (4 made, 0 there before)"
    assert done.stdout.splitlines()[1].startswith("seconds a picture: ")
    assert "sampling: 100%" in done.stderr
    for noise in ("Warning", "Traceback", "Loading"):
        assert noise not in done.stdout + done.stderr
    assert len(pixels(tmp_path / "out")) == 4
