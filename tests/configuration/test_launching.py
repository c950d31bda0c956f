"""Ranks that something else starts than ``fit``."""

import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.launching import OWN_STORE, chosen_strategy, devices_per_node
from gdmd_lightning.errors import UserError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "one", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "said", "nodes"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "2"}, r"does not match the world size \(2\)", 1),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, r"does not match the world size \(1\)", 2),
        (SLURM, r"`--ntasks-per-node=2` does not match", 1),
    ],
    ids=["torchrun", "nodes", "slurm"],
)
def test_another_number_of_ranks_is_refused_before_anything_is_loaded(fast_fit, monkeypatch, environment, said, nodes):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^trainer\.devices: .*{said}.*; set trainer\.devices and trainer\.num_nodes"):
        training.run([*fast_fit, "--trainer.strategy=ddp", "--trainer.devices=1", f"--trainer.num_nodes={nodes}"])


@pytest.mark.parametrize(
    ("restarts", "shared", "warned"), [("3", "True", True), ("0", "True", False), ("3", "False", False)]
)
def test_a_store_that_all_starts_share_is_told(fast_fit, monkeypatch, restarts, shared, warned):
    """torchrun sets the second to "False" if ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE`` is 1."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        training.run([*fast_fit, "--trainer.max_steps=0"])
    assert any(f"set {OWN_STORE}=1 for torchrun" in str(each.message) for each in found) is warned


@pytest.mark.parametrize("name", ["FSDP2Strategy", "MultiEngineDeepSpeedStrategy", "DDPStrategy"])
def test_bare_name_of_a_strategys_class_is_refused(fast_fit, name):
    with pytest.raises(
        UserError, match=rf"^trainer\.strategy: '{name}' is a class.*--trainer\.strategy\.class_path {name}$"
    ):
        training.parse([*fast_fit, f"--trainer.strategy={name}"])


OWN_SHARDS = "--trainer.strategy.class_path=FSDP2Strategy"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.strategy=ddpp"], r"^trainer\.strategy: unknown strategy 'ddpp'; did you mean 'ddp'\?$"),
        (["--trainer.strategy=deepspeed_stage_3"], r"takes one optimizer.*; use MultiEngineDeepSpeedStrategy, or"),
        (["--trainer.strategy.class_path=DeepSpeedStrategy"], r"takes one optimizer"),
        (
            ["--trainer.strategy=fsdp_cpu_offload"],
            r"^trainer\.strategy: FSDPStrategy would not shard.*use FSDP2S",
        ),
        (["--trainer.strategy=ddp_spawn"], r"^trainer\.strategy: 'ddp_spawn' starts its processes without.*; use ddp$"),
        (["--trainer.strategy.class_path=DDPStrategy", "--trainer.strategy.start_method=fork"], "'DDPStrategy' starts"),
        (
            [OWN_SHARDS, "--trainer.strategy.process_group_backend=cpu:glo"],
            r"^trainer\.strategy\.process_group_backend: there is no backend 'glo'; did you mean 'gloo'\?$",
        ),
        ([OWN_SHARDS, "--trainer.precision=16-mixed"], r"^trainer\.precision: '16-mixed' needs.*use bf16-mixed or 32"),
        (["--trainer.precision=bf16-true"], r"^trainer\.precision: 'bf16-true' would convert the trained weights"),
        (["--trainer.devices=0"], r"^trainer\.devices: it is '0'; use a number of at least 1, a list"),
        (["--trainer.num_nodes=0"], r"^trainer\.num_nodes: it is 0; use an integer of at least 1$"),
    ],
)
def test_strategies_that_cannot_train_are_refused_before_anything_is_built(fast_fit, arguments, said):
    with pytest.raises(UserError, match=said):
        training.parse([*fast_fit, *arguments])


@pytest.mark.parametrize("backend", ["gloo", "NCCL", "cpu:gloo,cuda:nccl", "null"])
def test_backends_of_torch_pass(fast_fit, backend):
    training.parse([*fast_fit, OWN_SHARDS, f"--trainer.strategy.process_group_backend={backend}"])


@pytest.mark.parametrize(
    ("devices", "number"),
    [("auto", None), (-1, None), ("-1", None), (2, 2), ("3", 3), ([0, 5], 2), ([7], 1), ("0,1,2", 3), ("2,", 1)],
)
def test_devices_are_counted_as_lightning_does(devices, number):
    assert devices_per_node(devices) == number


@pytest.mark.parametrize("devices", [0, "0", -2, "abc", "", [], [-1], ["a"], "1,b", 1.5, True, None])
def test_devices_that_are_no_number_are_refused(devices):
    with pytest.raises(UserError, match=r"^trainer\.devices: it is "):
        devices_per_node(devices)


def test_a_class_can_be_without_arguments():
    given = SimpleNamespace(class_path="lightning.pytorch.strategies.DDPStrategy")
    assert chosen_strategy(given) == (DDPStrategy, {})


def test_names_of_lightnings_list_pass(fast_fit):
    for name in ("ddp", "DDP", "auto"):
        assert training.parse([*fast_fit, f"--trainer.strategy={name}"]).trainer.strategy == name


@pytest.mark.parametrize(
    "strategy",
    [
        ["--trainer.strategy=ddp"],
        ["--trainer.strategy=ddp_find_unused_parameters_false"],
        ["--trainer.strategy.class_path=DDPStrategy"],
    ],
    ids=["ddp", "false", "class"],
)
def test_every_spelling_of_ddp_expects_unused_parameters(fast_fit, monkeypatch, strategy):
    monkeypatch.setattr(training.DistillationCLI, "fit", lambda *_, **__: None)
    cli = training.run([*fast_fit, *strategy])
    assert cli.trainer.strategy._ddp_kwargs["find_unused_parameters"] is True


def test_a_static_graph_is_refused(fast_fit):
    strategy = ["--trainer.strategy.class_path=DDPStrategy", "--trainer.strategy.static_graph=true"]
    with pytest.raises(UserError, match=r"^trainer\.strategy\.static_graph: .* reach different roles; leave it out$"):
        training.parse([*fast_fit, *strategy])
