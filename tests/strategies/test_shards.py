"""Sharded checkpoints as files: written in pieces by ranks, read as whole tensors."""

import json

import pytest
import torch

from gdmd_lightning.strategies import ShardedCheckpoint, ShardError, consolidated, partitions, shards
from gdmd_lightning.strategies.shards import Piece
from gdmd_lightning.strategies.sources import source_of


def write(path, ranges=((0, 5), (5, 12)), names=("net.w",)):
    """A checkpoint of one 3x4 parameter with its moments, in pieces."""
    weight, moment, checksums = torch.arange(12.0), torch.arange(12.0) ** 2, {}
    path.mkdir()
    for rank, (low, high) in enumerate(ranges):
        own = {"weight": weight[low:high], "exp_avg": moment[low:high]}
        checksums |= shards.write_pieces(path / "net", rank, [Piece("net.w", (3, 4), low, own, {"step": 7})])
    rest = {"state_dict": {"buffer": torch.ones(1)}, "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1}]}]}
    rest |= {"names": ["net.w", "buffer"], "trained_names": [list(names)]}
    shards.write_rest(path, rest, ["net"], len(ranges), checksums)
    return weight.reshape(3, 4), moment.reshape(3, 4)


def test_consolidated_has_the_form_of_a_plain_checkpoint(tmp_path):
    weight, moment = write(tmp_path / "a.ckpt")
    found = consolidated(tmp_path / "a.ckpt")
    assert list(found["state_dict"]) == ["net.w", "buffer"]
    assert torch.equal(found["state_dict"]["net.w"], weight)
    (state,) = found["optimizer_states"]
    assert torch.equal(state["state"][0]["exp_avg"], moment)
    assert state["state"][0]["step"] == 7
    assert "names" not in found
    assert "trained_names" not in found


def test_any_range_is_read_across_ranks(tmp_path):
    write(tmp_path / "a.ckpt", ranges=((0, 2), (2, 7), (7, 12)))
    reader = ShardedCheckpoint(tmp_path / "a.ckpt")
    assert reader.read("net.w", "weight", 1, 9).tolist() == list(range(1, 10))
    assert reader.keys("net.w") == {"weight", "exp_avg"}
    with pytest.raises(ShardError, match="has no weight of other"):
        reader.read("other", "weight", 0, 1)


def test_source_has_weights_in_pieces_and_whole_ones(tmp_path):
    weight, _ = write(tmp_path / "a.ckpt")
    whole = torch.arange(6.0).reshape(2, 3)
    source = source_of({"state_dict": {"ema.w": whole}, "sharded": tmp_path / "a.ckpt"}, {})
    assert source.names() == {"net.w", "ema.w"}
    assert (source.shape("net.w"), source.shape("ema.w")) == ((3, 4), (2, 3))
    assert torch.equal(source.whole("net.w"), weight)
    assert torch.equal(source.whole("ema.w"), whole)
    assert source.read("ema.w", "weight", 2, 3).tolist() == [2, 3, 4]
    assert (source.keys("ema.w"), source.scalars("ema.w")) == ({"weight"}, {})
    with pytest.raises(ValueError, match=r"it has no old\.w"):
        source.read("old.w", "weight", 0, 1)


@pytest.mark.parametrize("ranges", [((0, 5), (6, 12)), ((0, 5), (4, 12)), ((0, 5), (5, 11))])
def test_gaps_overlaps_and_missing_ends_are_damage(tmp_path, ranges):
    write(tmp_path / "a.ckpt", ranges)
    with pytest.raises(ShardError, match=r"net\.w"):
        consolidated(tmp_path / "a.ckpt")


def test_damaged_files_are_one_line(tmp_path):
    write(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "net" / "00001.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ShardError, match=r"00001\.safetensors' is damaged"):
        consolidated(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "net" / "00001.safetensors").unlink()
    with pytest.raises(ShardError, match=r"00001\.safetensors' is damaged"):
        consolidated(tmp_path / "a.ckpt")
    rest = tmp_path / "a.ckpt" / "rest.ckpt"
    rest.write_bytes(b"nothing")
    with pytest.raises(ShardError, match=r"rest\.ckpt' is not readable") as error:
        ShardedCheckpoint(tmp_path / "a.ckpt").rest(verify=False)
    assert "\n" not in str(error.value)
    rest.unlink()
    with pytest.raises(ShardError, match=r"rest\.ckpt' is damaged: .*No such file"):
        consolidated(tmp_path / "a.ckpt")


def flip(file, byte):
    content = bytearray(file.read_bytes())
    content[byte] ^= 2
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["net/00001.safetensors", "rest.ckpt"])
def test_a_flipped_bit_is_damage(tmp_path, name):
    path = tmp_path / "a.ckpt"
    weight, moment = write(path)
    file = path / name
    flip(file, len(file.read_bytes()) - 3 if name.startswith("net") else file.read_bytes().index(b"buffer"))
    with pytest.raises(ShardError, match=rf"{name}' is damaged: its checksum does not match"):
        consolidated(path)
    # What does not need the file is read, and so is a checkpoint without checksums.
    reader = ShardedCheckpoint(path)
    assert reader.read("net.w", "weight", 0, 5).tolist() == [0, 1, 2, 3, 4]
    assert set(reader.rest(verify=False)) >= {"names"}
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksums"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    if name != "rest.ckpt":
        found = consolidated(path)
        moments = found["optimizer_states"][0]["state"][0]["exp_avg"]
        assert (found["state_dict"]["net.w"] != weight).sum() + (moments != moment).sum() == 1


def test_every_file_has_a_checksum(tmp_path):
    write(tmp_path / "a.ckpt")
    manifest = tmp_path / "a.ckpt" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["checksums"]["net/00001.safetensors"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="00001"):
        consolidated(tmp_path / "a.ckpt")
    manifest.write_text(json.dumps({**content, "checksums": ["net"]}))
    with pytest.raises(ShardError, match="is not a sharded checkpoint"):
        consolidated(tmp_path / "a.ckpt")


def test_network_names_cannot_leave_the_directory(tmp_path):
    write(tmp_path / "a.ckpt")
    manifest = tmp_path / "a.ckpt" / "manifest.json"
    manifest.write_text(json.dumps({"world_size": 1, "networks": ["../other"]}))
    with pytest.raises(ShardError, match="malformed"):
        ShardedCheckpoint(tmp_path / "a.ckpt")
    with pytest.raises(ShardError, match="cannot be the name"):
        shards.write_rest(tmp_path / "a.ckpt", {}, ["../other"], 1, {})


@pytest.mark.parametrize("exchanges", [True, False])
def test_publishing_replaces_a_directory_or_file(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(shards, "_exchange", lambda one, other: False)
    path = tmp_path / "last.ckpt"
    path.write_text("a plain checkpoint")
    for number in (1, 2):
        part = tmp_path / "last.ckpt.1@host.part"
        write(part)
        (part / "number").write_text(str(number))
        shards.publish(part, path)
        assert (path / "number").read_text() == str(number)
        assert shards.is_sharded(path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_leftovers_of_a_name_are_removed_and_others_stay(tmp_path):
    for name in ("last.ckpt.9@host.part", "other.ckpt.9@host.part"):
        write(tmp_path / name)
    shards.remove_parts(tmp_path / "last.ckpt")
    assert [each.name for each in tmp_path.iterdir()] == ["other.ckpt.9@host.part"]


@pytest.mark.parametrize(
    ("options", "device"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")]
)
def test_number_of_steps_is_where_the_optimizer_expects_it(options, device):
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    assert partitions.place_of_scalars(torch.optim.AdamW([weight], **options), weight).type == device
