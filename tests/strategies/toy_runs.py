"""Runs cases of :class:`ToyGAN` on this rank: ``python toy_runs.py CASES.json``; each rank writes ``NAME-RANK.pt``."""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from toy_gan import ToyGAN, network

from gdmd_lightning.strategies import MultiEngineDeepSpeedStrategy, learning, partitions, shards
from gdmd_lightning.strategies.saved_weights import NoSavedWeights

torch.set_num_threads(1)
ROWS, WORLD = 8, int(os.environ.get("WORLD_SIZE", "1"))


class Observe(pl.Callback):
    """Losses of all steps; at the end the norms of the last ones, and a checkpoint if wanted."""

    def __init__(self, save=None):
        self.losses, self.norms, self.save = [], {}, save

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
        self.losses.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_end(self, trainer, pl_module):
        strategy = trainer.strategy
        if isinstance(strategy, MultiEngineDeepSpeedStrategy):
            self.norms = {role: float(strategy.gradient_norm(role)) for role in strategy.engines}
        if self.save:
            trainer.save_checkpoint(self.save)


class Large(ToyGAN):
    """A toy whose frozen network has 128 layers of 1 MiB; measures the memory of its construction."""

    def configure_model(self):
        if not hasattr(self, "generator"):
            super().configure_model()
            strategy = self.trainer.strategy
            weights = {"weight": torch.full((512, 512), 1 / 3), "bias": torch.ones(512)}
            self.third = strategy.frozen(lambda: nn.Linear(512, 512), weights, torch.bfloat16)
            with Peak() as peak:
                self.large = strategy.frozen(large, self.path.replace("teacher", "large"))
            self.peak = peak.bytes


def large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(128)))


class Peak:
    """Largest growth of this process's anonymous memory inside."""

    def __enter__(self):
        self.bytes, self.inside, before = 0, True, anonymous()

        def watch():
            while self.inside:
                self.bytes = max(self.bytes, anonymous() - before)
                time.sleep(0.001)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.inside = False
        self.thread.join()


def anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def data(start: int, steps: int, rank: int | None):
    """The batches of a rank, or whole ones."""
    for step in range(start, steps):
        z = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step))
        yield z if rank is None else z[rank::WORLD]


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, *arguments):
        self.arguments = arguments

    def __iter__(self):
        return data(*self.arguments)


class Sometimes(nn.Sequential):
    """Leaves out its middle layer in the second step, and in the first backward pass of the third."""

    calls = 0

    def forward(self, x):
        self.calls += 1  # three per step, the first without a gradient
        for number, layer in enumerate(self):
            x = x if number == 2 and self.calls in (5, 6, 8) else layer(x)
        return x


class Leaving(ToyGAN):
    """The toy with a layer that gets no gradient in some steps and backward passes."""

    def configure_model(self):
        if not hasattr(self, "generator"):
            torch.manual_seed(3)
            super().configure_model()
            self.generator = Sometimes(*self.generator)


class Seeded(ToyGAN):
    """The toy with the same weights whatever was drawn in the process before."""

    def configure_model(self):
        torch.manual_seed(3)
        super().configure_model()

    def test_step(self, z, number):
        self.log("tested", self.generator(z).square().mean() + self.critic(self.teacher(z)).mean(), sync_dist=True)

    def predict_step(self, z, number):
        return self.generator(z)


class Narrow(Seeded):
    """The toy with a smaller critic."""

    def configure_model(self):
        super().configure_model()
        self.critic = nn.Sequential(network(16), nn.Linear(8, 1))


class Dropping(Seeded):
    """The toy with large gradients that are cleared before each update."""

    def training_step(self, z, number):
        for role, optimizer in zip(("generator", "critic"), self.optimizers(), strict=True):
            with learning(self, role):
                for _ in range(2):
                    self.manual_backward(1e3 * self.get_submodule(role)(z).sum())
                optimizer.zero_grad()
        super().training_step(z, number)


KINDS = {"narrow": Narrow, "seeded": Seeded, "large": Large, "leaving": Leaving, "dropping": Dropping}


@contextmanager
def flipped(path, rank):
    """Inside, a bit of a file's last number is flipped."""
    change = path is not None and rank == 0

    def flip():
        content = bytearray(Path(path).read_bytes())
        content[-2] ^= 2
        Path(path).write_bytes(content)

    if change:
        flip()
    try:
        yield
    finally:
        if change:
            flip()


def run(case: dict, folder: Path) -> dict:
    torch.manual_seed(3)
    strategy = MultiEngineDeepSpeedStrategy(**case.get("strategy", {}))
    kind, observe = KINDS[case.get("kind", "seeded")], Observe(case.get("save"))
    module = kind(str(folder / "teacher.safetensors"), **case.get("module", {}))
    common = {"accelerator": "cpu", "devices": WORLD, "logger": False, "enable_checkpointing": False}
    common |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        strategy=strategy, max_steps=2 * case["steps"], max_epochs=-1, callbacks=[observe], **common,
        **case.get("trainer", {}),
    )  # fmt: skip
    rank = int(os.environ["LOCAL_RANK"])
    loader = torch.utils.data.DataLoader(Batches(case.get("start", 0), case["steps"], rank), batch_size=None)
    if case.get("killed_while_writing") and rank == 1:
        shards.write_pieces = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with flipped(case.get("flipped"), rank):
        trainer.fit(module, loader, ckpt_path=case.get("resume"))
    found = {"losses": observe.losses, "norms": observe.norms, "steps": trainer.global_step}
    hooks = [
        hook for each in module.modules() for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values())
    ]
    found["hooks"] = sum(isinstance(getattr(hook, "__self__", None), NoSavedWeights) for hook in hooks)
    if kind is Large:
        found["peak"], found["large_bytes"] = module.peak, partitions.bytes_held(module.large)
        found["half_bytes"] = partitions.bytes_held(module.third)
        found["half"] = {name: value.clone() for name, value in strategy.full_weights(module.third)}
    found["teacher_bytes"] = partitions.bytes_held(module.teacher)
    found["weights"] = {
        f"{name}.{key}": value.clone()
        for name in ("generator", "critic", "teacher")
        for key, value in strategy.full_weights(module.get_submodule(name))
    }
    if "after" in case:
        path = case["after"]
        trainer.save_checkpoint(path)
        other = pl.Trainer(strategy=MultiEngineDeepSpeedStrategy(**case["strategy"]), **common)
        new = kind(str(folder / "teacher.safetensors"))
        tests = [(trainer, module, None), (trainer, module, path), (other, new, path)]
        found["tested"] = [each.test(m, loader, ckpt_path=p, verbose=False)[0]["tested"] for each, m, p in tests]
        found["predicted"] = [torch.cat(each.predict(m, loader, ckpt_path=p)) for each, m, p in tests]
        try:
            trainer.save_checkpoint(path)
        except Exception as error:
            found["refused"] = str(error)
        trainer.save_checkpoint(path.replace("after", "weights"), weights_only=True)
    return found


def main() -> None:
    file = Path(sys.argv[1])
    for name, case in json.loads(file.read_text()).items():
        try:
            found = run(case, file.parent)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, file.parent / f"{name}-{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main()
