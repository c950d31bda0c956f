"""Checkpoints: what a resumed run restores, and what a run of another method takes over."""

import pytest
import tiny
import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import check_fits, read_checkpoint
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.roles import LoRA
from gdmd_lightning.strategies import shards


def saved(pipeline, path, method=DMD, updates=2, **options) -> dict:
    trainer = tiny.train(tiny.module(pipeline, method, **options), updates)
    trainer.save_checkpoint(path)
    return read_checkpoint(str(path))


def started(pipeline, path, method, **options):
    if method is ReFL:
        options["reward"] = tiny.Brightness()
    module = tiny.module(pipeline, method, start_from=str(path), **options)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def dmd(tiny_pipeline, tmp_path_factory):
    """Path and content of a checkpoint of two updates of DMD."""
    path = tmp_path_factory.mktemp("dmd") / "dmd.ckpt"
    return path, saved(tiny_pipeline, path)


def weights(module, role: str) -> list:
    return list(module.roles.standalone(role).state_dict().values())


def stored(content, role: str) -> list:
    return [value for name, value in content["state_dict"].items() if name.startswith(f"roles.{role}.")]


def test_checkpoint_holds_all_roles_except_the_teacher(dmd):
    assert {name.split(".")[1] for name in dmd[1]["state_dict"]} == {"generator", "ema", "fake_score"}


def test_start_from_another_method_takes_the_roles_it_shares(tiny_pipeline, dmd):
    module = started(tiny_pipeline, dmd[0], GDMD)
    for role in ("generator", "ema", "fake_score"):
        assert tiny.differing(weights(module, role), stored(dmd[1], role)) == []


def test_start_from_starts_a_missing_average_as_the_role_it_follows(tiny_pipeline, dmd):
    module = started(tiny_pipeline, dmd[0], GDMD, policy=Policy(form="full"))
    assert tiny.differing(weights(module, "old"), stored(dmd[1], "generator")) == []


def test_start_from_leaves_the_teacher(tiny_pipeline, dmd):
    module, other = started(tiny_pipeline, dmd[0], GDMD), tiny.module(tiny_pipeline)
    other.configure_model()
    assert tiny.differing(weights(module, "teacher"), weights(other, "teacher")) == []
    assert tiny.differing(weights(module, "teacher"), weights(module, "generator")) != []


def test_start_from_counts_updates_from_zero(tiny_pipeline, dmd):
    assert started(tiny_pipeline, dmd[0], GDMD).updates == 0


def test_refl_starts_from_dmd(tiny_pipeline, dmd):
    module = started(tiny_pipeline, dmd[0], ReFL)
    assert [spec.name for spec in module.roles.specs] == ["generator", "ema"]
    assert tiny.differing(weights(module, "generator"), stored(dmd[1], "generator")) == []
    assert tiny.differing(weights(module, "ema"), stored(dmd[1], "ema")) == []


def test_start_from_other_shapes_is_refused(dmd, tmp_path):
    larger = tiny.save_pipeline(tmp_path / "larger", heads=2)
    with pytest.raises(UserError, match="its generator is not this model's"):
        started(larger, dmd[0], GDMD)


def test_start_from_copies_into_adapters_is_refused(tiny_pipeline, dmd):
    with pytest.raises(UserError, match="its generator is not this model's"):
        started(tiny_pipeline, dmd[0], GDMD, lora=LoRA(2, 4))


def test_start_from_adapters_takes_them_over(tiny_pipeline, tmp_path):
    path = tmp_path / "lora.ckpt"
    content = saved(tiny_pipeline, path, lora=LoRA(2, 4))
    state = started(tiny_pipeline, path, GDMD, lora=LoRA(2, 4)).state_dict()
    assert content["state_dict"].keys() <= state.keys()
    assert all(torch.equal(state[name], value) for name, value in content["state_dict"].items())


def test_resumed_run_continues_its_count_of_updates(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, DMD)
    module.configure_model()
    module.on_load_checkpoint(dict(dmd[1]))
    assert module.updates == dmd[1]["provenance"]["updates"] == 2


def test_resumed_run_equals_one_without_a_break(tiny_pipeline, dmd):
    from gdmd_lightning.data.prompt_data import PromptDataModule

    whole, resumed = tiny.module(tiny_pipeline, DMD), tiny.module(tiny_pipeline, DMD)
    tiny.train(whole, 3)
    data = PromptDataModule("shapes", batch_size=8, group_size=4)
    tiny.trainer(3).fit(resumed, datamodule=data, ckpt_path=str(dmd[0]))
    assert resumed.updates == 3
    assert tiny.differing(dict(whole.state_dict()), dict(resumed.state_dict())) == []


def test_resuming_another_method_is_refused(tiny_pipeline, dmd):
    module = tiny.module(tiny_pipeline, GDMD)
    module.configure_model()
    with pytest.raises(UserError, match="it is of another model: the checkpoint has no"):
        module.on_load_checkpoint(dict(dmd[1]))


def test_only_role_builds_one_role(tiny_pipeline):
    module = tiny.module(tiny_pipeline)
    module.only_role("ema")
    module.configure_model()
    assert [spec.name for spec in module.roles.specs] == ["ema"]
    assert {name.split(".")[0] for name in module.roles.state_dict()} == {"teacher", "ema"}


def test_damaged_shards_are_one_line_where_the_checkpoint_is_compared_with_the_model(tiny_pipeline, tmp_path):
    module = tiny.module(tiny_pipeline)
    module.configure_model()
    piece = shards.Piece("roles.generator.w", (2,), 0, {"weight": torch.ones(2)})
    checksums = shards.write_pieces(tmp_path / "generator", 0, [piece])
    shards.write_rest(tmp_path, {"state_dict": {}}, ["generator"], 1, checksums)
    file = tmp_path / "generator" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000\.safetensors' is damaged") as error:
        check_fits(module, {"state_dict": {}, "sharded": str(tmp_path)})
    assert "use another checkpoint of this run" in str(error.value)
    assert "\n" not in str(error.value)
