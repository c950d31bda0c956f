"""What all methods share: settings, states of rollouts, and the streams of an update."""

import pytest
import tiny
import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.samplers import CPS
from gdmd_lightning.streams import draw_uniform


@pytest.fixture(scope="module")
def module(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def batch(module) -> Batch:
    prompts = PromptBatch(tuple(Prompt(text) for text in "aabbccdd"), group_size=2)
    return Batch(prompts.prompts, prompts.groups, module.embeddings([p.text for p in prompts.prompts]))


def test_module_refuses_no_steps(tiny_pipeline):
    with pytest.raises(UserError, match=r"DMD\.steps: it is 0; use an integer in \[1, 1000\]"):
        tiny.module(tiny_pipeline, DMD, steps=0)


def test_rollout_state_knows_its_step_and_sigma(module, batch):
    state = module.rollout_state(batch)
    assert torch.equal(state.latents.sigma, module.sigmas[state.step_index])


def test_rollout_state_covers_all_steps_and_keeps_a_prompts_samples_together(module, batch):
    index = module.rollout_state(batch).step_index
    assert torch.equal(index[::2], index[1::2])
    assert sorted(index[::2].tolist()) == [0, 1, 2, 3]


def test_rollout_state_at_one_step_brings_all_samples_there(module, batch):
    assert module.rollout_state(batch, step_index=3).step_index.tolist() == [3] * 8


def test_rollout_state_is_a_state_of_the_full_rollout(module, batch):
    state, path = module.rollout_state(batch, step_index=2), module.rollout(batch)
    torch.testing.assert_close(state.latents.x, path.states[2])


def test_rollout_takes_another_sampler(module, batch):
    assert not torch.equal(module.rollout(batch).x0, module.rollout(batch, sampler=CPS(0.5)).x0)


def test_stream_differs_by_update_purpose_and_turn(module):
    def draw(*name):
        return tuple(draw_uniform((3,), module.stream(*name)).tolist())

    found = [draw("a"), draw("b"), draw("a", 1)]
    assert draw("a") == found[0]
    module.updates = 1
    try:
        found.append(draw("a"))
    finally:
        module.updates = 0
    assert len(set(found)) == 4
