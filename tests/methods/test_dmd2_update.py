"""One update of DMD2 in the world that is known in closed form: features are velocities, the head is written out."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn.functional import softplus
from world import SHAPE, World, near

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.gan_terms import GAN, GANDraw
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.roles import LoRA
from gdmd_lightning.roles.heads import FeatureHead
from gdmd_lightning.roles.spec import Head
from gdmd_lightning.schedules import Uniform

pytestmark = pytest.mark.usefixtures("float64")


def dmd2(gan=GAN(0.7, 0.4, hidden=5), method=DMD2, **options) -> World:
    more = {"gan": gan, "images": ShapesImages()} if method is DMD2 else {}
    matching = Matching(guidance_scale=2.5, fake_score_updates=2)
    world = World(method, **{"matching": matching, "prompts": 4, **more, **options})
    real = torch.randn(len(world.batch), *SHAPE, generator=torch.Generator().manual_seed(3))
    world.batch = replace(world.batch, real_x0=1 + real)
    return world


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def head_weights(world: World) -> dict[str, torch.Tensor]:
    return world.weights("discriminator")


def logits(weights: dict[str, torch.Tensor], velocity: torch.Tensor) -> torch.Tensor:
    """Layer normalization, a layer with SiLU, a layer with one output; averaged over positions."""
    scale, shift, first, bias, second, last = weights.values()
    tokens = velocity.flatten(2).transpose(1, 2)
    centered = tokens - tokens.mean(2, keepdim=True)
    normal = centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt() * scale + shift
    inner = torch.einsum("btd,hd->bth", normal, first) + bias
    return (torch.einsum("bth,oh->bto", inner * torch.sigmoid(inner), second) + last).mean((1, 2))


def draws(world: World, purpose: str, turn: int = 0) -> GANDraw:
    module = world.module
    return GANDraw.of(module.gan, len(world.batch), SHAPE, module.stream(purpose, turn), torch.device("cpu"))


def sample(world: World):
    (state,) = world.questions("generator", learning=True)
    return state, world.x0("generator", state.x, state.sigma, state.c)


def test_generator_gradient_is_the_closed_form():
    world = dmd2()
    against, weights = draws(world, "gan"), head_weights(world)
    done, steps = world.update()
    state, x = sample(world)
    (teacher,), (fake,) = world.questions("teacher"), world.questions("fake_score", inside="generator")
    real = world.x0("teacher", teacher.x, teacher.sigma, world.c, 2.5)
    n = (x - real).abs().mean((1, 2, 3))
    d_x = (world.x0("fake_score", fake.x, fake.sigma, world.c) - real) / column(n) / x.numel()
    leaf, sigma = x.clone().requires_grad_(), column(against.sigma)
    x_t = (1 - sigma) * leaf + sigma * against.eps_fake
    velocity = (x_t - world.x0("fake_score", x_t, against.sigma, world.c)) / sigma
    loss = softplus(-logits(weights, velocity)).mean()
    d_x = d_x + 0.7 * torch.autograd.grad(loss, leaf)[0]
    near(steps[0].gradient, world.pull_back("generator", state.sigma, state.c, d_x), rtol=1e-5)
    near(done.logs["gan_loss"], loss.detach())
    (asked,) = world.questions("fake_score features", inside="generator")
    near(asked.x, x_t.detach())
    assert torch.equal(asked.c, world.c)


def compared(world: World, turn: int):
    """Renoised real and generated latents of a turn, and the level they share."""
    pair, (_, x) = draws(world, "gan critic", turn), sample(world)
    s = column(pair.sigma)
    ends = ((world.batch.real_x0, pair.eps_real), (x, pair.eps_fake))
    return [(1 - s) * end + s * eps for end, eps in ends], pair.sigma


@pytest.mark.parametrize("weight", [None, lambda sigma: (1 - sigma) ** 2], ids=["velocity", "noise"])
def test_fake_score_gradient_is_flow_matching_plus_the_discriminators_loss(weight):
    world = dmd2()
    if weight is not None:
        world.module.family.error_weight = weight
    weights = head_weights(world)
    _, steps = world.update()
    world.module.updates = 0
    _, x = sample(world)
    asked = world.questions("fake_score", learning=True)
    own = [step for step in steps if step.role == "fake_score"]
    assert [step.role for step in steps] == ["generator", *["fake_score", "discriminator"] * 2]
    for turn, (q, found) in enumerate(zip(asked, own, strict=True)):
        s = column(q.sigma)
        eps = (q.x - (1 - s) * x) / s
        d_velocity = 2 * ((q.x - world.x0("fake_score", q.x, q.sigma, q.c)) / s - (eps - x)) / x.numel()
        if weight is not None:
            d_velocity = weight(s) * d_velocity
        expected = world.pull_back("fake_score", q.sigma, q.c, -d_velocity / s)
        latents, sigma = compared(world, turn)
        ends = [world.x0("fake_score", x_t, sigma, world.c).requires_grad_() for x_t in latents]
        real, fake = (logits(weights, (x_t - end) / column(sigma)) for x_t, end in zip(latents, ends, strict=True))
        loss = (softplus(-real) + softplus(fake)).mean()
        for d_x0 in torch.autograd.grad(0.4 * loss, ends):
            part = world.pull_back("fake_score", sigma, world.c, d_x0)
            expected = {name: expected[name] + part[name] for name in part}
        near(found.gradient, expected, rtol=1e-5)
        features = world.questions("fake_score features", inside="fake_score")[2 * turn : 2 * turn + 2]
        for question, x_t in zip(features, latents, strict=True):
            near(question.x, x_t)
            assert torch.equal(question.c, world.c)


def test_discriminator_gradient_is_the_closed_form_at_the_features_of_the_fake_scores_step():
    world = dmd2(matching=Matching(fake_score_updates=1))
    leaves = {name: value.requires_grad_() for name, value in head_weights(world).items()}
    done, steps = world.update(rate=0.3)  # the fake score has moved when the discriminator steps
    world.module.updates = 0
    latents, sigma = compared(world, 0)
    velocities = [(x_t - world.x0("fake_score", x_t, sigma, world.c)) / column(sigma) for x_t in latents]
    real, fake = (logits(leaves, velocity) for velocity in velocities)
    loss = (softplus(-real) + softplus(fake)).mean()
    expected = dict(zip(leaves, torch.autograd.grad(0.4 * loss, list(leaves.values())), strict=True))
    near(steps[2].gradient, expected, rtol=1e-5)
    near(done.logs["discriminator_loss"], loss.detach())


def test_without_its_weights_dmd2_is_dmd():
    found = []
    for world in (dmd2(method=DMD), dmd2(GAN(0.0, 0.0))):
        _, steps = world.update()
        found.append([step.gradient for step in steps if step.role != "discriminator"])
    near(*found, rtol=0, atol=0)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    found = [[step.gradient for step in dmd2(micro_batch_size=size).update()[1]] for size in (None, 3)]
    assert len(found[0]) == 5
    near(*found)


def test_turns_and_generator_compare_at_levels_and_noise_of_their_own():
    world = dmd2(GAN(renoise_distribution=Uniform(0.0, 1.0)))
    found = [draws(world, "gan"), draws(world, "gan critic", 0), draws(world, "gan critic", 1)]
    for one in found:
        assert torch.equal((one.sigma * len(world.batch)).long(), torch.arange(len(world.batch)))
        assert not torch.allclose(one.eps_real, one.eps_fake)
    assert len({float(one.sigma[0]) for one in found}) == 3
    assert len({float(one.eps_fake.sum()) for one in found}) == 3


# Settings, and real images in a run.


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"generator_weight": -1.0}, r"GAN\.generator_weight: it is -1\.0"),
        ({"fake_score_weight": -1.0}, r"GAN\.fake_score_weight: it is -1\.0"),
        ({"hidden": 0}, r"GAN\.hidden: it is 0"),
    ],
)
def test_gan_refuses_numbers_out_of_range(wrong, said):
    with pytest.raises(UserError, match=said):
        GAN(**wrong)


def test_prompts_without_images_are_refused_before_anything_is_loaded(tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    module = tiny.module(tiny_pipeline, DMD2, images=ShapesImages())
    with pytest.raises(UserError, match=r"model\.images: ShapesImages cannot draw the prompts of"):
        tiny.trainer(1).fit(module, datamodule=PromptDataModule(str(tmp_path / "prompts.txt"), 4, 2))
    assert not hasattr(module, "roles")


def test_initial_weights_of_a_head_leave_the_global_random_stream():
    before = torch.get_rng_state()
    FeatureHead(4, Head(hidden=2, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lora", [None, LoRA(2, 4)], ids=["copies", "adapters"])
def test_discriminator_is_a_role_that_only_its_own_step_changes(tiny_pipeline, lora):
    torch.set_default_dtype(torch.float32)
    module = tiny.module(tiny_pipeline, DMD2, images=ShapesImages(), lora=lora, micro_batch_size=2)
    module.configure_model()
    roles = module.roles
    names = roles.names_of("discriminator")
    assert len(names) == len(roles.parameters_of("discriminator")) == 6
    assert not set(names) & set(roles.names_of("teacher"))
    assert {f"roles.{name}" for name in names} <= set(module.state_dict())
    other = tiny.module(tiny_pipeline, DMD2, images=ShapesImages(), lora=lora, seed=1)
    other.configure_model()
    assert tiny.differing(values(module), values(other))
    same = tiny.module(tiny_pipeline, DMD2, images=ShapesImages(), lora=lora)
    same.configure_model()
    assert tiny.differing(values(module), values(same)) == []
    before = [value.clone() for value in values(module)]
    real = module.real_x0(tiny_batch())
    assert real.shape == (4, *module.latent_shape)
    assert torch.equal(real, module.real_x0(tiny_batch()))
    tiny.train(module, 1, data={"batch_size": 4, "group_size": 2})
    assert len(tiny.differing(before, values(module))) == 6
    assert not torch.equal(real, module.real_x0(tiny_batch()))


def tiny_batch():
    from gdmd_lightning.shapes.captions import evaluation_prompts

    return evaluation_prompts(1)[:4]


def values(module) -> list[torch.Tensor]:
    return list(module.roles.parameters_of("discriminator"))
