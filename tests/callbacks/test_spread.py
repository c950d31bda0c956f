"""A reward without an effect is refused at the start, or reported while training."""

import warnings
from collections.abc import Sequence

import pytest
import tiny
import torch
from torch import Tensor

from gdmd_lightning.callbacks.spread import WarnWithoutSpread
from gdmd_lightning.configuration import training
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.record import JudgedTargets
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.planning.report import plan_of
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.rewards.shapes import ShapesReward


def warned(shares: list[float], lambda_policy: float = 1.0, *, targets: bool = True) -> list[str]:
    """Warnings after updates with these shares of groups without spread."""
    callback, nothing = WarnWithoutSpread(), torch.zeros(1, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for share in shares:
            spread = torch.tensor(share)
            judged = JudgedTargets(
                (), *[nothing] * 7, None, nothing, spread, optimality=nothing, lambda_policy=lambda_policy
            )
            outputs = {"record": judged if targets else None, "logs": {"groups_without_spread": spread}}
            callback.on_train_batch_end(None, None, outputs, None, 0)  # type: ignore[arg-type]
            without = {"record": None, "logs": {}}  # a method without groups
            callback.on_train_batch_end(None, None, without, None, 0)  # type: ignore[arg-type]
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("targets", [True, False])
def test_a_reward_without_spread_is_reported_once_after_enough_updates_in_a_row(targets):
    (once,) = warned([1.0] * 50, targets=targets)
    assert once.startswith("The reward has had no effect for 20 updates: ")
    assert warned([1.0] * 19) == warned([1.0] * 50, lambda_policy=0.0) == []
    assert warned(([1.0] * 19 + [0.9]) * 4) == []
    (later,) = warned([0.5] + [1.0] * 39)
    assert later.startswith("The reward has had no effect for 39 updates: ")


def loading(self) -> None:
    raise AssertionError("the teacher was loaded")


def test_fit_refuses_a_batch_in_which_no_reward_can_have_an_effect_before_loading(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(SD3Family, "load", loading)
    small = {"targets": TargetGroup(1)}
    with pytest.raises(UserError, match=r"^model\.advantages\.compare: the reward would have no effect: "):
        tiny.train(tiny.module(tiny_pipeline, GDMD, **small), 1, data={"batch_size": 2, "group_size": 1})
    centered = {"advantages": TargetAdvantages(center_strata=True)}
    with pytest.raises(UserError, match=r"^model\.advantages\.center_strata: the reward would have no effect: "):
        tiny.train(tiny.module(tiny_pipeline, GDMD, **centered), 1, data={"batch_size": 1, "group_size": 1})
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        tiny.train(tiny.module(tiny_pipeline, GDMD, lambda_policy=0.0, **small), 1, data={"group_size": 1})


def test_plan_refuses_it_too(fast_fit):
    with pytest.raises(UserError, match=r"^model\.advantages\.compare: the reward would have no effect: "):
        plan_of([*fast_fit, "--data.group_size=1", "--model.targets.size=1"])


def test_fit_checks_the_first_prompts_before_loading(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(SD3Family, "load", loading)
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a", "include": [{"class": "circle", "count": 1}]}\n' * 9 + '{"prompt": "a red circle"}\n'
    )
    trainer = tiny.trainer(1)
    with pytest.raises(UserError, match="prompt 'a red circle' has no GenEval metadata"):
        trainer.fit(tiny.module(tiny_pipeline, GDMD, reward=ShapesReward()), datamodule=PromptDataModule(str(path)))


def test_fit_installs_the_warning(fast_fit, monkeypatch):
    monkeypatch.setattr(training.DistillationCLI, "_run_subcommand", lambda self, name: None)
    cli = training.run(fast_fit)
    assert sum(isinstance(each, WarnWithoutSpread) for each in cli.trainer.callbacks) == 1


class Detached(tiny.Brightness):
    """Says that it is differentiable, and is not."""

    name = "detached"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return super().score(images.detach(), prompts)


@pytest.mark.parametrize("weight", [None, 0.5])
def test_refl_refuses_scores_without_gradient_of_a_reward_or_of_a_part(tiny_pipeline, weight):
    reward = Detached() if weight is None else CombinedReward([tiny.Brightness(), Detached()], [1.0, weight])
    module = tiny.module(tiny_pipeline, ReFL, reward=reward)
    expected = r"^reward 'detached': differentiable is true, but its scores carry no gradient to the pictures; "
    with pytest.raises(UserError, match=expected):
        tiny.train(module, 1, data={"batch_size": 2, "group_size": 2})
