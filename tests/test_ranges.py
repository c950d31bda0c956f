"""Every number of every setting has a range, and what is outside is refused with its key, its value and the range."""

import inspect
import math
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tiny
from conftest import write_fast_config
from jsonargparse import ArgumentParser

from gdmd_lightning import components
from gdmd_lightning.cli import COMMANDS, main
from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.numbers import check_configuration
from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.ranges import (
    Count,
    Decay,
    Finite,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
    Range,
    Seed,
    Steps,
    Whole,
    check_number,
    ranges_of,
)
from gdmd_lightning.roles import LoRA, Optimization
from gdmd_lightning.schedules import LogitNormal, Uniform, UniformTimestep
from gdmd_lightning.shapes.settings import PretrainSettings, Stage

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("hint", "inside", "outside", "right"),
    [
        (Count, [1, 10**9], [0, -1, 1.0, True, "1"], "an integer of at least 1"),
        (Whole, [0, 5], [-1, 0.0], "an integer of at least 0"),
        (Seed, [0, 2**32 - 1], [-1, 2**32], "an integer in [0, 4294967295]"),
        (Steps, [1, 1000], [0, 1001], "an integer in [1, 1000]"),
        (Finite, [-1e30, 0, 3], [NAN, INF, -INF, "3", False], "a finite number"),
        (Positive, [1e-30, 2], [0, -1e-30, NAN, INF], "a number above 0"),
        (NonNegative, [0, 1.5], [-1e-30, NAN, INF], "a number of at least 0"),
        (Fraction, [0, 1, 0.5], [-0.1, 1.1, NAN], "a number in [0, 1]"),
        (Decay, [0, 0.999], [1, -0.1, NAN], "a number in [0, 1)"),
        (OpenFraction, [0.1], [0, 1, NAN], "a number in (0, 1)"),
    ],
)
def test_check_number_refuses_exactly_what_is_outside(hint, inside, outside, right):
    for value in (*inside, None):
        check_number("key", hint, value)
    for value in outside:
        with pytest.raises(UserError) as error:
            check_number("key", hint, value)
        assert str(error.value) == f"key: it is {value!r}; use {right}"


def test_check_number_looks_into_unions_lists_and_tuples():
    for hint, right, wrong in (
        (Count | None, 1, 0),
        (list[Seed], [0, 1], [0, -1]),
        (tuple[Whole, ...], (1, 2, 0), (1, 2, -1)),
        (tuple[Decay, Positive], (0.0, 1.0), (0.5, 0.0)),
        (tuple[Fraction, Fraction] | None, (1, 1), [0, 2]),
    ):
        check_number("key", hint, right)
        with pytest.raises(UserError, match=r"^key: it is "):
            check_number("key", hint, wrong)


def settings_classes() -> list[type]:
    """Every class that a configuration can name, the data module, pretrain's, and all dataclasses in their fields."""
    found = [getattr(components, name) for name in components.__all__] + [PromptDataModule, PretrainSettings]
    for kind in found:
        for hint in hints_of(kind).values():
            inner = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
            found += [each for each in inner if each not in found]
    return found


def hints_of(kind: type) -> dict[str, Any]:
    """Type hints of all settings of a class, found without the code that checks them."""
    if is_dataclass(kind):
        return {field.name: get_type_hints(kind, include_extras=True)[field.name] for field in fields(kind)}
    return {
        name: hint
        for base in reversed(kind.__mro__)
        if base.__module__.startswith("gdmd_lightning") and "__init__" in vars(base)
        for name, hint in get_type_hints(inspect.unwrap(vars(base)["__init__"]), include_extras=True).items()
    }


def numbers_in(hint: Any) -> list[Any]:
    """The ranged and bare numbers in a hint, with their ``Annotated``."""
    if get_origin(hint) is Annotated or hint in (int, float):
        return [hint]
    return [number for inner in get_args(hint) for number in numbers_in(inner)]


SETTINGS = settings_classes()


