"""Runs cases of our methods on this rank: ``python method_runs.py CASES.json``; each rank writes ``NAME-RANK.pt``."""

import json
import os
import sys
import traceback
from pathlib import Path

import lightning.pytorch as pl
import tiny
import torch
from cases import DATA, build

from gdmd_lightning.methods.checkpointing import WholeCheckpoints
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy, partitions

torch.set_num_threads(1)
RANKS = int(os.environ["WORLD_SIZE"])


class Observe(pl.Callback):
    def __init__(self, save):
        self.logs, self.save = [], save

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
        shown = trainer.callback_metrics
        logs = outputs["logs"] | ({"loss": shown["loss"]} if "loss" in shown else {})
        self.logs.append({name: float(value) for name, value in logs.items()})

    def on_train_end(self, trainer, pl_module):
        if self.save:
            trainer.save_checkpoint(self.save)


def run(case: dict) -> dict:
    module, observe = build(case["pipeline"], case["method"], **case.get("module", {})), Observe(case.get("save"))
    strategy = case.get("strategy", {})
    if strategy == "fsdp2":
        strategy = FSDP2Strategy()
        strategy.checkpoint_io = WholeCheckpoints()
    elif not isinstance(strategy, str):
        strategy = MultiEngineDeepSpeedStrategy(**strategy)
        strategy.checkpoint_io = WholeCheckpoints()
    trainer = tiny.trainer(
        case["updates"], devices=RANKS, strategy=strategy, callbacks=[observe], **case.get("trainer", {})
    )
    data = tiny.PromptDataModule("shapes", **{**DATA, **case.get("data", {})})
    trainer.fit(module, datamodule=data, ckpt_path=case.get("resume"))
    found = {"logs": observe.logs, "updates": trainer.global_step, "teacher": module.teacher_digest}
    if isinstance(strategy, FSDP2Strategy) or (isinstance(strategy, MultiEngineDeepSpeedStrategy) and not module.lora):
        names = [name for name, _ in module.roles.named_children()]
        found["bytes"] = {name: partitions.bytes_held(module.roles.get_submodule(name)) for name in names}
        found["weights"] = {
            f"{name}.{key}": value.clone()
            for name in names
            for key, value in strategy.full_weights(module.roles.get_submodule(name))
        }
    else:
        found["weights"] = dict(module.roles.state_dict())
    return found


def main() -> None:
    file = Path(sys.argv[1])
    for name, case in json.loads(file.read_text()).items():
        try:
            found = run(case)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, file.parent / f"{name}-{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main()
