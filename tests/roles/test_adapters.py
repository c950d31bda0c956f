"""Adapters on one base equal separate networks to the bit, with their gradients, in any order of calls."""

import copy

import pytest
import tiny
import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.roles import AdapterRoles, LoRA, Optimization, RoleSpec

TEXTS = ["a red circle", "two blue squares"]
LORA = LoRA(rank=4, alpha=8)
ADAPTERS = ("generator", "fake_score", "old", "ema", "fake_score@1")
SPECS = (
    RoleSpec("generator", optimizer=Optimization()),
    RoleSpec("ema", average_of="generator", decay=0.9),
    RoleSpec("fake_score", optimizer=Optimization()),
    RoleSpec("old", average_of="generator", decay=0.5),
    RoleSpec("fake_score@1", snapshot_of="fake_score"),
)
FEW = SPECS[:3]


@pytest.fixture(
    scope="module", params=["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "flux2"))]
)
def family(request, tmp_path_factory) -> ModelFamily:
    path = tmp_path_factory.mktemp(request.param) / "pipeline"
    match request.param:
        case "sd3":
            family: ModelFamily = tiny.family(tiny.save_pipeline(path, layers=2))
        case "sdxl":
            family = SDXLFamily(str(tiny.save_sdxl(path)))
        case _:
            family = Flux2KleinFamily(str(tiny.save_flux2(path)), max_sequence_length=16, text_layers=(1, 2))
    family.load()
    return family


def network_of(family: ModelFamily) -> nn.Module:
    """A fresh copy of the family's network."""
    components = family.loaded.components
    return copy.deepcopy(components.get("transformer") or components["unet"])


def cast(family: ModelFamily, *, checkpointing: bool = False, **options) -> AdapterRoles:
    """Roles with random adapters, all different."""
    roles = AdapterRoles(family, network_of(family), SPECS, lora=LORA, **options)
    if checkpointing:
        roles.checkpoint_activations()
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if not roles.is_frozen(name):
                parameter.copy_(torch.randn(parameter.shape, generator=stream) / 4)
    return roles


def alone(family: ModelFamily, roles: AdapterRoles, role: str) -> nn.Module:
    """A separate network with this role's adapter only, as peft is commonly used."""
    from peft import LoraConfig

    network = network_of(family).eval().requires_grad_(False)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.endswith(tuple(f".{target}" for target in family.lora_targets))]
    network.add_adapter(LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets), "mine")
    state = roles.state_dict()
    with torch.no_grad():
        for name, parameter in adapter_of(network):
            parameter.copy_(state[f"network.{name.replace('.mine.', f'.{role}.')}"])
    return network


def adapter_of(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in network.named_parameters() if ".lora_" in name]


def inputs(family: ModelFamily) -> NoisyLatents:
    shape = family.latent_shape(32, 32)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    return NoisyLatents(x, torch.tensor([0.8, 0.3]), family.encode(TEXTS))


def ask(family: ModelFamily, network: nn.Module, guidance_scale: float = 1.0) -> torch.Tensor:
    """Velocity of a separate network at :func:`inputs`."""
    at = inputs(family)
    return family.predict_velocity(network, at.x, at.sigma, at.conditioning, guidance_scale)


@pytest.mark.parametrize("role", ADAPTERS)
def test_velocity_of_a_role_equals_that_of_a_separate_network_to_the_bit(family, role):
    roles = cast(family)
    network = alone(family, roles, role)
    with torch.no_grad():
        expected = ask(family, network)
    for other in ("teacher", *ADAPTERS):
        roles.velocity(other, inputs(family))
    assert torch.equal(roles.velocity(role, inputs(family)), expected)


