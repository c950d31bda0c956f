"""One seed rules a run, unless model or data have their own."""

import pytest
import tiny
import yaml
from jsonargparse import Namespace

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import describe_module
from gdmd_lightning.configuration.seeds import share_seed
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError


@pytest.fixture
def built(fast_fit, monkeypatch):
    """``built("--seed_everything=5")`` is the command line of ``fit`` with everything built and nothing trained."""
    monkeypatch.setattr(training.DistillationCLI, "_run_subcommand", lambda self, name: None)
    return lambda *arguments: training.run([*fast_fit, *arguments])


def settings(everything, model=None, data=None) -> Namespace:
    """The seeds of a parsed configuration."""
    return Namespace(
        seed_everything=everything, model=Namespace(init_args=Namespace(seed=model)), data=Namespace(seed=data)
    )


@pytest.mark.parametrize(
    ("given", "model", "data"),
    [
        (settings(0), 0, 0),
        (settings(5), 5, 5),
        (settings(5, model=0), 0, 5),
        (settings(5, data=7), 5, 7),
        (settings(False, model=3, data=4), 3, 4),
    ],
)
def test_seed_everything_is_the_seed_of_model_and_data_unless_they_have_their_own(given, model, data):
    share_seed(given)
    assert (given.model.init_args.seed, given.data.seed) == (model, data)


@pytest.mark.parametrize("key", ["model", "data"])
def test_seed_everything_false_needs_both_seeds(key):
    with pytest.raises(UserError) as error:
        share_seed(settings(False, **{"data" if key == "model" else "model": 1}))
    expected = f"{key}.seed: it is null, and seed_everything is false; set it, or give seed_everything a number"
    assert str(error.value) == expected


def test_fit_seeds_model_and_data_and_states_the_number(built, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    cli = built("--seed_everything=true", "--model.seed=3")
    assert (cli.model.seed, cli.datamodule.seed, cli.datamodule.prompts.seed) == (3, 9, 9)
    # Checkpoints and config.yaml state the numbers.
    assert yaml.safe_load(describe_module(cli.config.fit.model))["model"]["init_args"]["seed"] == 3
    assert (cli.config.fit.seed_everything, cli.config.fit.data.seed) == (9, 9)


def test_without_a_configuration_the_seed_is_0(tiny_pipeline):
    assert tiny.module(tiny_pipeline).seed == PromptDataModule().seed == 0
