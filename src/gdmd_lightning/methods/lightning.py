"""The Lightning side of every method: roles, optimizers, checkpoints, random streams. No algorithm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.data.embeddings import PromptEmbeddings, embed_ahead
from gdmd_lightning.engines.base import Learn
from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.checkpointing import Provenance, check_fits, take_over
from gdmd_lightning.methods.settings import Memory
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.roles import AdapterRoles, CopiedRoles, LoRA, Optimization, Roles, RoleSpec
from gdmd_lightning.streams import stream


@dataclass(frozen=True)
class Update:
    """What an update reports.

    Args:
        logs: Scalars on the device; ``loss``, if there is one, is shown on the progress bar.
        record: Data for callbacks; Lightning passes it to them as ``outputs["record"]``. ``None`` for none.
    """

    logs: dict[str, Tensor] = field(default_factory=dict)
    record: Any = None


class RoleModule(pl.LightningModule):
    """A pipeline's network in the roles that a method declares, under manual optimization.

    One ``training_step`` is one :meth:`update`; ``trainer.max_steps`` counts updates, however many optimizer
    steps each of them takes.

    Args:
        family: The teacher's pipeline.
        height, width: Resolution in pixels.
        generator: The generator's optimizer.
        lora: Train adapters on one network instead of copies of it.
        memory: Memory-saving options.
        micro_batch_size: Maximum number of samples in memory at once; does not change the update. Null for no
            limit.
        embedding_cache: Embed all prompts to disk before training; null to embed each batch during training.
        ema_decay: Decay of the averaged weights, which are evaluated and exported, in [0, 1).
        seed: Seed of all random streams.
        start_from: Checkpoint of this project from which the roles are loaded at the start.

    Attributes:
        roles: The roles; available after :meth:`configure_model`.
        updates: Updates done so far; part of the checkpoint.

    Raises:
        UserError: If a value is out of range.
    """

    roles: Roles

    def __init__(
        self,
        family: ModelFamily,
        height: int = 1024,
        width: int = 1024,
        generator: Optimization = Optimization(),
        lora: LoRA | None = None,
        memory: Memory = Memory(),
        micro_batch_size: int | None = None,
        embedding_cache: EmbeddingCache | None = None,
        ema_decay: float = 0.99,
        seed: int = 0,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(
                f"it is {micro_batch_size}", where="model.micro_batch_size", remedy="use at least 1, or null"
            )
        if not 0 <= ema_decay < 1:
            raise UserError(f"it is {ema_decay}", where="model.ema_decay", remedy="it must be in [0, 1)")
        self.automatic_optimization = False
        self.family, self.height, self.width = family, height, width
        self.generator, self.lora, self.memory = generator, lora, memory
        self.micro_batch_size, self.embedding_cache = micro_batch_size, embedding_cache
        self.ema_decay, self.seed, self.start_from = ema_decay, seed, start_from
        self.updates = 0
        self.provenance = Provenance()
        self._only: str | None = None

    # What a method defines.

    @abstractmethod
    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles that the method needs besides the teacher."""

    @abstractmethod
    def update(self, batch: Batch, learn: Learn) -> Update:
        """One update: forwards, losses and ``with learn(role) as backward`` steps, in the method's own order."""

    # Roles.

    def configure_model(self) -> None:
        """Load the family and build the roles, once."""
        if hasattr(self, "roles"):
            return
        self.build_roles(self.family.load())
        self.embeddings = PromptEmbeddings(self.family)
        if self.start_from is not None:
            take_over(self, self.start_from)

    def build_roles(self, network: nn.Module) -> None:
        """Build the roles from the family's loaded network, as copies or as adapters."""
        self.family.save_memory(slicing=self.memory.vae_slicing, tiling=self.memory.vae_tiling)
        self.latent_shape = self.family.latent_shape(self.height, self.width)
        specs = self.role_specs()
        if self._only is not None:
            specs = (RoleSpec(self._only, optimizer=self.generator),)
        if self.lora is None:
            self.roles = CopiedRoles(self.family, network, specs, self.micro_batch_size)
        else:
            self.roles = AdapterRoles(
                self.family, network, specs, self.micro_batch_size, lora=self.lora, seed=self.seed
            )
        if self.memory.gradient_checkpointing:
            self.roles.checkpoint_activations()

    def real_x0(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Latents of real images of these prompts, ``[B, C, H, W]``; ``None`` if the method needs none."""
        return None

    def only_role(self, role: str) -> None:
        """Build only one role besides the teacher, for sampling and export; call before :meth:`configure_model`."""
        self._only = role

    @property
    def restricted(self) -> bool:
        """Whether only one of the method's roles is built."""
        return self._only is not None

    def stream(self, purpose: str, turn: int = 0) -> torch.Generator:
        """Random stream of a purpose in this update on this rank.

        It depends only on seed, rank, update, purpose and ``turn``, so checkpoints need not store it, and
        numbers drawn elsewhere (logging, evaluation) do not change a run.
        """
        return stream(self.seed, self.global_rank, self.updates, purpose, turn)

    # Training.

    def setup(self, stage: str) -> None:
        """Fail early if an optimizer is not installed."""
        if stage == "fit":
            for role in self.role_specs():
                if role.optimizer is not None:
                    role.optimizer.check()

    def on_fit_start(self) -> None:
        """Move text encoders and VAE to the device; embed all prompts if configured."""
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
        """One optimizer per trained role, in the order of the specs, each with its warm-up."""
        out = []
        for role in self.roles.trained:
            settings = self.roles.optimization_of(role)
            optimizer = settings.optimizer(self.roles.parameters_of(role))
            out.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": settings.schedule(optimizer)}})
        return out

    def training_step(self, batch: PromptBatch, batch_index: int) -> dict[str, Any] | None:
        """One update of the method."""
        conditioning = self.embeddings([prompt.text for prompt in batch.prompts])
        optimizers = dict(zip(self.roles.trained, _listed(self.optimizers()), strict=True))
        done = self.update(
            Batch(batch.prompts, batch.groups, conditioning, self.real_x0(batch.prompts)),
            LightningEngine(self, self.roles, optimizers),
        )
        self.updates += 1
        for schedule in _listed(self.lr_schedulers()):
            schedule.step()
        logs = dict(done.logs)
        if "loss" in logs:
            self.log("loss", logs.pop("loss"), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        return None if done.record is None else {"record": done.record}

    # Checkpoints hold what was trained; the frozen teacher stays in its pipeline.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All roles except the teacher."""
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not self._is_frozen(name)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the provenance, so that the checkpoint can be restored without its configuration file."""
        checkpoint["provenance"] = asdict(replace(self.provenance, updates=self.updates))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fail before any weight changes if the checkpoint does not fit; add the teacher to it."""
        check_fits(self, checkpoint)
        origin = checkpoint["provenance"]
        self.updates = origin["updates"]
        self.provenance = replace(self.provenance, scores=origin["scores"])
        teacher = {name: value for name, value in super().state_dict().items() if self._is_frozen(name)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}

    def _is_frozen(self, name: str) -> bool:
        return name.startswith("roles.") and self.roles.is_frozen(name.removeprefix("roles."))


def _listed(found: Any) -> list[Any]:
    """Lightning returns one optimizer or schedule as itself and several as a list."""
    return found if isinstance(found, list) else [found]