def test_the_walk_finds_the_settings():
    names = {kind.__name__ for kind in SETTINGS}
    assert {"Optimization", "LoRA", "Matching", "Policy", "TargetGroup", "TargetAdvantages", "Stage"} <= names
    assert {"EmbeddingCache", "Memory", "GDMD", "SD3Family", "LogitNormal", "CombinedReward"} <= names
    assert sum(len(numbers_in(hint)) for kind in SETTINGS for hint in hints_of(kind).values()) > 80


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_number_declares_a_range_and_its_class_checks_it(kind):
    for name, hint in hints_of(kind).items():
        if any(is_dataclass(each) for each in (hint, *get_args(hint))):
            assert name in ranges_of(kind), f"{kind.__name__} is not @ranged"  # or its settings would not be reached
        for number in numbers_in(hint):
            assert any(isinstance(each, Range) for each in get_args(number)), f"{kind.__name__}.{name} has no range"
            assert name in ranges_of(kind), f"{kind.__name__} is not @ranged"
            value: Any = NAN
            if get_origin(hint) in (list, tuple):
                value = [NAN] if get_origin(hint) is list or Ellipsis in get_args(hint) else [NAN] * len(get_args(hint))
            with pytest.raises(UserError, match=rf"^{kind.__name__}\.{name}: it is nan; use "):
                kind(**{name: value})


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_defaults_are_in_range(kind):
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is not parameter.empty:
            check_number(name, hints_of(kind).get(name), parameter.default)


def test_constructors_check_positional_arguments_and_inherited_ones(tiny_pipeline):
    with pytest.raises(UserError, match=r"^LoRA\.alpha: it is 0; use an integer of at least 1$"):
        LoRA(4, 0)
    with pytest.raises(UserError, match=r"^GDMD\.height: it is -32; use an integer of at least 1$"):
        tiny.module(tiny_pipeline).__class__(tiny.family(tiny_pipeline), tiny.Brightness(), height=-32)
    with pytest.raises(UserError, match=r"^Optimization\.betas: it is 1\.0; use a number in \[0, 1\)$"):
        Optimization(betas=(0.9, 1.0))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Uniform(0.9, 0.1), "Uniform: low 0.9 is above high 0.1; exchange them"),
        (lambda: LogitNormal(low=0.5, high=0.4), "LogitNormal: low 0.5 is above high 0.4; exchange them"),
        (lambda: UniformTimestep(0.5, 0.4), "UniformTimestep: low 0.5 is above high 0.4; exchange them"),
        (
            lambda: UniformTimestep(beta_start=0.02),
            "UniformTimestep: beta_start 0.02 is above beta_end 0.012; exchange them",
        ),
        (
            lambda: components.CombinedReward([tiny.Brightness()] * 2, [0.0, 0.0]),
            "reward.weights: all weights are 0; give a reward a weight",
        ),
        (
            lambda: PretrainSettings(pictures=90, autoencoder=Stage(1, 31), scorer=Stage(1, 9), teacher=Stage(1, 9)),
            "--autoencoder.batch_size: it is 31; at most 30 of the pictures are used",
        ),
        (
            lambda: PretrainSettings(pictures=90, autoencoder=Stage(1, 30), scorer=Stage(1, 9), teacher=Stage(1, 91)),
            "--teacher.batch_size: it is 91; at most 90 of the pictures are used",
        ),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(make, expected):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == expected
    assert Uniform(0.5, 0.5).low == 0.5


