"""``model.speed.channels_last``: the layout of weights changes, and not what is learned."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching, Speed
from gdmd_lightning.roles import LoRA
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy

LAST = Speed(channels_last=True)
KINDS = {"copies": None, "lora": LoRA(2, 4)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.save_sdxl(tmp_path_factory.mktemp("channels") / "pipeline")


def module_of(pipeline, **options):
    """GDMD, which also decodes."""
    family, matching = SDXLFamily(str(pipeline)), Matching(fake_score_updates=1)
    return GDMD(family, tiny.Brightness(), TargetGroup(1), height=32, width=32, matching=matching, **options)


def fitted(pipeline, speed, updates=2, lora=None, resumed=None):
    """A module and its trainer after some updates."""
    module = module_of(pipeline, speed=speed, lora=lora)
    trainer, data = tiny.trainer(updates), PromptDataModule("shapes", batch_size=2, group_size=2)
    trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=False)
    return module, trainer


def in_order(tensors) -> list[bool]:
    """Of all kernels larger than a pixel, whose layout shows: whether channels come last."""
    kernels = [each for each in tensors if each.ndim == 4 and each.shape[1] > 1 and each.shape[2:] != (1, 1)]
    return [each.is_contiguous(memory_format=torch.channels_last) for each in kernels]


def same(one, other) -> None:
    """Up to rounding; AdamW's first steps turn that of a gradient near zero into a whole step, at most 3e-5 for two."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    differences = torch.cat([(theirs[name].float() - value.float()).abs().flatten() for name, value in ours.items()])
    assert differences.max() <= 6e-5
    assert (differences > 1e-6).float().mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_the_one_with_channels_first(pipeline, kind):
    (first, _), (last, trainer) = (fitted(pipeline, speed, lora=KINDS[kind]) for speed in (Speed(), LAST))
    same(first, last)
    assert not any(in_order(first.parameters()))
    networks = last.roles.networks()
    assert len(networks) == (1 if KINDS[kind] else 5)
    for network in (*networks, last.family.loaded.vae):
        found = in_order(network.parameters())
        assert found
        assert all(found)
    moments = [value for each in trainer.optimizers for state in each.state.values() for value in state.values()]
    assert all(in_order(moments))
    assert bool(in_order(moments)) == (kind == "copies")  # no adapter is a convolution


def test_nothing_is_laid_out_for_sampling_and_export(pipeline):
    module = module_of(pipeline, speed=LAST)
    module.configure_model()
    assert not any(in_order((*module.parameters(), *module.family.loaded.vae.parameters())))


@pytest.mark.parametrize(
    "speeds",
    [pytest.param((Speed(), LAST), id="on"), pytest.param((LAST, Speed()), id="off", marks=pytest.mark.slow)],
)
def test_run_goes_on_in_the_other_layout(pipeline, speeds, tmp_path):
    """A fused step reads a weight, its gradient and its moments in the order of memory."""
    whole, _ = fitted(pipeline, Speed(), 2)
    _, trainer = fitted(pipeline, speeds[0], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fitted(pipeline, speeds[1], 2, resumed=tmp_path / "one.ckpt")
    assert resumed.updates == 2
    same(whole, resumed)


def test_generator_is_written_as_a_pipeline(pipeline, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    module, _ = fitted(pipeline, LAST, 1)
    ema = module.roles.standalone("ema")
    module.to_pipeline(ema).save_pretrained(tmp_path / "pipeline")
    found = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline").unet.state_dict()
    for name, value in ema.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("strategy", [FSDP2Strategy, MultiEngineDeepSpeedStrategy])
def test_sharded_strategies_are_refused_before_anything_is_loaded(pipeline, strategy, monkeypatch):
    monkeypatch.setattr(SDXLFamily, "load", None)
    module = module_of(pipeline, speed=LAST)
    module._trainer = SimpleNamespace(
        precision="32-true", max_steps=1, datamodule=None, world_size=1, strategy=strategy()
    )
    with pytest.raises(UserError, match=r"^model\.speed\.channels_last: DeepSpeed and FSDP2 lay weights out"):
        module.setup("fit")