def test_velocity_of_the_teacher_equals_that_of_the_base_to_the_bit(family):
    roles = cast(family)
    with torch.no_grad():
        expected = ask(family, network_of(family).eval(), 3.0)
    assert torch.equal(roles.velocity("teacher", inputs(family), guidance_scale=3.0), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("learner", ["generator", "fake_score"])
def test_learning_gives_the_gradients_of_a_separate_network_to_the_bit(family, learner, checkpointing):
    roles = cast(family, checkpointing=checkpointing)
    network = alone(family, roles, learner)
    if checkpointing:
        network.enable_gradient_checkpointing()
    ask(family, network).square().sum().backward()
    with roles.learning(learner):
        roles.velocity("ema", inputs(family))
        loss = roles.velocity(learner, inputs(family)).square().sum()
        # Evaluate all other roles between the forward and its backward.
        for other in ("teacher", *ADAPTERS):
            if other != learner:
                roles.velocity(other, inputs(family))
        loss.backward()
    expected = {name.replace(".mine.", f".{learner}."): p.grad for name, p in adapter_of(network)}
    found = {name.removeprefix("network."): p.grad for name, p in roles.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_learning_adds_the_gradients_of_two_forwards(family, checkpointing):
    roles = cast(family, checkpointing=checkpointing)

    def gradients(*scales: float) -> list[torch.Tensor]:
        roles.zero_grad()
        with roles.learning("generator"):
            sum(scale * roles.velocity("generator", inputs(family)).square().sum() for scale in scales).backward()
        return [p.grad.clone() for p in roles.parameters_of("generator")]

    for twice, once in zip(gradients(1.0, 1.0), gradients(2.0), strict=True):
        torch.testing.assert_close(twice, once)


def test_adapters_start_without_effect_and_followers_equal_their_sources(family):
    roles = AdapterRoles(family, network_of(family), SPECS, lora=LORA)
    answers = [roles.velocity(role, inputs(family)) for role in ("teacher", *ADAPTERS)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    state = roles.state_dict()
    for spec in SPECS:
        if spec.source is not None:
            for name in roles.names_of(spec.source):
                assert torch.equal(state[name], state[name.replace(f".{spec.source}.", f".{spec.name}.")])


def test_adapters_start_from_the_seed_only(family):
    torch.manual_seed(1)
    one = AdapterRoles(family, network_of(family), FEW, lora=LORA)
    torch.manual_seed(2)
    after = torch.get_rng_state()
    other = AdapterRoles(family, network_of(family), FEW, lora=LORA)
    assert torch.equal(torch.get_rng_state(), after)
    assert tiny.differing(dict(one.state_dict()), dict(other.state_dict())) == []


def test_adapters_of_averages_move_by_their_decay_and_snapshots_stay(family):
    roles = cast(family)
    before = {name: tensor.clone() for name, tensor in roles.state_dict().items()}
    roles.update_averages("generator")
    roles.copy("fake_score", "fake_score@1")
    for role, decay in (("ema", 0.9), ("old", 0.5)):
        for name in roles.names_of("generator"):
            its = name.replace(".generator.", f".{role}.")
            expected = decay * before[its] + (1 - decay) * before[name]
            torch.testing.assert_close(roles.state_dict()[its], expected)
    kept = roles.velocity("fake_score@1", inputs(family))
    assert torch.equal(kept, roles.velocity("fake_score", inputs(family)))
    with torch.no_grad():
        for parameter in roles.parameters_of("fake_score"):
            parameter.add_(1)
    assert torch.equal(kept, roles.velocity("fake_score@1", inputs(family)))


def test_standalone_is_a_plain_network_with_the_roles_output(family):
    roles = cast(family, checkpointing=True)
    network = roles.standalone("ema")
    assert {n for n, _ in network.named_parameters()} == {n for n, _ in network_of(family).named_parameters()}
    with torch.no_grad():
        found = ask(family, network)
    expected = roles.velocity("ema", inputs(family))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(expected, roles.velocity("teacher", inputs(family)))


def test_standalone_keeps_changes_that_are_smaller_than_a_step_of_the_base(family):
    network = network_of(family).bfloat16()
    roles = AdapterRoles(family, network, SPECS, lora=LORA)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if name.endswith(("lora_A.ema.weight", "lora_B.ema.weight")):
                parameter.fill_(1e-4)
    found, base = roles.standalone("ema").state_dict(), roles.standalone("teacher").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        adapted = name.removesuffix(".weight") in {each.rpartition(".lora_A")[0] for each in network.state_dict()}
        change = LORA.alpha / LORA.rank * LORA.rank * 1e-8 if adapted else 0.0
        torch.testing.assert_close(tensor.double(), base[name].double() + change, atol=4e-9, rtol=2e-7)
        assert adapted == (name.endswith(".weight") and not torch.equal(tensor, base[name].float())), name


def test_adapters_of_trained_roles_only_require_gradient_from_the_start(family):
    roles = AdapterRoles(family, network_of(family), SPECS, lora=LORA)
    asking = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert asking == {*roles.names_of("generator"), *roles.names_of("fake_score")}


def storage_bytes(tensors) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_adapters_share_one_base_in_memory(family):
    network = network_of(family)
    base = storage_bytes([*network.parameters(), *network.buffers()])
    roles = AdapterRoles(family, network, SPECS, lora=LORA)
    adapters = storage_bytes(p for name, p in roles.named_parameters() if not roles.is_frozen(name))
    assert storage_bytes([*roles.parameters(), *roles.buffers()]) <= 1.1 * (base + adapters)


@pytest.mark.slow
def test_adapters_share_one_base_in_memory_at_half_a_billion_parameters():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(
            num_layers=12, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536
        )
        base = storage_bytes(network.parameters())
        family = tiny.SD3Family.__new__(tiny.SD3Family)  # only its list of targets is used
        roles = AdapterRoles(family, network, (*SPECS, RoleSpec("fake_score@2", snapshot_of="fake_score")), lora=LoRA())
    assert base > 4 * 5e8
    adapters = sum(4 * p.numel() for name, p in roles.named_parameters() if not roles.is_frozen(name))
    whole = storage_bytes([*roles.parameters(), *roles.buffers()])
    assert base + adapters <= whole <= 1.1 * (base + adapters)
    assert whole <= 1.2 * base


def test_adapters_are_float32_on_a_bfloat16_base(family):
    roles = AdapterRoles(family, network_of(family).bfloat16(), FEW, lora=LORA)
    kinds = {(roles.is_frozen(name), p.dtype) for name, p in roles.named_parameters()}
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    with roles.learning("generator"):
        v = roles.velocity("generator", inputs(family))
        v.square().mean().backward()
    assert v.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in roles.parameters_of("generator"))


def test_lora_refuses_an_unknown_target_and_rank_zero(family):
    with pytest.raises(UserError, match="LoRA target 'to_qq' matches no module"):
        AdapterRoles(family, network_of(family), FEW, lora=LoRA(targets=("to_q", "to_qq")))
    with pytest.raises(UserError, match=r"LoRA\.rank: it is 0"):
        LoRA(rank=0)


def test_state_dict_restores_all_adapters(family):
    roles, other = cast(family), AdapterRoles(family, network_of(family), SPECS, lora=LORA)
    other.load_state_dict({k: v for k, v in roles.state_dict().items() if not roles.is_frozen(k)}, strict=False)
    assert tiny.differing(dict(roles.state_dict()), dict(other.state_dict())) == []


def test_adapters_start_independently_of_the_other_roles(family):
    alone = AdapterRoles(family, network_of(family), (SPECS[2],), lora=LORA).state_dict()
    among = AdapterRoles(family, network_of(family), SPECS, lora=LORA).state_dict()
    names = [name for name in alone if ".fake_score." in name]
    assert names
    assert all(torch.equal(alone[name], among[name]) for name in names)


def test_adapter_scale_zero_equals_the_teacher_to_the_bit(family):
    roles = cast(family)
    found = roles.velocity("ema", inputs(family), adapter_scale=0.0)
    assert torch.equal(found, roles.velocity("teacher", inputs(family)))
    assert not torch.equal(found, roles.velocity("ema", inputs(family)))


def test_adapter_scale_equals_scaled_weights(family):
    roles = cast(family)
    found = roles.velocity("ema", inputs(family), adapter_scale=0.25)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if ".lora_B.ema." in name:
                parameter.mul_(0.25)
    torch.testing.assert_close(found, roles.velocity("ema", inputs(family)))


def test_adapter_scale_ends_with_its_evaluation(family):
    roles = cast(family)
    before = {role: roles.velocity(role, inputs(family)) for role in ADAPTERS}
    roles.velocity("ema", inputs(family), adapter_scale=0.5)
    assert all(torch.equal(roles.velocity(role, inputs(family)), before[role]) for role in ADAPTERS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_scale_applies_in_the_backward_of_the_learner(family, checkpointing):
    plain, checkpointed = cast(family), cast(family, checkpointing=checkpointing)
    for roles in (plain, checkpointed):
        with roles.learning("generator"):
            loss = roles.velocity("generator", inputs(family), adapter_scale=0.5).square().sum()
            roles.velocity("ema", inputs(family))
            loss.backward()
    pairs = zip(plain.parameters_of("generator"), checkpointed.parameters_of("generator"), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("role", ["teacher", *ADAPTERS])
def test_through_passes_gradient_to_the_input_and_to_no_weight(family, role):
    roles, latents = cast(family), inputs(family)
    latents.x.requires_grad_()
    asking = [p.requires_grad for p in roles.parameters()]
    roles.velocity(role, latents, through=True).square().sum().backward()
    assert latents.x.grad.abs().sum() > 0
    assert all(p.grad is None for p in roles.parameters())
    assert [p.requires_grad for p in roles.parameters()] == asking


def test_through_gradient_equals_that_of_a_separate_network(family):
    roles, latents = cast(family), inputs(family)
    latents.x.requires_grad_()
    (found,) = torch.autograd.grad(roles.velocity("ema", latents, through=True).square().sum(), latents.x)
    network = alone(family, roles, "ema")
    v = family.predict_velocity(network, latents.x, latents.sigma, latents.conditioning)
    (expected,) = torch.autograd.grad(v.square().sum(), latents.x)
    assert torch.equal(found, expected)


def test_features_equal_those_of_a_separate_network(family):
    roles, latents = cast(family), inputs(family)
    with torch.no_grad():
        network = alone(family, roles, "fake_score")
        expected = family.features(network, latents.x, latents.sigma, latents.conditioning)
    assert torch.equal(roles.features("fake_score", latents), expected)
    assert not torch.equal(roles.features("teacher", latents), expected)


def test_velocity_of_an_undeclared_role_is_a_key_error(family):
    roles = AdapterRoles(family, network_of(family), FEW, lora=LORA)
    with pytest.raises(KeyError, match="old"):
        roles.velocity("old", inputs(family))


def test_parameters_of_a_role_are_found_once_and_stay_those_of_the_network(family, monkeypatch):
    roles = cast(family)
    expected = {name: p for name, p in roles.network.named_parameters() if ".lora_" in name and ".fake_score." in name}
    assert [id(p) for p in roles.parameters_of("fake_score")] == [id(p) for p in expected.values()]
    monkeypatch.setattr(roles.network, "named_parameters", lambda: pytest.fail("walked over the network again"))
    assert [id(p) for p in roles.parameters_of("fake_score")] == [id(p) for p in expected.values()]
    layer = next(module for module in roles.network.modules() if hasattr(module, "lora_A"))
    layer.lora_A["fake_score"].weight = nn.Parameter(torch.zeros_like(layer.lora_A["fake_score"].weight))
    assert any(p is layer.lora_A["fake_score"].weight for p in roles.parameters_of("fake_score"))
