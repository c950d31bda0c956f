"""GDMD without a preference equals DMD to the bit: the same random streams, the same arithmetic."""

import pytest
import tiny
import torch

from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.reward_terms import Policy


class Flat(tiny.Brightness):
    """Scores every image 1."""

    def score(self, images, prompts):
        return torch.ones(len(images))


def weights(module) -> dict[str, torch.Tensor]:
    state = module.roles.state_dict()
    return {name: state[name] for role in ("generator", "fake_score", "ema") for name in module.roles.names_of(role)}


@pytest.fixture(scope="module")
def dmd(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    tiny.train(module, 2)
    return weights(module)


@pytest.mark.parametrize(
    "policy", [Policy(form="weighted"), Policy(at="state"), Policy(at="target")], ids=["weighted", "state", "target"]
)
def test_gdmd_with_one_target_and_lambda_policy_zero_equals_dmd_to_the_bit(tiny_pipeline, dmd, policy):
    module = tiny.module(tiny_pipeline, GDMD, policy=policy, targets=TargetGroup(1), lambda_policy=0.0)
    tiny.train(module, 2)
    assert tiny.differing(dmd, weights(module)) == []


def test_weighted_gdmd_with_a_flat_reward_equals_dmd_to_the_bit(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, GDMD, reward=Flat(), policy=Policy(form="weighted"), targets=TargetGroup(1))
    tiny.train(module, 2)
    assert tiny.differing(dmd, weights(module)) == []


def test_gdmd_with_a_reward_differs_from_dmd(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, GDMD, targets=TargetGroup(1))
    tiny.train(module, 2)
    assert tiny.differing(dmd, weights(module)) != []


def test_run_is_determined_by_its_seed(tiny_pipeline):
    runs = []
    for seed in (0, 0, 1):
        module = tiny.module(tiny_pipeline, seed=seed)
        tiny.train(module, 2)
        runs.append(weights(module))
    assert tiny.differing(runs[0], runs[1]) == []
    assert tiny.differing(runs[0], runs[2]) != []


def test_teacher_stays_unchanged(tiny_pipeline):
    module = tiny.module(tiny_pipeline)
    module.configure_model()
    before = {key: value.clone() for key, value in module.roles.standalone("teacher").state_dict().items()}
    tiny.train(module, 2)
    assert tiny.differing(before, dict(module.roles.standalone("teacher").state_dict())) == []
