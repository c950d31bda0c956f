"""Trains cases on this rank and writes what it holds: ``python plan_runs.py CASES.json``; ``NAME-RANK.json`` each."""

import gc
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import tiny
import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from cases import DATA, build

from gdmd_lightning.planning.trace import Trace
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy, partitions

torch.set_num_threads(1)
RANKS = int(os.environ["WORLD_SIZE"])


def size(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Held(pl.Callback):
    """What a rank holds just before a step of each role, the gradients known and not yet used."""

    def __init__(self):
        self.found: dict[str, dict[str, int]] = {}

    def watch(self, strategy):
        step = strategy.optimizer_step

        def watched(optimizer, *args, **kwargs):
            if isinstance(strategy, FSDP2Strategy):
                self.found[self.role_of[id(optimizer)]] = held_by(optimizer)
            else:
                role = strategy._role_of(optimizer)
                self.found[role] = held(strategy.engines[role])
            return step(optimizer, *args, **kwargs)

        strategy.optimizer_step = watched

    def on_train_start(self, trainer, pl_module):
        self.role_of = {id(each): role for role, each in zip(pl_module.roles.trained, trainer.optimizers, strict=True)}
        self.watch(trainer.strategy)


class Peak(pl.Callback):
    """Most bytes of tensors in the second update; the first makes the optimizers' states.

    What earlier cases left in this process does not count.
    """

    def __init__(self):
        self.before = Trace("cpu")
        self.before.see(alive())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.trace = Trace("cpu")
            self.trace.see(alive())
            self.trace.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.trace.__exit__(None, None, None)


def alive():
    """All tensors and gradients; of one in shards, this rank's."""
    gc.collect()
    for each in (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)):
        for tensor in (each.detach(), each.grad if each.is_leaf else None):
            if tensor is not None:
                yield tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held_by(optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and moments in torch's own optimizer."""
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    return {
        "weights": size(local(p) for p in parameters),
        "stepped": 0,
        "gradients": size(local(p.grad) for p in parameters),
        "moments": size(local(m) for m in moments),
    }


def held(engine) -> dict[str, int]:
    """Bytes of weights, of the optimizer's own weights, gradients and moments."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    third = engine.zero_optimization_stage() == 3
    weights = size(partitions.shard_of(p) for p in parameters) if third else size(parameters)
    flat = optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups
    own = [(partitions.shard_of(p) if third else p).data_ptr() for p in parameters]
    stepped = 0 if any(t.data_ptr() in own for t in flat) else size(flat)
    states = [v for state in optimizer.optimizer.state.values() for v in state.values() if v.dim()]
    whole = [p.grad for p in parameters if p.grad is not None]
    shards = [optimizer.grad_partitions_flat_buffer] if third else _partitions(optimizer)
    return {"weights": weights, "stepped": stepped, "gradients": size([*whole, *shards]), "moments": size(states)}


def _partitions(optimizer) -> list[torch.Tensor]:
    found = []
    for each in [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]:
        found += [] if each is None else list(each)
    return found


def main() -> None:
    file = Path(sys.argv[1])
    for name, case in json.loads(file.read_text()).items():
        callback: Held | Peak = Peak() if case.get("peak") else Held()
        module = build(case["pipeline"], case["method"], **case.get("module", {}))
        fsdp2 = case["strategy"] == "fsdp2"
        strategy = FSDP2Strategy() if fsdp2 else MultiEngineDeepSpeedStrategy(**case["strategy"])
        trainer = tiny.trainer(2, devices=RANKS, strategy=strategy, callbacks=[callback])
        trainer.fit(module, datamodule=tiny.PromptDataModule("shapes", **DATA))
        found = (
            {"peak": callback.trace.peak - callback.before.current}
            if isinstance(callback, Peak)
            else dict(callback.found)
        )
        if module.lora is None:
            names = [each for each, _ in module.roles.named_children()]
            found["networks"] = {each: partitions.bytes_held(module.roles.get_submodule(each)) for each in names}
        (file.parent / f"{name}-{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
