"""The command line finds commands and configurations, answers quickly, and prefers later arguments."""

import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gdmd_lightning import __version__, garbage
from gdmd_lightning.cli import COMMANDS, main
from gdmd_lightning.errors import UserError

HEAVY = ("torch", "lightning", "diffusers", "transformers", "jsonargparse")


def printed_config(capsys, *arguments: str) -> dict:
    """The configuration that ``fit --print_config`` prints for the arguments."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["distill"], 2), ([], 2)])
def test_trivial_answers_import_nothing_heavy_and_take_under_a_second(arguments, status):
    code = (
        "import atexit, sys\n"
        "from gdmd_lightning.cli import main\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules]))\n"
        "main(sys.argv[1:])"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert time.perf_counter() - began < 1
    assert done.returncode == status
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "--config", "shapse.yaml"], "--config: no configuration 'shapse.yaml'; did you mean 'shapes.yaml'?"),
        (["plan", "--trainr.max_steps", "3"], "plan: unknown option '--trainr.max_steps'; did you mean '--trainer'? "),
        (["evaluate", "--chekpoint", "a=b"], "evaluate: unknown option '--chekpoint'; did you mean 'checkpoint'? "),
        (["sample", "a"], "sample: missing: prompts, out; see sample --help"),
        (
            ["pretrain", "--teachr.steps", "3"],
            "pretrain: unknown option '--teachr.steps'; did you mean 'teacher.steps'",
        ),
        (["rewards", "--directory", "no"], "--directory no: there is no such directory"),
    ],
)
def test_mistake_that_needs_no_model_imports_nothing_heavy(arguments, expected):
    code = (
        "import atexit, sys\n"
        "from gdmd_lightning.cli import main\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY[:-1]} if m in sys.modules]))\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "HEAVY []\n"
    assert done.stderr.startswith(f"gdmd_lightning: error: {expected}")


def test_unknown_command_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["evalute"])
    assert capsys.readouterr().err == "gdmd_lightning: error: unknown command 'evalute'; did you mean 'evaluate'?\n"


def test_console_script_finds_modules_in_the_working_directory_as_python_m_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gdmd_lightning", "--version"])
    monkeypatch.setattr(sys, "path", ["/bin"])
    main()
    assert sys.path == [str(tmp_path), "/bin"]


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_version_prints_the_package_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.split() == ["gdmd_lightning", __version__]


def cpu_seconds(code: str, *arguments: str) -> tuple[float, str]:
    """CPU seconds of a Python process, which other processes do not change, and its output."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=write, stderr=subprocess.STDOUT)
    os.close(write)
    with os.fdopen(read) as out:
        printed = out.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed
    return usage.ru_utime + usage.ru_stime, printed


FIT = (
    "import atexit, sys\n"
    "wrong = ('diffusers', 'transformers.models.clip.modeling_clip', 'transformers.modeling_utils', 'datasets')\n"
    "atexit.register(lambda: print('\\n# IMPORTED', [m for m in wrong if m in sys.modules]))\n"
    "from gdmd_lightning.cli import main\n"
    "main(sys.argv[1:])"
)


@pytest.mark.slow
def test_fit_help_and_print_config_cost_little_more_than_importing_lightning():
    best = {"import": float("inf"), "help": float("inf"), "print": float("inf")}
    for _ in range(3):
        for name, code, arguments in [
            ("import", "import lightning.pytorch.cli", ()),
            ("help", FIT, ("fit", "--help")),
            ("print", FIT, ("fit", "--config", "shapes.yaml", "--print_config")),
        ]:
            seconds, printed = cpu_seconds(code, *arguments)
            best[name] = min(best[name], seconds)
            assert name == "import" or "# IMPORTED []" in printed, printed[-300:]
        if max(best["help"], best["print"]) <= 1.3 * best["import"]:
            return
    pytest.fail(f"CPU seconds: {best}")


def test_config_in_the_working_directory_hides_a_shipped_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert printed_config(capsys, "--config", "shapes.yaml")["model"]["class_path"].endswith("GDMD")
    Path("shapes.yaml").write_text("trainer: {max_steps: 77}\nmodel: {class_path: DMD}\n")
    found = printed_config(capsys, "--config=shapes.yaml")
    assert found["trainer"]["max_steps"] == 77
    assert found["model"]["class_path"].endswith("DMD")


