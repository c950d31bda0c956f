"""What all distillation methods share: roles, optimizers with two time scales, random streams, checkpoints.

The only place that knows Lightning's manual optimisation. A method answers two questions, ``critic_loss`` and
``generator_loss``; everything they need to compose is a call away.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gdmd_lightning.data.embeddings import PromptEmbeddings
from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.methods.checkpointing import check_fits
from gdmd_lightning.methods.settings import Matching, Optimization
from gdmd_lightning.methods.targets import Targets, implicit_targets
from gdmd_lightning.objectives.score_matching import velocity_loss
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.roles import Role, Roles, Trainable
from gdmd_lightning.samplers import FewStepSampler, State, backward_simulation, draw_noise, sample
from gdmd_lightning.schedules import draw_levels, renoise


class DistillationModule(pl.LightningModule):
    """A few-step generator, its critic and its teacher, under manual optimisation.

    One ``training_step`` is one generator update followed by ``matching.critic_updates`` critic updates;
    ``trainer.max_steps`` counts generator updates.

    Args:
        family: The teacher's pipeline.
        height, width: Resolution in pixels.
        sampler: The few-step sampler.
        matching: Distribution matching.
        generator, critic: The two optimizers.
        ema_decay: Of the weights that are evaluated and exported.
        seed: Of every random stream; with rank and update it determines all draws.
        start_from: Checkpoint of this project whose generator, fake score and averages are taken over as a start.
    """

    old_decay: float | None = None
    snapshots: int = 0

    def __init__(
        self,
        family: ModelFamily,
        height: int = 1024,
        width: int = 1024,
        sampler: FewStepSampler = FewStepSampler(),
        matching: Matching = Matching(),
        generator: Optimization = Optimization(),
        critic: Optimization = Optimization(),
        ema_decay: float = 0.99,
        seed: int = 0,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.family, self.sampler, self.matching = family, sampler, matching
        self.height, self.width, self.seed = height, width, seed
        self.optimization = {"generator": generator, "fake_score": critic}
        self.ema_decay, self.start_from = ema_decay, start_from
        self.roles: Roles | None = None
        self.configuration = ""

    # What a method answers.

    @abstractmethod
    def generator_loss(
        self, batch: PromptBatch, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The generator's loss on a batch.

        Returns:
            The loss; the student samples it was computed on, ``[B, C, H, W]``; and what to log, on the device.
        """

    def critic_loss(self, x0: Tensor, conditioning: Conditioning, turn: int) -> Tensor:
        """Flow matching of the fake score on student samples; ``turn`` numbers the critic's updates in this step."""
        stream = self.stream("critic", turn)
        sigma = draw_levels(self.matching.law, 1, len(x0), stream)[0].to(x0)
        eps = draw_noise(tuple(x0.shape), stream, x0.device)
        v = self.networks.velocity("fake_score", renoise(x0, sigma, eps), sigma, conditioning)
        return velocity_loss(v, x0, eps)

    # Pieces that methods compose.

    def rollout_state(self, batch: PromptBatch, conditioning: Conditioning, purpose: str = "rollout") -> State:
        """Backward simulation to levels that the batch's prompts cover evenly, from this update's own noise.

        All samples of a prompt stand at one level: a reward then compares them with their like, and not early
        guesses with finished pictures.
        """
        stream = self.stream(purpose)
        noise = draw_noise((len(conditioning), *self.latent_shape), stream, self.device)
        first = int(torch.randint(self.sampler.steps, (1,), generator=stream))
        level = (batch.groups + first) % self.sampler.steps
        predict = self.predictor("generator", conditioning)
        return backward_simulation(predict, noise, self.sigmas, level, self.sampler, stream)

    def student_x0(self, state: State, conditioning: Conditioning) -> Tensor:
        """The student's sample at its state, ``[B, C, H, W]``; with gradient inside a training role."""
        return self.networks.x0("generator", state.x_sigma, state.sigma, conditioning)

    def implicit_targets(self, x: Tensor, conditioning: Conditioning, level: Tensor, snapshot: Tensor) -> Targets:
        """Targets of student samples ``x`` at renoise levels ``[B, M]``, see :func:`implicit_targets`."""
        return implicit_targets(self.networks, x, conditioning, level, snapshot, self.matching, self.stream("renoise"))

    def predictor(self, role: Role, conditioning: Conditioning, guidance_scale: float = 1.0) -> Any:
        """A role's velocity as samplers ask for it."""

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            whole = len(rows) == len(conditioning)
            chosen = conditioning if whole else conditioning.select(rows)
            return self.networks.velocity(role, x, sigma, chosen, guidance_scale)

        return predict

    def stream(self, purpose: str, turn: int = 0) -> torch.Generator:
        """A random stream of its own for each purpose, update and rank.

        Being a function of those, it needs no place in a checkpoint, and asking for more randomness elsewhere
        (logging, evaluation) never changes a run.
        """
        name = f"{self.seed}/{self.global_rank}/{self.updates}/{purpose}/{turn}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    @torch.no_grad()
    def generate(self, noise: Tensor, texts: list[str], role: Role = "ema") -> Tensor:
        """Pictures ``[B, 3, H, W]`` of the few-step generator from noise ``[B, C, H, W]``."""
        conditioning = self.embeddings(texts)
        stream = torch.Generator().manual_seed(self.seed)
        x0 = sample(self.predictor(role, conditioning), noise, self.sigmas, self.sampler, stream)
        return self.family.decode(x0)

    @torch.no_grad()
    def generate_teacher(self, noise: Tensor, texts: list[str], steps: int, guidance_scale: float) -> Tensor:
        """Pictures ``[B, 3, H, W]`` of the teacher by Euler steps on its own scheduler's levels."""
        predict = self.predictor("teacher", self.embeddings(texts), guidance_scale)
        start = self.family.teacher_start(steps) * noise
        x0 = sample(predict, start, self.family.teacher_sigmas(steps), FewStepSampler(steps, "ode"))
        return self.family.decode(x0)

    # Lightning.

    @property
    def networks(self) -> Roles:
        """The roles, once :meth:`configure_model` has run."""
        if self.roles is None:
            raise RuntimeError("configure_model() must run before the roles are used")
        return self.roles

    @property
    def updates(self) -> int:
        """Generator updates done so far."""
        return 0 if self._trainer is None else int(self.trainer.global_step)

    def configure_model(self) -> None:
        """Load the family and cast its network in all roles, once."""
        if self.roles is not None:
            return
        network = self.family.load()
        self.latent_shape = self.family.latent_shape(self.height, self.width)
        self.sigmas = self.family.few_step_sigmas(self.sampler.steps)
        self.embeddings = PromptEmbeddings(self.family)
        self.roles = Roles(
            self.family, network, ema_decay=self.ema_decay, old_decay=self.old_decay, snapshots=self.snapshots
        )
        if self.start_from is not None:
            from gdmd_lightning.methods.checkpointing import take_over

            take_over(self, self.start_from)

    def on_fit_start(self) -> None:
        """Bring what is no module of ours to the device."""
        self.family.to(self.device)

    def configure_optimizers(self) -> Any:
        """AdamW for the generator and for the fake score, in that order, each with its warm-up."""
        out = []
        for role in ("generator", "fake_score"):
            settings = self.optimization[role]
            optimizer = torch.optim.AdamW(
                self.networks.parameters_of(role),  # type: ignore[arg-type]
                lr=settings.learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
            )
            schedule = torch.optim.lr_scheduler.LinearLR(
                optimizer, 1 / max(settings.warmup, 1), total_iters=max(settings.warmup, 1) - 1
            )
            out.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}})
        return tuple(out)

    def training_step(self, batch: PromptBatch, batch_index: int) -> None:
        """One generator update, then the critic's."""
        conditioning = self.embeddings([prompt.text for prompt in batch.prompts])
        with self.networks.learning("generator"):
            loss, x0, logs = self.generator_loss(batch, conditioning)
            self._update("generator", loss)
        x0 = x0.detach()
        for turn in range(self.matching.critic_updates):
            if self.matching.critic_samples == "fresh":
                with torch.no_grad():
                    x0 = self.student_x0(
                        self.rollout_state(batch, conditioning, f"critic rollout {turn}"), conditioning
                    )
            with self.networks.learning("fake_score"):
                critic = self.critic_loss(x0, conditioning, turn)
                self._update("fake_score", critic)
            logs["critic_loss"] = critic.detach()
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self.networks.after_generator_update()
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{k}": v for k, v in logs.items()}, batch_size=len(batch))

    def _update(self, role: Trainable, loss: Tensor) -> None:
        optimizer: Any = self.optimizers()[("generator", "fake_score").index(role)]  # type: ignore[index]
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, self.optimization[role].gradient_clip, "norm")
        if role == "generator":
            optimizer.step()
        else:
            # Lightning counts every step taken through its wrapper as one of max_steps; the strategy's own call,
            # which that wrapper makes too, does not, so max_steps stays the number of generator updates.
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None, self)

    # Checkpoints hold what was trained; the frozen teacher stays where it came from.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All roles but the teacher."""
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not name.startswith("roles.teacher.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration that the command line built this module from, so that a checkpoint explains itself."""
        checkpoint["configuration"] = self.configuration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not of this model before anything is overwritten, and add the teacher to it."""
        check_fits(self, checkpoint)
        teacher = {f"roles.teacher.{name}": value for name, value in self.networks.teacher.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}
