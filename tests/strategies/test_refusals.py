"""What MultiEngineDeepSpeedStrategy refuses before any process is started, each in one line."""

import importlib.util
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toy_gan import ToyGAN

from gdmd_lightning.strategies import MultiEngineDeepSpeedStrategy, Trained, engine_config


def refused(**arguments) -> str:
    with pytest.raises(MisconfigurationException) as error:
        MultiEngineDeepSpeedStrategy(**arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_or_old_deepspeed_is_one_line(monkeypatch):
    monkeypatch.setattr(engine_config, "version", lambda name: "0.16.4")
    assert refused() == "MultiEngineDeepSpeedStrategy requires DeepSpeed 0.19, this is 0.16.4"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused() == "MultiEngineDeepSpeedStrategy requires DeepSpeed: pip install deepspeed"


def test_stages_and_configs_that_cannot_work_are_refused():
    assert refused(stage=0).startswith("ZeRO stage 0 of all roles")
    assert refused(stages={"critic": 4}).startswith("ZeRO stage 4 of critic")
    for key in engine_config.OURS:
        assert refused(config={key: 4}).startswith(f"{key} in the strategy's config: ")
    assert "configs.critic: use stage and stages" in refused(configs={"critic": {"zero_optimization": {"stage": 1}}})
    nvme = {"zero_optimization": {"offload_param": {"device": "nvme"}}}
    assert "nvme in the strategy's config is not supported" in refused(config=nvme)


def zero(**settings) -> dict:
    return {"zero_optimization": settings}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"bf16": True}}, "bf16 in the strategy's config is True: it must be a dictionary"),
        ({"config": {"zero_optimization": True}}, "zero_optimization in the strategy's config must be a dictionary"),
        ({"configs": {"critic": None}}, "the strategy's configs.critic must be a dictionary"),
        (
            {"config": {"gradient_cliping": 1}},
            "unknown key 'gradient_cliping' in the strategy's config (did you mean 'gradient_clipping'?)",
        ),
        ({"configs": {"critic": {"qwerty": 1}}}, "'qwerty' in the strategy's configs.critic: DeepSpeed does not r"),
        ({"configs": {"frozen": {"zero_optimisation": {}}}}, "configs.frozen (did you mean 'zero_optimization'?)"),
        (
            {"config": zero(offload_optimiser={"device": "cpu"})},
            "unknown key 'zero_optimization.offload_optimiser' in the strategy's config (did you mean 'offload_opt",
        ),
        ({"config": zero(offload_optimizer={"devise": "cpu"})}, "offload_optimizer.devise' in the strategy's config"),
        ({"config": zero(offload_optimizer={"device": "gpu"})}, "offload to gpu in the strategy's config is not supp"),
        (
            {"config": zero(offload_optimizer="cpu")},
            "offload_optimizer in the strategy's config is 'cpu': Input",
        ),
        ({"config": zero(reduce_bucket_size=-1)}, "reduce_bucket_size in the strategy's config is -1: Input should be"),
        ({"config": {"gradient_clipping": "auto"}}, "gradient_clipping in the strategy's config is 'auto': use a num"),
        (
            {"stage": 2, "configs": {"critic": zero(offload_optimizer={"device": "cpu", "ratio": 0.5})}},
            "zero_optimization in the strategy's configs.critic: Partial offloading only supported for ZeRO Stage 3",
        ),
        ({"stages": {"critic": 1}, "config": zero(overlap_comm=True)}, "does not work in ZeRO stage 1: use stage 2"),
    ],
)
def test_what_deepspeed_would_not_read_is_refused(arguments, message):
    assert message in refused(**arguments)


def test_what_deepspeed_reads_is_accepted():
    several = {"bf16": {"enabled": True}, "steps_per_print": 5, "wall_clock_breakdown": True, "data_types": {}}
    usual = zero(offload_optimizer=None, reduce_bucket_size="auto", overlap_comm=True, stage3_max_live_parameters=5)
    strategy = MultiEngineDeepSpeedStrategy(2, config={**several, **usual}, configs={"critic": {}, "frozen": {}})
    assert strategy.config_of("critic", 2)["zero_optimization"]["offload_optimizer"] is None
    partly = zero(offload_optimizer={"device": "cpu", "ratio": 0.5})
    MultiEngineDeepSpeedStrategy(2, {"critic": 3}, configs={"nets.critic": partly})


