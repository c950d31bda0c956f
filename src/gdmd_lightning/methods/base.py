"""What all methods share: a few-step generator, its rollouts, and sampling from it.

A method declares its roles and writes its update as a short script over these pieces.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from gdmd_lightning.described import described_digest
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily, Pipeline
from gdmd_lightning.families.pictures import check_pictures
from gdmd_lightning.latents import Batch, Conditioning, NoisyLatents, micro_batches
from gdmd_lightning.methods.history import PromptHistory
from gdmd_lightning.methods.lightning import Logs, RoleModule, Update
from gdmd_lightning.phases import phase
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Steps, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import RoleSpec
from gdmd_lightning.samplers import ODE, Predict, Sampler, Trajectory, rollout
from gdmd_lightning.streams import Streams, draw_noise, streams_of

__all__ = ["DistillationModule", "Logs", "State", "Update", "weighted_sum"]


@dataclass(frozen=True)
class State:
    """Partly denoised generator samples: the input of the step to be trained.

    Args:
        latents: ``B`` rows.
        step_index: The sampler's step that starts here, ``[B]`` in ``0..K-1``, on the CPU.
    """

    latents: NoisyLatents
    step_index: Tensor


@ranged
class DistillationModule(RoleModule, ABC):
    """A few-step generator that a method trains.

    Args:
        family: The teacher's pipeline.
        steps: Network evaluations per sample.
        sampler: How the generator goes from step to step.
        shared: Arguments of :class:`RoleModule`.

    Attributes:
        history: Rewards of earlier updates by prompt, for methods that compare samples with them; part of the
            checkpoint.
    """

    judge: Judge | None = None
    needs_groups: bool = False
    """Whether the method compares the samples of a prompt, so that a prompt needs several."""
    keeps_record: ClassVar[bool] = False
    """Whether updates carry a record of judged targets."""

    def __init__(self, family: ModelFamily, steps: Steps = 4, sampler: Sampler = ODE(), **shared: Any) -> None:
        super().__init__(family, **shared)
        self.steps, self.sampler = steps, sampler
        self.history = PromptHistory()

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """A trained generator and its average, which is evaluated and exported."""
        return (
            RoleSpec("generator", optimizer=self.generator),
            RoleSpec("ema", average_of="generator", decay=self.ema_decay),
        )

    def check_data(self, data: Any) -> None:
        """Fail if the method compares the samples of a prompt and the data has one for each.

        Raises:
            UserError: If so.
        """
        self._check_groups(getattr(data, "group_size", 2))

    def check_batch(self, batch_size: int, group_size: int) -> None:
        """Fail if the method compares the samples of a prompt and there is one for each."""
        self._check_groups(group_size)

    def _check_groups(self, group_size: int) -> None:
        if self.needs_groups and group_size < 2:
            raise UserError(
                f"it is 1, but {type(self).__name__} compares the samples of a prompt",
                where="data.group_size",
                remedy="use at least 2",
            )

    def setup(self, stage: str) -> None:
        """Fail early if the data does not suit the method, or the reward is not here."""
        super().setup(stage)
        if stage == "fit":
            self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]
        if stage == "fit" and self.judge is not None:
            # As it is before it has loaded or judged anything, also in a second call of fit.
            self.history.reward = self.history.reward or described_digest(self.judge.reward)
            self.judge.reward.prepare()

    def build_roles(self, network: nn.Module) -> None:
        super().build_roles(network)
        self.sigmas = self.family.few_step_sigmas(self.steps, self.latent_shape)

    @property
    def fullest_update(self) -> int:
        """Number of an update that has all parts, for plans of its memory."""
        return 0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        if self.judge is not None:
            self.judge.check(prompts)

    def check_pipeline_export(self) -> None:
        """Fail if no diffusers pipeline takes the sampler's steps; the roles must be built.

        Raises:
            UserError: If there is no scheduler for the sampler, or not for this number of steps.
        """
        if self.sampler.scheduler is None:
            sampler = type(self.sampler).__name__
            raise UserError(f"diffusers has no scheduler for {sampler}", where="sampler", remedy="use ODE or Renoise")
        self.family.check_export(self.steps, stochastic=self.sampler.scheduler == "renoise")

    def to_pipeline(self, network: nn.Module) -> Pipeline:
        """A diffusers pipeline around a network that samples as this module does; errors as the family's."""
        stochastic = self.sampler.scheduler == "renoise"
        return self.family.to_pipeline(network, self.steps, self.latent_shape, stochastic=stochastic)

    def on_fit_start(self) -> None:
        """Say before training if commands cannot load the result, or it cannot be exported as a pipeline."""
        try:
            self.configuration()
        except ValueError as error:
            rank_zero_info(f"warning: sample, evaluate and export cannot load checkpoints of this run ({error})")
        try:
            self.check_pipeline_export()
        except UserError as error:
            instead = "export --form lora works, without a scheduler" if self.lora else "sample works"
            rank_zero_info(f"warning: this run cannot be exported as a pipeline ({error}); {instead}")
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reward's name, since export and sampling restore a module without it, and the prompts' history."""
        super().on_save_checkpoint(checkpoint)
        if self.judge is not None:
            checkpoint["provenance"]["reward"] = self.judge.reward.name
        if len(self.history):
            checkpoint["prompt_history"] = self.history.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "prompt_history" in checkpoint:
            self.history.load_state_dict(checkpoint["prompt_history"])

    # What updates are written with.

    def judge_with(self, reward: Reward) -> Judge:
        """A judge that decodes with this family and follows the memory options."""
        return Judge(reward, self.family, self.memory.reward, self.micro_batch_size)

    def reward_logs(self) -> dict[str, Tensor]:
        return {} if self.judge is None else self.judge.logs()

    def limit_micro_batches(self, size: int) -> None:
        super().limit_micro_batches(size)
        if self.judge is not None:
            self.judge.micro_batch_size = self.micro_batch_size

    def micro_batches(self, rows: int) -> Iterator[tuple[slice, float]]:
        """Slices of a batch that fit into memory at once, each with its share of the batch."""
        for part in micro_batches(rows, self.micro_batch_size):
            yield part, (part.stop - part.start) / rows

    def predictor(self, role: str, conditioning: Conditioning, guidance_scale: float = 1.0) -> Predict:
        """A role's velocity in the form that samplers call."""

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            chosen = conditioning if len(rows) == len(conditioning) else conditioning.select(rows)
            return self.roles.velocity(role, NoisyLatents(x, sigma, chosen), guidance_scale=guidance_scale)

        return predict

    def rollout_state(self, batch: Batch, purpose: str = "rollout", step_index: int | None = None) -> State:
        """Backward simulation: bring samples from pure noise to the step to be trained, without gradient.

        All samples of a prompt are at the same step, so that their rewards are comparable, and the prompts of
        a batch cover the steps evenly.

        Args:
            batch: ``B`` samples.
            purpose: Name of the random stream.
            step_index: One step for all samples, in ``0..K-1``; ``None`` to cover all steps.

        Source: DMD2 (2405.14867), section 4.5.
        """
        rng = self.stream(purpose)
        noise = draw_noise((len(batch), *self.latent_shape), rng, self.device)
        first = int(torch.randint(self.steps, (1,), generator=rng.common))
        groups = batch.groups + rng.rank * (int(batch.groups[-1]) + 1)  # in the batch of all ranks
        stop = (groups + first) % self.steps
        if step_index is not None:
            stop = torch.full_like(stop, step_index)
        # How many steps are taken is drawn on each rank.
        with phase("rollout"), self.roles.lockstep("generator"):
            path = rollout(self.predictor("generator", batch.conditioning), noise, self.sigmas, self.sampler, rng, stop)
        return State(NoisyLatents(path.states[-1], self.sigmas[stop].to(noise), batch.conditioning), stop)

    def rollout(
        self,
        batch: Batch,
        purpose: str = "rollout",
        sampler: Sampler | None = None,
        role: str = "generator",
        shared: Mapping[int, Tensor] | None = None,
    ) -> Trajectory:
        """Full rollout of the generator, or of another role, from pure noise, without gradient.

        Args:
            batch: ``B`` samples.
            purpose: Name of the random stream.
            sampler: How steps are taken; ``None`` as in generation.
            role: Who takes them.
            shared: By step, the row whose noise each sample takes, ``[B]``.
        """
        rng = self.stream(purpose)
        noise = draw_noise((len(batch), *self.latent_shape), rng, self.device)
        predict = self.predictor(role, batch.conditioning)
        with phase("rollout"):
            return rollout(predict, noise, self.sigmas, sampler or self.sampler, rng, shared=shared)

    def student_x0(self, latents: NoisyLatents) -> Tensor:
        """The generator's samples ``[B, C, H, W]``, with gradient while it is learning."""
        return self.roles.x0("generator", latents)

    # Sampling.

    @property
    def teacher_guidance(self) -> float:
        """Guidance scale that the method uses for its teacher; 1 if it does not use the teacher."""
        return 1.0

    @torch.no_grad()
    def generate(self, noise: Tensor, texts: list[str], role: str = "ema", rngs: Streams | None = None) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] from noise ``[B, C, H, W]`` in the generator's few steps.

        A stochastic sampler draws from ``rngs``: one stream per image, by default one that its noise determines, so
        that an image depends on noise and text only, and not on its batch or on the seed that the module trains with.
        """
        predict = self.predictor(role, self.embeddings(texts))
        rngs = streams_of(noise) if rngs is None else rngs
        return self._pictures(rollout(predict, noise, self.sigmas, self.sampler, rngs).x0, texts)

    @torch.no_grad()
    def generate_teacher(self, noise: Tensor, texts: list[str], steps: int, guidance_scale: float) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] of the teacher, drawn by its pipeline's own scheduler.

        A scheduler that draws noise in its steps gets a stream per image that the image's noise determines.
        """
        predict = self.predictor("teacher", self.embeddings(texts), guidance_scale)
        return self._pictures(self.family.sample_teacher(predict, noise, steps, streams_of(noise)), texts)

    def _pictures(self, x0: Tensor, texts: list[str]) -> Tensor:
        """Decoded latents; fails if a picture is not finite, which could neither be shown nor scored."""
        images = self.family.decode(x0)
        check_pictures(images, texts, x0)
        return images


def weighted_sum(total: dict[str, Tensor], share: float, **values: Tensor) -> None:
    """Add ``share`` times each value, detached, to a running total, to average over micro-batches."""
    for name, value in values.items():
        part = share * value.detach()
        total[name] = part if name not in total else total[name] + part
