"""``model.speed.compile``: compiled blocks give the update of those that are not, and what cannot work is refused."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo import utils

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Memory, Speed
from gdmd_lightning.roles import CopiedRoles, Head, LoRA, Optimization, RoleSpec
from gdmd_lightning.roles.compiling import compile_blocks
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy

LORA = LoRA(2, 4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Three blocks, of which the last is of another structure and the middle one has the features."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("blocks") / "pipeline", layers=3)


@pytest.fixture
def backend(monkeypatch):
    """``backend(name)``: compile for a backend that needs no compiler of C++, and start without compiled code."""
    original = nn.Module.compile
    torch._dynamo.reset()
    utils.counters.clear()

    def choose(name):
        monkeypatch.setattr(nn.Module, "compile", lambda self, **given: original(self, backend=name, **given))

    yield choose
    torch._dynamo.reset()


def graphs() -> int:
    return utils.counters["stats"]["unique_graphs"]


def fit(pipeline, method, updates=1, **options):
    module = tiny.module(pipeline, method, **options)
    tiny.train(module, updates)
    return module


def compiled(network) -> list[str]:
    return [name for name, module in network.named_modules() if module._compiled_call_impl is not None]


class Until(Exception):
    """Ends a fit before anything is computed."""


def configured(pipeline, method=DMD, **options):
    """A module as it is when a fit starts."""
    module = tiny.module(pipeline, method, **options)

    def stop():
        raise Until

    module.on_fit_start = stop
    with pytest.raises(Until):
        tiny.train(module, 1)
    return module


@pytest.mark.parametrize(
    ("setting", "roles"),
    [("none", []), ("frozen", ["teacher", "ema"]), ("blocks", ["teacher", "generator", "ema", "fake_score"])],
)
def test_setting_says_whose_blocks_are_compiled(pipeline, setting, roles):
    module = configured(pipeline, speed=Speed(compile=setting))
    found = {role for role in ("teacher", "generator", "ema", "fake_score") if compiled(module.roles.standalone(role))}
    assert found == set(roles)
    for role in roles:
        assert compiled(module.roles.standalone(role)) == [f"transformer_blocks.{i}" for i in range(3)]


def test_names_and_copies_of_compiled_networks_are_as_before(pipeline):
    plain, fast = (configured(pipeline, speed=Speed(compile=setting)) for setting in ("none", "blocks"))
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert not compiled(copy.deepcopy(fast.roles.standalone("generator")))
    adapters = configured(pipeline, lora=LORA, speed=Speed(compile="blocks")).roles
    assert compiled(adapters.network) == [f"transformer_blocks.{i}" for i in range(3)]
    assert not compiled(adapters.standalone("generator"))


def test_limit_of_torch_is_raised_and_not_lowered(pipeline):
    for before, after in ((8, 64), (100, 100)):
        # Not pytest's monkeypatch, which leaves torch's configuration without the setting.
        with torch._dynamo.config.patch(recompile_limit=before):
            compile_blocks(tiny.family(pipeline).sketch(), ("JointTransformerBlock",))
            assert torch._dynamo.config.recompile_limit == after


def test_nothing_is_compiled_for_sampling_and_export(pipeline):
    module = tiny.module(pipeline, DMD, speed=Speed(compile="blocks"))
    module.configure_model()
    assert not compiled(module)


@pytest.mark.parametrize("head", [None, Head()])
def test_block_with_the_features_of_a_head_is_not_compiled(pipeline, head):
    """Its output is read by a hook, which compiled code would not call."""
    family = tiny.family(pipeline)
    specs = [RoleSpec("critic", optimizer=Optimization(), head=head), RoleSpec("generator", optimizer=Optimization())]
    roles = CopiedRoles(family, family.sketch(), tuple(specs))
    roles.compile_blocks(frozen=False)
    names = [f"transformer_blocks.{i}" for i in range(3) if head is None or i != 1]
    assert compiled(roles.standalone("teacher")) == compiled(roles.standalone("generator")) == names


@pytest.mark.parametrize(
    ("speed", "options", "message"),
    [
        ("frozen", {"lora": LORA}, "so none is frozen; use blocks, or none"),
        ("blocks", {"strategy": FSDP2Strategy()}, "not compiled under DeepSpeed and FSDP2"),
        ("frozen", {"strategy": MultiEngineDeepSpeedStrategy()}, "not compiled under DeepSpeed and FSDP2"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_loaded(pipeline, monkeypatch, speed, options, message):
    monkeypatch.setattr(tiny.SD3Family, "load", None)
    module = tiny.module(pipeline, DMD, lora=options.get("lora"), speed=Speed(compile=speed))
    trainer = SimpleNamespace(
        precision="32-true", max_steps=1, datamodule=None, world_size=1, strategy=options.get("strategy")
    )
    module._trainer = trainer
    with pytest.raises(UserError, match=rf"^model\.speed\.compile: .*{message}"):
        module.setup("fit")


def test_family_without_named_blocks_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(tiny.SD3Family, "repeated_blocks", ())
    with pytest.raises(UserError, match=r"^model\.speed\.compile: SD3Family does not name its repeated blocks"):
        Speed(compile="blocks").check(tiny.family(pipeline), None, adapters=False, sharded=False)


@pytest.mark.parametrize("save", [tiny.save_sdxl, tiny.save_flux2], ids=["sdxl", "flux2"])
def test_families_name_blocks_that_their_networks_have(save, tmp_path):
    path = str(save(tmp_path / "pipeline"))
    family = SDXLFamily(path) if save is tiny.save_sdxl else Flux2KleinFamily(path, text_layers=(1, 2))
    classes = {type(module).__name__ for module in family.sketch().modules()}
    assert classes >= set(family.repeated_blocks) != set()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["frozen", "blocks"])
@pytest.mark.parametrize("method", [DMD, GDMD])
def test_update_with_compiled_blocks_equals_the_one_without(pipeline, backend, method, setting):
    """Compiled in the first update, and not again in the second."""
    plain = fit(pipeline, method, 2)
    backend("eager")
    fit(pipeline, method, 1, speed=Speed(compile=setting))
    first = graphs()
    assert first > 0
    fast = fit(pipeline, method, 2, speed=Speed(compile=setting))
    assert graphs() == first
    same(plain, fast)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["copies", "lora"])
def test_compiled_blocks_work_with_checkpointing_and_adapters(pipeline, backend, lora):
    """With torch's own division into forward and backward graphs."""
    options = {"lora": lora, "memory": Memory(gradient_checkpointing=True)}
    plain = fit(pipeline, DMD, 2, **options)
    backend("aot_eager")
    fast = fit(pipeline, DMD, 2, speed=Speed(compile="blocks"), **options)
    assert graphs() > 8  # torch's own limit
    same(plain, fast)


@pytest.mark.slow
@pytest.mark.timeout(900)  # Inductor writes C++ and compiles it
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_update_with_blocks_compiled_by_inductor_equals_the_one_without(tmp_path):
    pipeline = tiny.save_pipeline(tmp_path / "pipeline")
    torch._dynamo.reset()
    utils.counters.clear()
    plain, fast = (fit(pipeline, DMD, speed=Speed(compile=setting)) for setting in ("none", "blocks"))
    assert len(compiled(fast.roles.standalone("generator"))) == 1
    assert graphs() > 0
    same(plain, fast)


def same(one, other) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-5, msg=name)