def test_configs_of_a_role_win_over_those_of_all():
    own = {"gradient_clipping": 2.0, "zero_optimization": {"overlap_comm": False}}
    shared = {"gradient_clipping": 1.0, "zero_optimization": {"reduce_bucket_size": 5}}
    strategy = MultiEngineDeepSpeedStrategy(2, {"critic": 3}, shared, {"critic": own})
    critic = strategy.config_of("networks.critic", strategy.stage_of("networks.critic"))
    other = strategy.config_of("generator", strategy.stage_of("generator"))
    assert (critic["gradient_clipping"], other["gradient_clipping"]) == (2.0, 1.0)
    assert critic["zero_optimization"]["overlap_comm"] is False
    assert critic["zero_optimization"]["reduce_bucket_size"] == 5
    assert (critic["zero_optimization"]["stage"], other["zero_optimization"]["stage"]) == (3, 2)


@pytest.mark.parametrize(
    ("settings", "automatic", "message"),
    [
        ({}, True, "needs manual optimization: set automatic_optimization to False in ToyGAN"),
        ({"gradient_clip_val": 1.0}, False, "set gradient_clipping in the strategy's configs"),
        ({"accumulate_grad_batches": 2}, False, "call backward several times before a step"),
        ({"precision": "bf16-true"}, False, "use 32-true or bf16-mixed"),
    ],
)
def test_trainer_settings_without_effect_are_refused(settings, automatic, message):
    module = ToyGAN("nothing")
    module.automatic_optimization = automatic
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=MultiEngineDeepSpeedStrategy(), logger=False,
        enable_checkpointing=False, **settings,
    )  # fmt: skip
    before = torch.distributed.is_initialized()
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(module, torch.utils.data.DataLoader([torch.zeros(8)]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert torch.distributed.is_initialized() == before


def started(monkeypatch, clipping: float = 0.0, **arguments) -> dict[str, float]:
    """Clipping that each engine of a toy is started with."""
    given = []
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 2, optimizer=SimpleNamespace(single_partition_of_fp32_groups=[])
    )
    monkeypatch.setattr("deepspeed.initialize", lambda config, **_: given.append(config) or [engine])
    strategy, module = MultiEngineDeepSpeedStrategy(**arguments), torch.nn.Module()
    module.nets = torch.nn.ModuleDict({"generator": torch.nn.Linear(1, 1), "critic": torch.nn.Linear(1, 1)})
    networks = {f"nets.{name}": Trained(network, clipping) for name, network in module.nets.items()}
    module.trained_networks = lambda: networks
    strategy._lightning_module = module
    strategy._names = {id(parameter): name for name, parameter in module.named_parameters()}
    strategy.optimizers = [torch.optim.SGD(network.parameters()) for network in module.nets.values()]
    strategy._start_engines()
    return dict(zip(module.nets, [config["gradient_clipping"] for config in given], strict=True))


def test_clipping_of_the_strategy_wins_over_that_of_the_module(monkeypatch):
    own = {"critic": {"gradient_clipping": 2.0}}
    assert started(monkeypatch, 1.0, configs=own) == {"generator": 1.0, "critic": 2.0}
    assert started(monkeypatch, 1.0, config={"gradient_clipping": 3.0}) == {"generator": 3.0, "critic": 3.0}
    assert started(monkeypatch) == {"generator": 0.0, "critic": 0.0}


@pytest.mark.parametrize("setting", ["stages", "configs"])
def test_settings_of_a_role_that_no_optimizer_trains_are_refused(monkeypatch, setting):
    value = {"stages": 1, "configs": {}}[setting]
    with pytest.raises(MisconfigurationException) as error:
        started(monkeypatch, **{setting: {"critc": value}})
    assert str(error.value) == (
        f"no optimizer trains 'critc', which is in the strategy's {setting}: use one of nets.generator, nets.critic"
    )
    for name in ("critic", "nets.critic", *(["frozen"] if setting == "configs" else [])):
        started(monkeypatch, **{setting: {name: value}})
