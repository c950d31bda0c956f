"""Methods train on every family, with copies and with adapters, and resume to the bit."""

import pytest
import tiny
import torch

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.cold_start import ColdStart
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.methods.settings import Matching, Memory
from gdmd_lightning.roles import LoRA
from gdmd_lightning.schedules import UniformTimestep

METHODS = {
    "dmd": (DMD, {}),
    "gdmd": (GDMD, {}),
    "refl": (ReFL, {}),
    "decoupled dmd": (DMD, {"guidance_levels": "above"}),
    "dmd2": (DMD2, {}),
    "gndm": (GNDM, {}),
    "gndmr": (GNDMR, {}),
    "ac_dmd": (ACDMD, {"interval": "step"}),
    "dmdr": (DMDR, {}),
    "dmdr grpo": (DMDR, {}),
    "dmdr nft": (DMDR, {}),
    "flow_grpo": (FlowGRPO, {}),
    "nft": (DiffusionNFT, {}),
    "rtdmd": (RTDMD, {"interval": "step"}),
}
SLOW = ("dmdr grpo", "dmdr nft", "dmd")
FAMILIES = {
    "sd3": (tiny.save_pipeline, tiny.family),
    "sdxl": (tiny.save_sdxl, lambda path: SDXLFamily(str(path))),
    "flux2": (tiny.save_flux2, lambda path: Flux2KleinFamily(str(path), max_sequence_length=16, text_layers=(1, 2))),
}


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Path of a family's tiny pipeline, written when it is first needed."""
    place, written = tmp_path_factory.mktemp("pipelines"), {}

    def path(name):
        if name not in written:
            written[name] = FAMILIES[name][0](place / name)
        return written[name]

    return path


def build(method, family, path, lora):
    kind, options = METHODS[method]
    if family == "sdxl":
        options = {**options, "renoise_distribution": UniformTimestep()}
    more = {}
    if kind in (GDMD, ReFL, GNDMR, RTDMD, DMDR, FlowGRPO, DiffusionNFT):
        more["reward"] = tiny.Brightness()
    if kind is DMD2:
        more["images"] = ShapesImages()
    if kind is DMDR:  # the reward joins before the run is interrupted, both ramps end after it
        more |= {"joint": method.removeprefix("dmdr").strip() or "refl"}
        more["cold_start"] = ColdStart(updates=1, ramp=3, adapter_scale=0.5 if lora else 0.0)
    if issubclass(kind, MatchingModule):
        more["matching"] = Matching(fake_score_updates=2, **options)
    else:
        more["steps"] = 3
    return kind(FAMILIES[family][1](path), height=32, width=32, lora=LoRA(4, 8) if lora else None, **more)


def combinations():
    for method in METHODS:
        for family in FAMILIES:
            for lora in (True, False):
                quick = (family, lora) == ("sd3", True) and method not in SLOW
                name = f"{method}-{family}-{'adapters' if lora else 'copies'}"
                yield pytest.param(method, family, lora, id=name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize(("method", "family", "lora"), combinations())
def test_three_updates_equal_two_and_a_resumed_third(method, family, lora, pipelines, tmp_path):
    path, data = pipelines(family), {"batch_size": 4, "group_size": 2}
    whole, resumed = (build(method, family, path, lora) for _ in range(2))
    tiny.train(whole, 3, data=data, callbacks=[tiny.SaveAfter(2, tmp_path / "two.ckpt")])
    tiny.trainer(3).fit(resumed, datamodule=PromptDataModule("shapes", **data), ckpt_path=str(tmp_path / "two.ckpt"))
    assert resumed.updates == 3
    state = dict(resumed.state_dict())
    assert tiny.differing(dict(whole.state_dict()), state) == []
    assert all(torch.isfinite(value).all() for value in state.values())
    before = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    for spec in resumed.roles.specs:
        names = [name for name in state if f".{spec.name}." in name]
        assert any(not torch.equal(before[name], state[name]) for name in names), spec.name


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["copies", "adapters"])
def test_dmd2_with_recomputed_activations_trains_as_without(pipelines, lora):
    # The generator's loss passes through the fake score, whose weights must be as frozen when it is computed again.
    weights = []
    for memory in (Memory(), Memory(gradient_checkpointing=True)):
        module = build("dmd2", "sd3", pipelines("sd3"), lora)
        module.memory = memory
        tiny.train(module, 2)
        weights.append(module.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=0)
