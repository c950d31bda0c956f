"""Time of a DMD update next to that of other projects, on the same network, in turn within one process.

git clone https://github.com/NVlabs/FastGen && git clone https://github.com/Harahan/RTDMD
OMP_NUM_THREADS=1 .venv/bin/python benchmarks/peers.py --peer FastGen --peer RTDMD [--size tiny] [--samples fresh]
    [--compile blocks] [--profile]

The code of the other projects is imported from these checkouts; docs/performance.md says which of it runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import lightning.pytorch as pl
import torch
from counting import Counted, Time, time_in_products, time_of
from random_teachers import write_pipeline
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.settings import Matching, Speed
from gdmd_lightning.roles import Optimization
from gdmd_lightning.shapes import pipeline as parts

GUIDANCE, DECAY, RATE = 3.0, 0.99, 1e-4
SIZES = {"tiny": (2, 4), "mid": (6, 12)}
"""Layers and 32-wide heads of the transformer."""
SIDE = 64
SKIPPED = 2
"""Updates at the start that no median counts."""
UNUSED_BY_AN_UPDATE = ("av", "boto3", "botocore", "cv2", "ftfy", "hydra", "imageio", "loguru", "pynvml", "wandb")
UNUSED_BY_AN_UPDATE += ("webdataset",)
"""What FastGen imports to log, to read data and to reach cloud storage."""


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are not installed and that no update needs."""

    def __init__(self) -> None:
        self.names = {name for name in UNUSED_BY_AN_UPDATE if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class FastGen:
    """NVlabs/FastGen: ``DMD2Model`` without its GAN, its optimizers, clipping and average, in its trainer's order."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], fake_score_updates: int, steps: int) -> None:
        from fastgen.callbacks.ema import EMACallback
        from fastgen.callbacks.grad_clip import GradClipCallback
        from fastgen.configs.methods.config_dmd2 import ModelConfig
        from fastgen.methods import DMD2Model
        from fastgen.networks.network import FastGenNetwork
        from fastgen.utils import LazyCall

        class SD3(FastGenNetwork):
            """diffusers' transformer, as FastGen's own ``Flux`` wraps its own."""

            def __init__(self) -> None:
                super().__init__(net_pred_type="flow", schedule_type="rf")
                self.transformer = copy.deepcopy(network).requires_grad_()

            def forward(
                self, x_t: Tensor, t: Tensor, condition: Any = None, fwd_pred_type: Any = None, **_: Any
            ) -> Any:
                flow = predicted(self.transformer, x_t, (1000 * t).to(x_t.dtype), condition)
                wanted = {"src_pred_type": "flow", "target_pred_type": fwd_pred_type or "flow"}
                return self.noise_scheduler.convert_model_output(x_t, flow, t, **wanted)

        config = ModelConfig()
        config.net, config.input_shape, config.device = LazyCall(SD3)(), list(shape), "cpu"
        config.gan_loss_weight_gen, config.guidance_scale, config.use_ema = 0.0, GUIDANCE, True
        config.student_update_freq, config.student_sample_steps = fake_score_updates + 1, steps
        times = config.sample_t_cfg
        times.time_dist_type, times.min_t, times.max_t = "uniform", 0.02, 0.98
        for optimizer in (config.net_optimizer, config.fake_score_optimizer):
            optimizer.lr, optimizer.betas = RATE, (0.9, 0.99)
        for scheduler in (config.net_scheduler, config.fake_score_scheduler):
            scheduler.warm_up_steps = [0]
        self.model, self.iterations, self.iteration = DMD2Model(config), fake_score_updates + 1, 0
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.clip = [GradClipCallback(1.0, key) for key in ("net", "fake_score")]
        self.average = EMACallback(beta=DECAY)
        self.networks = [each.transformer for each in (self.model.net, self.model.teacher, self.model.fake_score)]

    def update(self, conditioning: Conditioning, empty: Conditioning, real: Tensor) -> None:
        model, data = self.model, {"real": real, "condition": conditioning, "neg_condition": empty}
        for _ in range(self.iterations):
            self.iteration += 1
            with model.autocast():
                losses, _ = model.single_train_step(data, self.iteration)
            model.grad_scaler.scale(losses["total_loss"]).backward()
            of_student = self.iteration % self.iterations == 0
            self.clip[0 if of_student else 1].on_optimizer_step_begin(model, self.iteration)
            model.optimizers_schedulers_step(self.iteration)
            model.optimizers_zero_grad(self.iteration)
        # Its trainer does this in every iteration; here it is once per update, as in ours.
        self.average.on_training_step_end(model, {}, {}, {}, self.iteration)


class RTDMD:
    """Harahan/RTDMD: ``DMDTrainer.train_step``, with its optimizers, clipping, average and scheduler of samples."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], fake_score_updates: int, steps: int) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from rtdmd.config import RTDMDConfig
        from rtdmd.schedulers import get_scheduler
        from rtdmd.trainers.dmd_trainer import DMDTrainer

        class Trainer(DMDTrainer):
            """Three things that name CUDA, or need a text encoder, are replaced."""

            def _encode_prompts(self, prompts: Any) -> Any:
                return prompts.sequence, prompts.pooled

            def _get_uncond_embeds(self, batch_size: int) -> Any:
                return self.empty.sequence, self.empty.pooled

            def _get_sigmas(self, timesteps: Tensor, n_dim: int = 4, dtype: Any = torch.float32) -> Tensor:
                return (timesteps / 1000).to(dtype).view(-1, *[1] * (n_dim - 1))

        config = RTDMDConfig()
        config.train.autocast_dtype, config.train.use_ema = "no", True
        config.train.ema_decay, config.train.ema_every = DECAY, fake_score_updates
        config.dmd.fake_update_ratio, config.dmd.num_inference_steps = fake_score_updates, steps
        config.dmd.denoising_step_list = [1000 - 1000 * k // steps for k in range(steps)]
        config.dmd.real_guidance_scale_min = config.dmd.real_guidance_scale_max = GUIDANCE
        config.dmd.fake_timestep_sampling = "uniform"
        for solver in (config.solver.generator, config.solver.fake_score):
            solver.lr, solver.beta1, solver.beta2, solver.max_grad_norm, solver.warmup_steps = RATE, 0.9, 0.99, 1.0, 0
        trainer = Trainer(config)
        trainer.timer = SimpleNamespace(measure=lambda _: nullcontext())
        trainer.generator, trainer.fake_score_net = (copy.deepcopy(network).requires_grad_() for _ in range(2))
        trainer.teacher, trainer.generator_ema = (copy.deepcopy(network).requires_grad_(False) for _ in range(2))
        trainer.latent_channels, trainer.latent_size = shape[:2]
        trainer.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        trainer.sigmas = torch.flip(trainer.scheduler.sigmas, dims=[0])
        trainer.x0_scheduler = get_scheduler("cps").from_config(trainer.scheduler.config)
        trainer.setup_optimizers()
        self.trainer, self.iterations = trainer, fake_score_updates
        self.networks = [trainer.generator, trainer.teacher, trainer.fake_score_net]

    def update(self, conditioning: Conditioning, empty: Conditioning, real: Tensor) -> None:
        self.trainer.empty = empty
        for _ in range(self.iterations):
            self.trainer.train_step(conditioning)
            self.trainer.global_step += 1


PEERS: dict[str, Callable[..., Any]] = {"fastgen": FastGen, "rtdmd": RTDMD}
"""By the package in the checkout."""


def predicted(network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    inputs = {"encoder_hidden_states": conditioning.sequence, "pooled_projections": conditioning.pooled}
    return network(hidden_states=x, timestep=timestep, return_dict=False, **inputs)[0]


class Turns(pl.Callback):
    """After each update of the module, one of every peer; all are timed, and the last of each is profiled if asked."""

    def __init__(self, kinds: dict[str, Callable[..., Any]], options: Any) -> None:
        self.kinds, self.options = kinds, options
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *kinds)}
        self.counts = {name: Counted() for name in self.seconds}
        self.times: dict[str, Time] = {}
        self.recorded: profile | None = None

    def on_train_start(self, trainer, module):
        network = module.roles.standalone("teacher")
        settings = (network, module.latent_shape, self.options.fake_score_updates, self.options.steps)
        self.peers = {name: kind(*copy.deepcopy(settings)) for name, kind in self.kinds.items()}
        for name, peer in self.peers.items():
            for each in peer.networks:
                self.counts[name].watch(each)
        for role in ("generator", "teacher", "fake_score"):
            self.counts["ours"].watch(module.roles.standalone(role))
        self.since = time.perf_counter()

    def on_train_batch_start(self, trainer, module, batch, index):
        if len(self.seconds["ours"]) == self.options.updates + SKIPPED:  # the one more of --profile
            self.recorded = profile(activities=[ProfilerActivity.CPU])
            self.recorded.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if self.recorded is None:
            self.seconds["ours"].append(time.perf_counter() - self.since)
        else:
            self.recorded.stop()
            self.times["ours"] = time_of(self.recorded)
        texts = [prompt.text for prompt in batch.prompts]
        conditioning, empty = module.embeddings(texts), module.embeddings([""] * len(texts))
        real = torch.randn(len(texts), *module.latent_shape)
        for name, peer in self.peers.items():
            update = partial(peer.update, conditioning, empty, real)
            if self.recorded is None:
                began = time.perf_counter()
                update()
                self.seconds[name].append(time.perf_counter() - began)
            else:
                self.times[name] = time_in_products(update)
        self.since = time.perf_counter()


def build_transformer(layers: int, heads: int) -> nn.Module:
    """SD3's, for pictures of :data:`SIDE` pixels."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=32,
        num_attention_heads=heads, caption_projection_dim=32 * heads, joint_attention_dim=2 * parts.TEXT_WIDTH,
        pooled_projection_dim=2 * parts.TEXT_WIDTH, pos_embed_max_size=SIDE // 8, qk_norm="rms_norm",
    )  # fmt: skip


def peers_in(places: list[Path]) -> dict[str, Callable[..., Any]]:
    """The peers in these checkouts, which become importable."""
    found = {}
    for place in places:
        names = [name for name in PEERS if (place / name / "__init__.py").is_file()]
        if not names:
            sys.exit(f"--peer {place}: no checkout of NVlabs/FastGen or Harahan/RTDMD")
        found |= {name: PEERS[name] for name in names}
        sys.path.insert(0, str(place))
    stand_ins = StandIns()
    if "fastgen" in found:
        sys.meta_path.append(stand_ins)
        print(f"empty stand-ins for packages that are not installed: {', '.join(sorted(stand_ins.names)) or 'none'}")
    return found


def report(turns: Turns, options: Any) -> None:
    latents = (len(turns.seconds["ours"]) + options.profile) * options.batch_size
    per_latent = {name: (count.all / latents, count.trained / latents) for name, count in turns.counts.items()}
    seconds = {name: each[SKIPPED:] for name, each in turns.seconds.items()}
    for name, each in seconds.items():
        every, trained = per_latent[name]
        print(f"{name}: {statistics.median(each):.3f} s per update; {every:.2f} evaluations per sample, "
              f"{trained:.2f} of them with a backward pass")  # fmt: skip
    for name in turns.peers:
        ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds[name], strict=True)]
        # A backward pass costs about two evaluations.
        work = {each: per_latent[each][0] + 2 * per_latent[each][1] for each in ("ours", name)}
        ratio = statistics.median(ratios)
        print(f"ours / {name}: median {ratio:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; "
              f"at equal work {ratio * work[name] / work['ours']:.3f}")  # fmt: skip
    for name, times in turns.times.items():
        print(f"{name}, profiled: {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, action="append", required=True, help="a checkout; may be repeated")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--updates", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="steps of the generator")
    parser.add_argument("--fake_score_updates", type=int, default=3)
    parser.add_argument("--samples", choices=("fresh", "reused"), default="fresh", help="ours, for the fake score")
    parser.add_argument("--compile", choices=("none", "blocks"), default="none", help="ours; no peer offers it")
    parser.add_argument("--profile", action="store_true", help="one more update of each, by kinds of operators")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    optimization = Optimization(RATE, (0.9, 0.99), warmup=0)
    matching = Matching(
        guidance_scale=GUIDANCE, fake_score_updates=options.fake_score_updates, fake_score_samples=options.samples
    )
    kinds = peers_in(options.peer)
    with tempfile.TemporaryDirectory() as place:
        write_pipeline(Path(place), *SIZES[options.size], build=build_transformer)
        module = DMD(
            SD3Family(place, max_sequence_length=0), steps=options.steps, height=SIDE, width=SIDE, matching=matching,
            generator=optimization, fake_score=optimization, ema_decay=DECAY, speed=Speed(compile=options.compile),
        )  # fmt: skip
        turns = Turns(kinds, options)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=options.updates + SKIPPED + options.profile, max_epochs=-1,
            callbacks=[turns], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        prompts = Path(place) / "prompts.txt"  # few, so that ours has them encoded, as it is with the peers
        prompts.write_text("".join(f"a red circle and {i} squares\n" for i in range(options.batch_size)))
        trainer.fit(module, datamodule=PromptDataModule(str(prompts), batch_size=options.batch_size, group_size=1))
    report(turns, options)


if __name__ == "__main__":
    main()
