"""One update of ReFL in the world that is known in closed form."""

import pytest
import tiny
import torch
from world import COLORS, GaussianFamily, Liking, PlainEngine, World, liking, near

from gdmd_lightning.data.embeddings import PromptEmbeddings
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.prompts import Prompt

pytestmark = pytest.mark.usefixtures("float64")


def slope(world: World) -> torch.Tensor:
    """Gradient of each sample's reward in its latent, ``[B, C, H, W]``."""
    taste = torch.tensor([1.0, 0.5, -0.25])[:, None, None] * torch.tensor([1.0, 0.2, -0.6]).expand(3, 2, 3)
    signs = torch.tensor([1.0 if c[0] > 0 else -1.0 for c in world.c])
    return 10 * signs.view(-1, 1, 1, 1) * torch.einsum("pc,phw->chw", COLORS, taste) / taste.numel()


def sample(world: World):
    (state,) = world.questions("generator", learning=True)
    return state, world.x0("generator", state.x, state.sigma, state.c)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_generator_gradient_is_the_rewards_own(weight):
    world = World(ReFL, reward=Liking(), weight=weight)
    _, steps = world.update()
    state, _ = sample(world)
    near(steps[0].gradient, world.pull_back("generator", state.sigma, state.c, -weight * slope(world) / len(state.x)))


def test_each_micro_batch_is_judged_with_its_own_prompts():
    reward = Liking()
    world = World(ReFL, reward=reward, micro_batch_size=2)
    world.update()
    assert [prompt for _, prompts in reward.asked for prompt in prompts] == list(world.batch.prompts)


def test_samples_at_the_margin_give_no_gradient():
    world = World(ReFL, reward=Liking(), prompts=5)
    world.update()
    world.module.updates = 0
    margin = float(liking(GaussianFamily().decode(sample(world)[1]), world.batch.prompts).median()) + 1e-3
    world.module.margin = margin
    done, steps = world.update()
    state, x = sample(world)
    reward = liking(GaussianFamily().decode(x), world.batch.prompts)
    below = (reward < margin).double()
    assert 0 < below.sum() < len(below)
    expected = world.pull_back("generator", state.sigma, state.c, -below.view(-1, 1, 1, 1) * slope(world) / len(x))
    near(steps[0].gradient, expected)
    near(done.logs["loss"], (margin - reward).clamp(min=0).mean())


def test_one_step_raises_the_reward():
    world = World(ReFL, reward=Liking())
    before = world.update(rate=0.1)[0].logs["reward_sample"]
    state = sample(world)[0]
    x = world.x0("generator", state.x, state.sigma, state.c, now=True)
    assert liking(GaussianFamily().decode(x), world.batch.prompts).mean() > before


def test_all_samples_are_at_the_last_step():
    world = World(ReFL, reward=Liking(), steps=3)
    world.update()
    assert (sample(world)[0].sigma == world.module.sigmas[2]).all()
    assert [len(q.x) for q in world.questions("generator", learning=False)] == [6, 6]


def test_logs_are_the_closed_form_figures():
    world = World(ReFL, reward=Liking(), weight=0.5)
    done, _ = world.update()
    reward = liking(GaussianFamily().decode(sample(world)[1]), world.batch.prompts).mean()
    near(done.logs, {"loss": -0.5 * reward, "reward_sample": reward})


def test_reward_scores_decoded_samples_under_their_prompts():
    world = World(ReFL, reward=Liking())
    world.update()
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(sample(world)[1]))
    assert prompts == world.batch.prompts


def test_only_the_generator_is_stepped_and_its_average_follows():
    world = World(ReFL, reward=Liking(), ema_decay=0.5)
    before = world.weights("ema")
    _, steps = world.update(rate=0.1)
    assert [step.role for step in steps] == ["generator"]
    after = world.weights("generator")
    near(world.weights("ema"), {name: (before[name] + after[name]) / 2 for name in before})


class Contrast(tiny.Brightness):
    """Brightness that a prompt without "red" dislikes."""

    def score(self, images, prompts):
        sign = torch.tensor([1.0 if "red" in prompt.text else -1.0 for prompt in prompts]).to(images)
        # Near 0, where float32 is fine enough for differences.
        return sign * super().score(images.double() - 0.5, prompts)


def test_gradient_on_a_tiny_pipeline_is_that_of_finite_differences(tiny_pipeline, monkeypatch):
    """Through a real decoder and the last step of a real network, in float64."""
    family = tiny.family(tiny_pipeline)
    module = ReFL(family, Contrast(), steps=2, height=16, width=32)
    module.build_roles(family.load().double())
    module.roles.double()
    family.loaded.vae.double()
    texts = ("a red circle", "a blue square")
    conditioning = PromptEmbeddings(family)(texts)
    batch = Batch(tuple(Prompt(text) for text in texts), torch.arange(2), conditioning)
    # The reward's gradient stops at the last step: its input stays where it is.
    state = module.rollout_state(batch, step_index=1)
    monkeypatch.setattr(module, "rollout_state", lambda batch, step_index: state)
    weight = module.roles.standalone("generator").proj_out.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def loss_at(offset):
        with torch.no_grad():
            weight.add_(offset * direction)
        engine = PlainEngine(module.roles)
        module.update(batch, engine)
        with torch.no_grad():
            weight.sub_(offset * direction)
        return float(engine.steps[0].losses[0])

    h = 3e-3  # pixels are clamped, which wants it small; images are float32, which wants it large
    difference = loss_at(h) - loss_at(-h)
    loss_at(0.0)
    slope = float((weight.grad * direction).sum())
    assert abs(slope) > 1e-4
    assert abs(difference / (2 * h) / slope - 1) < 2e-2
