"""One update of ReFL in the world that is known in closed form."""

import pytest
import tiny
import torch
from world import COLORS, SHAPE, GaussianFamily, Liking, World, liking, near

from gdmd_lightning.data.embeddings import PromptEmbeddings
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


def test_samples_at_the_margin_give_no_gradient():
    world = World(ReFL, reward=Liking(), margin=0.2, prompts=5)
    done, steps = world.update()
    state, x = sample(world)
    reward = liking(GaussianFamily().decode(x), world.batch.prompts)
    below = (reward < 0.2).double()
    assert 0 < below.sum() < len(below)
    expected = world.pull_back("generator", state.sigma, state.c, -below.view(-1, 1, 1, 1) * slope(world) / len(x))
    near(steps[0].gradient, expected)
    near(done.logs["loss"], (0.2 - reward).clamp(min=0).mean())


def test_one_step_raises_the_reward():
    world = World(ReFL, reward=Liking())
    before = world.update(rate=0.1)[0].logs["reward_sample"]
    state = sample(world)[0]
    x = world.x0("generator", state.x, state.sigma, state.c)
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


class ExactBrightness(tiny.Brightness):
    """Its own prompt's brightness: some prompts like darkness."""

    def score(self, images, prompts):
        sign = torch.tensor([1.0 if "red" in prompt.text else -1.0 for prompt in prompts]).to(images)
        return sign * super().score(images, prompts)


def test_gradient_on_a_tiny_pipeline_is_that_of_finite_differences(tiny_pipeline):
    """Through a real decoder and the last step of a real network, in float64."""
    family = tiny.family(tiny_pipeline)
    module = ReFL(family, ExactBrightness(), steps=2, height=16, width=32)
    module.build_roles(family.load().double())
    module.roles.double()
    family.loaded.vae.double()
    family.decode = lambda latents: decode_exactly(family, latents)
    texts = ("a red circle", "a blue square")
    conditioning = PromptEmbeddings(family)(texts)
    from gdmd_lightning.latents import Batch

    batch = Batch(tuple(Prompt(text) for text in texts), torch.arange(2), conditioning)
    generator = module.roles.standalone("generator")
    name, weight = next((n, p) for n, p in generator.named_parameters() if n.endswith("proj_out.weight"))
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    class Losses:
        def __init__(self, backward):
            self.do, self.losses = backward, []

        def __call__(self, role):
            from contextlib import contextmanager

            @contextmanager
            def step():
                with module.roles.learning(role):
                    yield self.add

            return step()

        def add(self, loss):
            self.losses.append(float(loss))
            if self.do:
                loss.backward()

    def loss_at(offset):
        with torch.no_grad():
            weight.add_(offset * direction)
        start = frozen_start(module, batch)
        learn = Losses(backward=offset == 0)
        module.rollout_state = lambda *_, **__: start
        module.update(batch, learn)
        with torch.no_grad():
            weight.sub_(offset * direction)
        return learn.losses[0]

    states = {}

    def frozen_start(module, batch):
        if "state" not in states:
            states["state"] = type(module).rollout_state(module, batch, step_index=1)
        return states["state"]

    loss_at(0)
    slope = float((weight.grad * direction).sum())
    step = 1e-4
    measured = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert abs(slope) > 1e-6
    assert abs(measured / slope - 1) < 1e-4


def decode_exactly(family, latents):
    vae = family.loaded.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents, return_dict=False)[0] / 2 + 0.5
