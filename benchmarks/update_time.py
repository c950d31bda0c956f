"""Time of an update of DMD against a plain PyTorch loop that does the same work, in pairs within one process.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/update_time.py [--updates N] [--batch_size B]

The plain loop evaluates the same networks on as many latents, with the same optimizers, clipping and averages. It has
no trainer, no logging, no random streams by name and no checks.
"""

import argparse
import copy
import statistics
import time

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.settings import Matching

STEPS, FAKE_SCORE_UPDATES, GUIDANCE = 4, 3, 3.0


class PlainLoop:
    """DMD on the same pipeline, written out."""

    def __init__(self, module: DMD, batch_size: int) -> None:
        self.family, self.size, self.shape = module.family, batch_size, module.latent_shape
        self.sigmas = module.sigmas
        teacher = module.roles.standalone("teacher")
        self.teacher = teacher
        self.generator, self.fake_score, self.ema = (copy.deepcopy(teacher).requires_grad_(i < 2) for i in range(3))
        networks = (self.generator, self.fake_score)
        self.optimizers = [torch.optim.AdamW(n.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True) for n in networks]

    def update(self, conditioning) -> None:
        x_sigma, sigma = self.rollout(conditioning)
        x = x_sigma - sigma.view(-1, 1, 1, 1) * self.ask(self.generator, x_sigma, sigma, conditioning)
        with torch.no_grad():
            t, eps = 0.02 + 0.96 * torch.rand(self.size), torch.randn_like(x)
            s = t.view(-1, 1, 1, 1)
            x_t = (1 - s) * x + s * eps
            real = x_t - s * self.family.predict_velocity(self.teacher, x_t, t, conditioning, GUIDANCE)
            fake = x_t - s * self.ask(self.fake_score, x_t, t, conditioning)
            y, n = x - (fake - real), (x - real).abs().mean((1, 2, 3)).clamp(min=1e-3)
        self.step(0, self.generator, (0.5 * (x - y).square().mean((1, 2, 3)) / n).mean())
        with torch.no_grad():
            pairs = (list(self.ema.parameters()), list(self.generator.parameters()))
            torch._foreach_lerp_(*pairs, 0.02)
        x = x.detach()
        for _ in range(FAKE_SCORE_UPDATES):
            t, eps = 0.02 + 0.96 * torch.rand(self.size), torch.randn_like(x)
            s = t.view(-1, 1, 1, 1)
            v = self.ask(self.fake_score, (1 - s) * x + s * eps, t, conditioning)
            self.step(1, self.fake_score, (v - (eps - x)).square().mean())

    @torch.no_grad()
    def rollout(self, conditioning) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.size, *self.shape)
        stop = torch.arange(self.size) // 4 % STEPS
        for k in range(STEPS - 1):
            rows = (stop > k).nonzero()[:, 0]
            sigma = self.sigmas[k].expand(len(rows))
            v = self.ask(self.generator, x[rows], sigma, conditioning.select(rows))
            x[rows] = x[rows] + (self.sigmas[k + 1] - self.sigmas[k]) * v
        return x, self.sigmas[stop]

    def ask(self, network: nn.Module, x: Tensor, sigma: Tensor, conditioning) -> Tensor:
        return self.family.velocity(network, x, sigma, conditioning)

    def step(self, index: int, network: nn.Module, loss: Tensor) -> None:
        self.optimizers[index].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimizers[index].step()


class Pairs(pl.Callback):
    """After each update of the module, one of the plain loop; both are timed."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.ours: list[float] = []
        self.plain: list[float] = []

    def on_train_start(self, trainer, module):
        self.loop = PlainLoop(module, self.batch_size)
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        done = time.perf_counter()
        self.ours.append(done - self.since)
        conditioning = module.embeddings([prompt.text for prompt in batch.prompts])
        begin = time.perf_counter()
        self.loop.update(conditioning)
        self.since = time.perf_counter()
        self.plain.append(self.since - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    matching = Matching(guidance_scale=GUIDANCE, fake_score_updates=FAKE_SCORE_UPDATES)
    family = SD3Family("package:assets/shapes", max_sequence_length=0)
    module = DMD(family, height=32, width=32, matching=matching)
    pairs = Pairs(options.batch_size)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=options.updates + 2, max_epochs=-1, logger=False, callbacks=[pairs],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule("shapes", batch_size=options.batch_size, group_size=4))
    ours, plain = pairs.ours[2:], pairs.plain[2:]
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(f"this project: {statistics.median(ours):.3f} s per update, plain loop: {statistics.median(plain):.3f} s")
    print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
