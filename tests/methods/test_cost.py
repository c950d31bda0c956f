"""What an update costs: network evaluations against the closed form of ``docs/performance.md``, text encoded once."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from world import SHAPE, Liking, World

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.cold_start import ColdStart
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.nft_terms import NFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.methods.settings import Consistency, Matching
from gdmd_lightning.roles import LoRA

B, K, C, UPDATES = 8, 4, 3, 2
ROLLOUT = B * (K - 1) / 2 + B


@pytest.fixture(params=["world", pytest.param("pipeline", marks=pytest.mark.slow)])
def place(request) -> Path | None:
    """Where updates are counted: in the world of closed forms, or with a trainer on the tiny pipeline."""
    return request.getfixturevalue("tiny_pipeline") if request.param == "pipeline" else None


def counted(place, method, **options) -> dict[str, float]:
    """Evaluations per update, by role."""
    if place is None:
        if "reward" in options or method is GDMD:
            options["reward"] = Liking()
        world = World(method, prompts=K, each=B // K, steps=K, **options)
        if method is DMD2:
            world.batch = replace(world.batch, real_x0=torch.randn(B, *SHAPE))
        for _ in range(UPDATES):
            world.update()
        module = world.module
    else:
        module = tiny.module(place, method, steps=K, **options)
        tiny.train(module, UPDATES, data={"batch_size": B, "group_size": B // K})
    return {role: count / UPDATES for role, count in module.roles.evaluations.items()}


def cost(place, method, fake_score_samples="reused", guidance_scale=3.0, settings=None, **options):
    """Evaluations per update, by role; ``settings`` are further ones of the matching."""
    matching = Matching(
        fake_score_updates=C,
        fake_score_samples=fake_score_samples,
        guidance_scale=guidance_scale,
        **(settings or {}),
    )
    return counted(place, method, matching=matching, **options)


@pytest.mark.parametrize("real", [False, True], ids=["world", "pipeline"])
def test_dmd_evaluations_equal_the_closed_form(tiny_pipeline, real):
    expected = {"generator": ROLLOUT, "teacher": 2 * B, "fake_score": B + C * B}
    assert cost(tiny_pipeline if real else None, DMD) == expected


def test_teacher_without_guidance_costs_half(place):
    assert cost(place, DMD, guidance_scale=1.0)["teacher"] == B


def test_guidance_at_its_own_levels_costs_another_conditional_evaluation(place):
    found = cost(place, DMD, settings={"guidance_levels": "above"})
    assert found == {"generator": ROLLOUT, "teacher": 3 * B, "fake_score": B + C * B}


def test_fresh_fake_score_samples_cost_a_rollout_each(place):
    found = cost(place, DMD, fake_score_samples="fresh")
    assert found == {"generator": ROLLOUT + C * ROLLOUT, "teacher": 2 * B, "fake_score": B + C * B}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("policy", "generator", "old"),
    [
        (Policy(form="weighted"), lambda m: 0, lambda m: 0),
        (Policy(at="state"), lambda m: 0, lambda m: B),
        (Policy(at="target"), lambda m: m * B, lambda m: m * B),
    ],
)
def test_gdmd_evaluations_equal_the_closed_form(place, size, policy, generator, old):
    found = cost(place, GDMD, policy=policy, targets=TargetGroup(size))
    expected = {
        "generator": ROLLOUT + generator(size),
        "teacher": 2 * size * B,
        "fake_score": size * B + C * B,
        "old": old(size),
    }
    assert found == {role: count for role, count in expected.items() if count}


def test_snapshots_cost_no_more_than_levels(place):
    policy = Policy(form="weighted")
    targets = TargetGroup(4, over="both", snapshots=2, snapshot_every=1)
    found = cost(place, GDMD, policy=policy, targets=targets)
    past = sum(found.pop(f"fake_score@{slot}") for slot in (1, 2))
    found["fake_score"] += past
    assert found == {"generator": ROLLOUT, "teacher": 8 * B, "fake_score": 4 * B + C * B}


def test_prompts_are_encoded_once_in_a_run(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na green square\na blue triangle\n")
    module = tiny.module(tiny_pipeline)
    encoded = []
    encode = module.family.encode
    module.family.encode = lambda texts: encoded.extend(texts) or encode(texts)
    data = PromptDataModule(str(prompts), batch_size=8, group_size=4, shuffle_buffer=0)
    tiny.trainer(2).fit(module, datamodule=data)
    assert sorted(encoded) == ["", "a blue triangle", "a green square", "a red circle"]


@pytest.mark.parametrize("size", [None, 3])
def test_gndm_costs_what_dmd_costs(place, size):
    """In micro-batches its samples are computed twice, since groups are matched whole."""
    found = cost(place, GNDM, micro_batch_size=size)
    assert found == {"generator": ROLLOUT + (B if size else 0), "teacher": 2 * B, "fake_score": B + C * B}


def test_gndmr_also_asks_both_policies(place):
    found = cost(place, GNDMR, reward=tiny.Brightness())
    assert found == {"generator": ROLLOUT + B, "teacher": 2 * B, "fake_score": B + C * B, "old": B}


@pytest.mark.parametrize(("weight", "passes"), [(0.0, 1), (0.01, 3)])
def test_ac_dmd_consistency_costs_two_evaluations_per_fake_score_update(place, weight, passes):
    found = cost(place, ACDMD, settings={"interval": "step"}, consistency=Consistency(weight))
    assert found == {"generator": ROLLOUT, "teacher": 2 * B, "fake_score": B + C * passes * B}


def test_dmd2_asks_the_fake_score_for_features(place):
    """Of each sample in the generator's step, of real and generated latents in each of the fake score's steps."""
    found = cost(place, DMD2, images=ShapesImages())
    assert found == {"generator": ROLLOUT, "teacher": 2 * B, "fake_score": 2 * B + 3 * C * B}


def test_rtdmd_evaluates_full_rollouts_and_some_of_their_steps_again(place):
    found = cost(place, RTDMD, settings={"interval": "step"}, reward=tiny.Brightness())
    assert found == {"generator": K * B + 2 * B + B, "teacher": 2 * B, "fake_score": B + 3 * C * B}


def test_refl_evaluations_are_the_rollouts_only(place):
    assert counted(place, ReFL, reward=tiny.Brightness()) == {"generator": K * B}


def test_gdmd_in_micro_batches_computes_its_samples_twice(place):
    policy = Policy(form="weighted")
    found = cost(place, GDMD, policy=policy, targets=TargetGroup(2), micro_batch_size=3)
    assert found == {"generator": ROLLOUT + B, "teacher": 4 * B, "fake_score": 2 * B + C * B}


@pytest.mark.parametrize(("train_steps", "trained"), [(None, K - 1), (2, 2)])
@pytest.mark.parametrize(("kl_weight", "base"), [(0.04, 1), (0.0, 0)])
def test_flow_grpo_evaluations_equal_the_closed_form(place, train_steps, trained, kl_weight, base):
    grpo = GRPO(train_steps=train_steps)
    found = counted(place, FlowGRPO, reward=tiny.Brightness(), grpo=grpo, kl_weight=kl_weight, inner_epochs=2)
    expected = {"generator": K * B + 2 * trained * B, "teacher": base * 2 * trained * B}
    assert found == {role: count for role, count in expected.items() if count}


@pytest.mark.parametrize(("train_steps", "trained"), [(None, K), (2, 2)])
@pytest.mark.parametrize(("kl_weight", "base"), [(1e-4, 1), (0.0, 0)])
def test_nft_evaluations_equal_the_closed_form(place, train_steps, trained, kl_weight, base):
    found = counted(
        place, DiffusionNFT, reward=tiny.Brightness(), nft=NFT(train_steps=train_steps), kl_weight=kl_weight
    )
    expected = {"generator": trained * B, "old": K * B + trained * B, "teacher": base * trained * B}
    assert found == {role: count for role, count in expected.items() if count}


@pytest.mark.parametrize("method", [FlowGRPO, DiffusionNFT])
def test_reference_of_the_start_is_asked_instead_of_the_teacher(place, method):
    options = {"reward": tiny.Brightness(), "kl_weight": 0.1}
    teacher, start = (counted(place, method, kl_reference=each, **options) for each in ("teacher", "start"))
    assert start == {"reference" if role == "teacher" else role: count for role, count in teacher.items()}
    guided = counted(place, method, kl_guidance_scale=3.0, **options)
    assert guided == teacher | {"teacher": 2 * teacher["teacher"]}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"joint": "grpo", "grpo": GRPO(train_steps=2)}, {"generator": K * B + 2 * B}),
        ({"joint": "nft"}, {"generator": K * B, "old": 2 * K * B}),
    ],
    ids=["refl", "grpo", "nft"],
)
def test_dmdr_costs_what_dmd_costs_and_its_reward_term(place, options, more):
    expected = {"generator": ROLLOUT, "teacher": 2 * B, "fake_score": B + C * B}
    expected = {role: expected.get(role, 0) + more.get(role, 0) for role in {**expected, **more}}
    assert cost(place, DMDR, reward=tiny.Brightness(), **options) == expected


def test_cold_start_asks_the_fake_score_in_place_of_the_teacher(tiny_pipeline):
    options = {"reward": tiny.Brightness(), "lora": LoRA(2, 4), "cold_start": ColdStart(ramp=5)}
    assert cost(tiny_pipeline, DMDR, **options) == {"generator": ROLLOUT, "fake_score": 3 * B + C * B}