CONFIGURED = {
    "model.height": (-32, "an integer of at least 1"),
    "model.ema_decay": (1.5, "a number in [0, 1)"),
    "model.seed": (-1, "an integer in [0, 4294967295]"),
    "model.steps": (0, "an integer in [1, 1000]"),
    "model.micro_batch_size": (0, "an integer of at least 1"),
    "model.targets.size": (0, "an integer of at least 1"),
    "model.policy.old_decay": (2.0, "a number in [0, 1)"),
    "model.lambda_policy": (-1.0, "a number of at least 0"),
    "model.generator.learning_rate": (-0.1, "a number of at least 0"),
    "model.fake_score.gradient_clip": (0.0, "a number above 0"),
    "model.fake_score.betas": ([0.9, 2.0], "a number in [0, 1)"),
    "model.lora.rank": (0, "an integer of at least 1"),
    "model.matching.fake_score_updates": (-1, "an integer of at least 1"),
    "model.matching.guidance_scale": (-3.0, "a number of at least 0"),
    "model.matching.renoise_distribution.low": (-0.5, "a number in [0, 1]"),
    "model.family.max_sequence_length": (-1, "an integer in [0, 512]"),
    "model.embedding_cache.most": (0, "an integer of at least 1"),
    "data.batch_size": (0, "an integer of at least 1"),
    "data.seed": (-7, "an integer in [0, 4294967295]"),
    "seed_everything": (-1, "an integer in [0, 4294967295]"),
}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory, tiny_pipeline):
    """A parsed configuration with every part that ``CONFIGURED`` names."""
    directory = tmp_path_factory.mktemp("parsed")
    arguments = write_fast_config(directory / "fast.yaml", tiny_pipeline, directory)
    parts = ["--model.lora.rank=4", '--model.embedding_cache={"directory": "x"}']
    return training.parse([*arguments, *parts, "--model.matching.renoise_distribution=Uniform"])


@pytest.mark.parametrize("key", CONFIGURED)
def test_a_number_out_of_range_is_refused_with_its_key(key, parsed):
    value, right = CONFIGURED[key]
    settings = parsed.clone()
    check_configuration(settings)
    place: Any = settings
    *above, last = key.split(".")
    for name in above:
        place = place[name].init_args if "class_path" in place[name] else place[name]
    assert last in place
    place[last] = value
    with pytest.raises(UserError) as error:
        check_configuration(settings)
    assert str(error.value) == f"{key}: it is {value[-1] if isinstance(value, list) else value}; use {right}"


def test_fit_checks_numbers_before_anything_is_built(fast_fit, monkeypatch):
    monkeypatch.setattr(training.DistillationCLI, "_set_seed", lambda self: pytest.fail("began"))
    with pytest.raises(UserError, match=r"^model\.fake_score\.gradient_clip: it is 0\.0; use a number above 0$"):
        training.run([*fast_fit, "--model.fake_score.gradient_clip=0"])


def test_a_callback_in_a_configuration_is_named_by_its_class(fast_fit):
    callback = '{"class_path": "GradientRewardRecord", "init_args": {"pictures_every": -1}}'
    with pytest.raises(UserError) as error:
        training.parse([*fast_fit, f"--trainer.callbacks=[{callback}]"], "plan")
    expected = "trainer.callbacks.GradientRewardRecord.pictures_every: it is -1; use an integer of at least 0"
    assert str(error.value) == expected


POSITIONAL = {
    "compare": ["--config", "compare_shapes.yaml"],
    "sample": ["no.ckpt", "no.txt", "out"],
    "plan": ["--config", "shapes.yaml"],
}


class Found(Exception):
    """A command's parser."""


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"consolidate", "fit", "export", "rewards"}))
def test_every_number_of_a_command_has_a_range(command, monkeypatch, complaint, tmp_path):
    monkeypatch.chdir(tmp_path)

    def found(parser, *arguments, **options):
        raise Found(parser)

    with monkeypatch.context() as patched:
        for name in ("parse_args", "parse_known_args"):
            patched.setattr(ArgumentParser, name, found)
            patched.setattr("argparse.ArgumentParser.parse_known_args", found)
        with pytest.raises(Found) as stop:
            main([command, *POSITIONAL.get(command, [])])
    numbers = [
        (action.dest, number)
        for action in stop.value.args[0]._actions
        for number in numbers_in(getattr(action, "_typehint", action.type))
    ]
    assert numbers
    for name, _ in numbers:
        several = name == "seeds"
        line = complaint(command, *POSITIONAL.get(command, []), f"--{name}={'[-1000]' if several else -1000}")
        assert line.startswith(f"--{name}: it is -1000"), line
        assert "; use a" in line


def test_dataclasses_are_refused_in_python():
    with pytest.raises(UserError, match=r"^Matching\.floor: it is 0; use a number above 0$"):
        Matching(floor=0)
    with pytest.raises(UserError, match=r"^EmbeddingCache\.shard_size: it is 0; use an integer of at least 1$"):
        EmbeddingCache("x", shard_size=0)
