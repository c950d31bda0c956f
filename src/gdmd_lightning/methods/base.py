"""What all distillation methods share: roles, optimizers with two time scales, random streams, checkpoints.

The only place that knows Lightning's manual optimisation. A method answers two questions, ``critic_loss`` and
``generator_loss``; everything they need to compose is a call away.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.data.embeddings import PromptEmbeddings, embed_ahead
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.methods.checkpointing import Provenance, check_fits, take_over
from gdmd_lightning.methods.settings import Matching, Memory, Optimization
from gdmd_lightning.methods.targets import Targets, implicit_targets
from gdmd_lightning.objectives.score_matching import velocity_loss
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.roles import AdapterRoles, CopiedRoles, LoRA, Role, Roles, Trainable
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
        lora: Train adapters on one network instead of copies of it.
        memory: What is done to need less of it.
        embedding_cache: Embed all prompts of a run before it trains, on disk; null to embed each as it comes.
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
        lora: LoRA | None = None,
        memory: Memory = Memory(),
        embedding_cache: EmbeddingCache | None = None,
        ema_decay: float = 0.99,
        seed: int = 0,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.family, self.sampler, self.matching = family, sampler, matching
        self.height, self.width, self.seed = height, width, seed
        self.optimization: dict[Trainable, Optimization] = {"generator": generator, "fake_score": critic}
        self.lora, self.memory, self.embedding_cache = lora, memory, embedding_cache
        self.ema_decay, self.start_from = ema_decay, start_from
        self.roles: Roles | None = None
        self.provenance = Provenance()

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
        law = self.matching.critic_law or self.matching.law
        sigma = draw_levels(law, 1, len(x0), stream)[0].to(x0)
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
    def generate(
        self, noise: Tensor, texts: list[str], role: Role = "ema", streams: list[torch.Generator] | None = None
    ) -> Tensor:
        """Pictures ``[B, 3, H, W]`` of the few-step generator from noise ``[B, C, H, W]``.

        A stochastic sampler draws from ``streams``, one a picture, or from one stream of the module's seed.
        """
        conditioning = self.embeddings(texts)
        fresh = torch.Generator().manual_seed(self.seed) if streams is None else streams
        x0 = sample(self.predictor(role, conditioning), noise, self.sigmas, self.sampler, fresh)
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

    def setup(self, stage: str) -> None:
        """See that the optimizers are to be had, before anything is loaded."""
        if stage == "fit":
            for settings in self.optimization.values():
                settings.check()

    def configure_model(self) -> None:
        """Load the family and cast its network in all roles, once."""
        if self.roles is not None:
            return
        network = self.family.load()
        self.cast_roles(network)
        self.embeddings = PromptEmbeddings(self.family)
        if self.start_from is not None:
            take_over(self, self.start_from)

    def cast_roles(self, network: nn.Module) -> None:
        """Give the family's network its roles, as copies or as adapters."""
        self.family.save_memory(slicing=self.memory.vae_slicing, tiling=self.memory.vae_tiling)
        self.latent_shape = self.family.latent_shape(self.height, self.width)
        self.sigmas = self.family.few_step_sigmas(self.sampler.steps)
        kept: dict[str, Any] = {"old_decay": self.old_decay, "snapshots": self.snapshots, "ema_decay": self.ema_decay}
        if self.lora is None:
            self.roles = CopiedRoles(self.family, network, **kept)
        else:
            self.roles = AdapterRoles(self.family, network, lora=self.lora, seed=self.seed, **kept)
        if self.memory.gradient_checkpointing:
            self.roles.checkpoint_activations()

    def on_fit_start(self) -> None:
        """Bring what is no module of ours to the device; embed the prompts ahead where that is wanted."""
        self.family.to(self.device)
        if self.embedding_cache is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise UserError("no data module says which prompts to embed", where="embedding_cache")
            self.embeddings = embed_ahead(
                self.family,
                self.embedding_cache,
                data,
                self.trainer.callbacks,  # type: ignore[attr-defined]
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                barrier=self.trainer.strategy.barrier,
            )

    def configure_optimizers(self) -> Any:
        """Of the generator and of the fake score, in that order, each with its warm-up."""
        out = []
        for role, settings in self.optimization.items():
            optimizer = settings.over(self.networks.parameters_of(role))
            schedule = torch.optim.lr_scheduler.LinearLR(
                optimizer, 1 / max(settings.warmup, 1), total_iters=max(settings.warmup, 1) - 1
            )
            out.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}})
        return tuple(out)

    def training_step(self, batch: PromptBatch, batch_index: int) -> None:
        """One generator update, then the critic's."""
        conditioning = self.embeddings([prompt.text for prompt in batch.prompts])
        loss, logs = self.one_update(batch, conditioning, self._update)
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self.networks.after_generator_update()
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{k}": v for k, v in logs.items()}, batch_size=len(batch))

    def one_update(
        self, batch: PromptBatch, conditioning: Conditioning, update: Callable[[Trainable, Tensor], None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of an update in their order, each given to ``update`` with the role that learns from it.

        Returns:
            The generator's loss and what to log, detached.
        """
        with self.networks.learning("generator"):
            loss, x0, logs = self.generator_loss(batch, conditioning)
            update("generator", loss)
        x0 = x0.detach()
        logs["sample_std"] = x0.std()
        for turn in range(self.matching.critic_updates):
            if self.matching.critic_samples == "fresh":
                with torch.no_grad():
                    x0 = self.student_x0(
                        self.rollout_state(batch, conditioning, f"critic rollout {turn}"), conditioning
                    )
            with self.networks.learning("fake_score"):
                critic = self.critic_loss(x0, conditioning, turn)
                update("fake_score", critic)
            logs["critic_loss"] = critic.detach()
        return loss.detach(), logs

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
        return {name: value for name, value in whole.items() if not self._is_teachers(name)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint explain itself."""
        checkpoint["provenance"] = asdict(replace(self.provenance, updates=self.updates))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not of this model before anything is overwritten, and add the teacher to it."""
        check_fits(self, checkpoint)
        self.provenance = replace(self.provenance, scores=checkpoint["provenance"]["scores"])
        teacher = {name: value for name, value in super().state_dict().items() if self._is_teachers(name)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}

    def _is_teachers(self, name: str) -> bool:
        return name.startswith("roles.") and self.networks.is_teachers(name.removeprefix("roles."))
