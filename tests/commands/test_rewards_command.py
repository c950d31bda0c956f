"""The list of rewards and of their weights on this machine."""

import inspect
import socket

import pytest

from gdmd_lightning import components
from gdmd_lightning.cli import main
from gdmd_lightning.rewards import catalog
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.catalog import COMMON, REWARDS


@pytest.fixture
def listed(monkeypatch, tmp_path, capsys):
    """``listed("--directory", d)`` gives the printed lines of each reward; there is no network and an empty cache."""
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was opened"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> dict[str, list[str]]:
        main(["rewards", *map(str, arguments)])
        name, found = "", {}
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  "):
                found[name].append(line.strip())
            else:
                name, _, rest = line.partition(": ")
                found[name] = [rest]
        return found

    return run


def test_every_reward_is_listed_with_its_own_differentiability():
    kinds = {name: getattr(components, name) for name in components.__all__}
    rewards = {name: kind for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, Reward)}
    assert {entry.name for entry in REWARDS} == set(rewards)
    for entry in REWARDS:
        if entry.name != "CombinedReward":  # that depends on its parts
            assert entry.differentiable == rewards[entry.name].differentiable


def test_weights_that_are_absent_are_listed_with_the_command_that_gets_them(listed):
    lines = listed()
    assert lines["HPSv2"] == [
        "about 0.28; differentiable; license: Apache 2.0",
        "not found: hf download xswu/HPSv2",
    ]
    assert lines["OCRReward"][1:] == lines["ShapesReward"][1:] == ["ready: needs no further files"]
    assert lines["AestheticScore"][2].startswith("not found: download sac+logos+ava1-l14-linearMSE.pth from https://")


def test_weights_in_a_directory_and_in_the_hubs_cache_are_found(listed, tmp_path):
    by_name, by_id = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "THUDM/ImageReward/ImageReward.pt"
    cached = tmp_path / "cache/models--openai--clip-vit-large-patch14/snapshots/abc/model.safetensors"
    for place in (by_name, by_id, cached, cached.parents[2] / "refs/main"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("abc")
    lines = listed("--directory", tmp_path)
    assert lines["HPSv2"][1] == f"found: {by_name}"
    assert lines["ImageReward"][1:] == [f"found: {by_id}", "not found: hf download google-bert/bert-base-uncased"]
    assert lines["CLIPScore"][1] == f"found: {cached}"


def test_file_with_a_name_that_many_models_have_is_found_by_hub_id_only(listed, tmp_path):
    for name in COMMON:
        (tmp_path / name).write_text("abc")
    assert not any(line.startswith("found") for lines in listed("--directory", tmp_path).values() for line in lines)
    (tmp_path / "facebook/mask2former-swin-small-coco-instance").mkdir(parents=True)
    place = tmp_path / "facebook/mask2former-swin-small-coco-instance/model.safetensors"
    place.write_text("abc")
    lines = listed("--directory", tmp_path)
    assert lines["GenEvalReward"][1:] == [f"found: {place}", "not found: hf download openai/clip-vit-large-patch14"]


def test_no_other_name_is_in_the_list_twice():
    sources = {(each.file, each.source) for entry in REWARDS for each in entry.weights if each.file not in COMMON}
    assert len({file for file, _ in sources}) == len(sources)


def test_package_that_is_absent_is_named(listed, monkeypatch):
    found = catalog.importlib.util.find_spec
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None if name == "open_clip" else found(name))
    assert listed()["HPSv2"][1] == "open_clip is not installed: pip install 'gdmd-lightning[rewards]'"


def test_directory_that_is_absent_is_an_error(complaint, tmp_path):
    assert complaint("rewards", "--directory", tmp_path / "no").startswith(f"--directory {tmp_path}/no: there is no")
