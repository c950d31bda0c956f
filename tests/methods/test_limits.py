"""Where GDMD has nothing to say it is DMD, to the bit: the same random streams, the same arithmetic."""

import pytest
import tiny
import torch

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD, Policy, TargetGroup


class Flat(tiny.Brightness):
    """Likes every picture equally."""

    def score(self, images, prompts):
        return torch.ones(len(images))


def weights(module) -> dict[str, torch.Tensor]:
    roles = module.networks
    shared = {"generator": roles.generator, "fake_score": roles.fake_score, "ema": roles.ema}
    return {f"{name}.{key}": value for name, part in shared.items() for key, value in part.state_dict().items()}


@pytest.fixture(scope="module")
def dmd(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    tiny.train(module, 4)
    return weights(module)


@pytest.mark.parametrize(
    "policy", [Policy(form="weighted"), Policy(at="state"), Policy(at="target")], ids=["weighted", "state", "target"]
)
def test_gdmd_without_weight_on_the_policy_and_one_target_is_dmd_to_the_bit(tiny_pipeline, dmd, policy):
    module = tiny.module(tiny_pipeline, GDMD, policy=policy, targets=TargetGroup(1), lambda_policy=0.0)
    tiny.train(module, 4)
    assert tiny.differing(dmd, weights(module)) == []


def test_a_flat_reward_makes_weighted_gdmd_dmd_to_the_bit(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, GDMD, reward=Flat(), policy=Policy(form="weighted"), targets=TargetGroup(1))
    tiny.train(module, 4)
    assert tiny.differing(dmd, weights(module)) == []


def test_a_reward_moves_the_generator(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, GDMD, targets=TargetGroup(1))
    tiny.train(module, 4)
    assert tiny.differing(dmd, weights(module)) != []


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny_pipeline):
    runs = []
    for seed in (0, 0, 1):
        module = tiny.module(tiny_pipeline, seed=seed)
        tiny.train(module, 2)
        runs.append(weights(module))
    assert tiny.differing(runs[0], runs[1]) == []
    assert tiny.differing(runs[0], runs[2]) != []


def test_the_teacher_never_moves(tiny_pipeline):
    module = tiny.module(tiny_pipeline)
    module.configure_model()
    before = {key: value.clone() for key, value in module.networks.teacher.state_dict().items()}
    tiny.train(module, 2)
    assert tiny.differing(before, dict(module.networks.teacher.state_dict())) == []