def test_later_configs_override_earlier_ones_and_options_override_both(capsys, tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("trainer: {max_steps: 11, log_every_n_steps: 12}\n")
    two.write_text("trainer: {max_steps: 21}\nmodel: {init_args: {policy: {beta: 0.5}}}\n")
    found = printed_config(
        capsys, "--config", "shapes.yaml", "--config", str(one), "--config", str(two), "--model.lambda_policy", "0.25"
    )
    assert found["trainer"]["max_steps"] == 21
    assert found["trainer"]["log_every_n_steps"] == 12
    assert found["model"]["init_args"]["policy"]["beta"] == 0.5
    assert found["model"]["init_args"]["lambda_policy"] == 0.25
    assert found["model"]["init_args"]["reward"]["class_path"].endswith("ShapesReward")


def test_shapes_dmd_over_shapes_gives_dmd_with_the_same_family(capsys):
    gdmd = printed_config(capsys, "--config", "shapes.yaml")["model"]
    dmd = printed_config(capsys, "--config", "shapes.yaml", "--config", "shapes_dmd.yaml")["model"]
    assert dmd["class_path"] == "gdmd_lightning.methods.dmd.DMD"
    assert dmd["init_args"]["family"] == gdmd["init_args"]["family"]
    assert "reward" not in dmd["init_args"]


@pytest.mark.parametrize("name", ["shapes.yaml"])
def test_printed_config_is_a_valid_config(capsys, tmp_path, name):
    first = printed_config(capsys, "--config", name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "--config", str(copy)) == first


def test_fit_saves_and_obeys_options(fast_fit, tmp_path):
    main(["fit", *fast_fit, "--model.lambda_policy", "0.5", "--trainer.max_steps", "2"])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["lambda_policy"] == 0.5
    assert saved["trainer"]["max_steps"] == 2
    import torch

    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_fit_trains_dmd_from_its_shipped_config(fast_fit, tmp_path):
    main(["fit", *fast_fit, "--config", "shapes_dmd.yaml"])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "process"])
def test_fit_prints_exactly_what_a_user_needs(run_cli, fast_fit, tmp_path, capfd, process):
    arguments = [
        "--trainer.max_steps=2",
        "--trainer.enable_progress_bar=true",
        "--trainer.callbacks.score_teacher=true",
    ]
    if process:
        done = run_cli("fit", *fast_fit, *arguments, check=True)
        out, err = done.stdout, done.stderr
    else:
        main(["fit", *fast_fit, *arguments])
        out, err = capfd.readouterr()
        # Transformers decides when it is imported whether it shows this.
        err = "".join(part for part in re.split(r"[\r\n]", err) if not part.startswith("Loading weights:"))
    last = rf"{re.escape(str(tmp_path))}/run/\S*checkpoints/last\.ckpt"
    run = rf"{re.escape(str(tmp_path))}/run/?\S*"
    expected = [
        r"GDMD: 4 steps, 32x32 pixels, all weights",
        r"teacher: .+/pipeline",
        r"training: 2 updates of 8 samples \(4 per prompt\), on cpu, precision 32-true",
        rf"run: {run}",
        rf"checkpoints: every 2 updates in {run}",
        r"update 1/2  loss \S+  target reward \S+  \S+ s/update  \S+ left",
        r"update 2/2  loss \S+  target reward \S+  \S+ s/update  0:00 left",
        r"2 updates in \S+, 2 in all",
        *[r"score geneval/\w+: \d\.\d{4}  \(teacher: \d\.\d{4}\)"] * 7,
        rf"train longer: .+ fit --config {run}/config.yaml --ckpt_path {last} --trainer.max_steps 4",
        rf"sample: python -m gdmd_lightning sample {last} PROMPTS {run}/samples",
        rf"export: python -m gdmd_lightning export {last} {run}/pipeline",
        rf"look at the record: GDMD_RUN={run} jupyter lab notebooks/gradient_rewards\.ipynb",
    ]
    lines = out.splitlines()
    assert len(lines) == len(expected), out
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert err == ""


def test_cycles_are_looked_for_rarely_until_training_starts(fast_fit, monkeypatch):
    from gdmd_lightning.configuration import training

    before, found = gc.get_threshold(), []
    parse = training.DistillationCLI.parse_arguments
    monkeypatch.setattr(
        training.DistillationCLI, "parse_arguments", lambda *given: (found.append(gc.get_threshold()), parse(*given))[1]
    )

    def fit(*_, **__):
        found.append(gc.get_threshold())
        raise UserError("far enough")

    monkeypatch.setattr(training.Trainer, "_fit_impl", fit)  # fit itself tells the parser its arguments
    try:
        with pytest.raises(SystemExit):
            main(["fit", *fast_fit])
    finally:
        gc.set_threshold(*before)
    assert found == [garbage.RARE, garbage.USUAL]
    assert garbage.USUAL[0] < garbage.RARE[0]
