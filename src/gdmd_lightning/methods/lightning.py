"""The Lightning side of every method: roles, optimizers, checkpoints, random streams. No algorithm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from gdmd_lightning.constructed import Constructed, configuration_of
from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.data.embeddings import PromptEmbeddings, embed_ahead
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.engines.base import Learn
from gdmd_lightning.engines.deepspeed import DeepSpeedEngine, DeepSpeedPlacement, check_stages, trained_networks
from gdmd_lightning.engines.fsdp import FSDPEngine, FSDPPlacement, check_sharding
from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.engines.non_finite import NonFinite, StepGuard
from gdmd_lightning.engines.placement import Placement
from gdmd_lightning.engines.precision import check_precision
from gdmd_lightning.engines.unfit import check_fitting
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.fingerprint import fingerprint, weights_fingerprint
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.checkpointing import check_fits, content_digest
from gdmd_lightning.methods.feeding import ask_for_whole_updates, check_fed, check_source
from gdmd_lightning.methods.finite import check_finite, check_shards, check_whole, learned
from gdmd_lightning.methods.provenance import Provenance, read_provenance
from gdmd_lightning.methods.random_states import global_states, restore_global_states
from gdmd_lightning.methods.resuming import (
    check_resumable,
    fixed_settings,
    report_changes,
    use_current_optimization,
)
from gdmd_lightning.methods.settings import Memory, Speed
from gdmd_lightning.methods.starting import merges, take_over
from gdmd_lightning.phases import Stopwatch, listening
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.ranges import Count, Decay, Seed, ranged
from gdmd_lightning.ranks import mean_over_ranks
from gdmd_lightning.roles import (
    AdapterRoles,
    CopiedRoles,
    LoRA,
    Optimization,
    Roles,
    RoleSpec,
    ShardedAdapterRoles,
    ShardedRoles,
)
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy, Trained
from gdmd_lightning.streams import BatchStream, stream

Logs = dict[str, Tensor]
"""Scalars by name, detached, on the device; logged as ``train/<name>``."""


@dataclass(frozen=True)
class Update:
    """What an update reports.

    Args:
        logs: Scalars on the device; ``loss``, if there is one, is shown on the progress bar.
        record: Data for callbacks; Lightning passes it to them as ``outputs["record"]``. ``None`` for none.
    """

    logs: Logs = field(default_factory=dict)
    record: Any = None


@ranged
class RoleModule(Constructed, pl.LightningModule):
    """A pipeline's network in the roles that a method declares, under manual optimization.

    One ``training_step`` is one :meth:`update`; ``trainer.max_steps`` counts updates, however many optimizer
    steps each of them takes.

    Args:
        family: The teacher's pipeline.
        height, width: Resolution in pixels.
        generator: The generator's optimizer.
        lora: Train adapters on one network instead of copies of it.
        memory: Memory-saving options.
        speed: Options for faster updates.
        micro_batch_size: Maximum number of samples in memory at once; does not change the update. Null for no
            limit.
        accumulate: Batches of the data module per update, at least 1. An update is that of one batch with all their
            samples, in micro-batches of at most one batch; everything that counts updates counts these.
        embedding_cache: Embed all prompts to disk before training; null to embed each batch during training.
        ema_decay: Decay of the averaged weights, which are evaluated and exported.
        seed: Seed of all random streams; null for ``seed_everything`` of the configuration, or 0 without one.
        start_from: Checkpoint of this project from which the roles are loaded at the start.
        non_finite: What happens if a loss or gradient is not finite.

    Attributes:
        roles: The roles; available after :meth:`configure_model`.
        teacher_digest: Fingerprint of the teacher's weights; empty before :meth:`configure_model`.
        updates: Updates done so far; part of the checkpoint.
        evaluations: Network evaluations of single latents in these updates on this rank; part of the checkpoint.
    """

    roles: Roles

    def __init__(
        self,
        family: ModelFamily,
        height: Count = 1024,
        width: Count = 1024,
        generator: Optimization = Optimization(),
        lora: LoRA | None = None,
        memory: Memory = Memory(),
        speed: Speed = Speed(),
        micro_batch_size: Count | None = None,
        accumulate: Count = 1,
        embedding_cache: EmbeddingCache | None = None,
        ema_decay: Decay = 0.99,
        seed: Seed | None = None,
        start_from: str | None = None,
        non_finite: NonFinite = NonFinite(),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.family, self.height, self.width = family, height, width
        self.generator, self.lora, self.memory, self.speed = generator, lora, memory, speed
        self.micro_batch_size, self.accumulate = micro_batch_size, accumulate
        self.embedding_cache = embedding_cache
        self.ema_decay, self.seed, self.start_from = ema_decay, seed or 0, start_from
        self.guard = StepGuard(non_finite, self.all_ranks)
        self.updates = self.evaluations = 0
        self.provenance = Provenance()
        self.teacher_digest = ""
        self._random_states: Any = None
        self._only: str | None = None
        self._placement: Placement | None = None

    # What a method defines.

    @abstractmethod
    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles that the method needs besides the teacher."""

    @abstractmethod
    def update(self, batch: Batch, learn: Learn) -> Update:
        """One update: forwards, losses and ``with learn(role) as backward`` steps, in the method's own order."""

    def check_batch(self, batch_size: int, group_size: int) -> None:
        """Fail, before anything is loaded, if the method cannot learn from such batches.

        Args:
            batch_size: Samples per update on all ranks together.
            group_size: Samples per prompt.

        Raises:
            UserError: If it cannot.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Fail, before anything is loaded, if these prompts lack what the method needs.

        Raises:
            UserError: If one does.
        """

    def no_overlap(self) -> str | None:
        """Why ``speed.overlap_reward`` does not work with these settings; ``None`` if it does."""
        return f"{type(self).__name__} does not offer it"

    # Roles.

    def configure_model(self) -> None:
        """Load the family and build the roles, once; prepare their networks for training if a trainer fits them."""
        if not hasattr(self, "roles"):
            self._load()
        if self._fitting and self.speed.channels_last:
            self.roles.to(memory_format=torch.channels_last)
            self.family.channels_last()
        if self._fitting and self.speed.compile != "none":
            self.roles.compile_blocks(frozen=self.speed.compile == "frozen")

    def _load(self) -> None:
        """Load the family and build the roles."""
        self.family.check_resolution(self.height, self.width)
        if self.fully_sharded is not None:
            self._placement = FSDPPlacement(self.fully_sharded)
        elif self.multi_engine is not None and self.lora is None:
            self._placement = DeepSpeedPlacement(self.multi_engine)
        if self._placement is not None:
            self.family.build_network = self._placement.build_teacher
        network = self.family.load()
        placement = self._placement
        self.teacher_digest = weights_fingerprint(network) if placement is None else placement.fingerprint(network)
        self.build_roles(network)
        self.embeddings = PromptEmbeddings(self.family)
        if self.start_from is not None:
            take_over(self, self.start_from)
            self.provenance = replace(self.provenance, started_from=content_digest(self.start_from))

    @property
    def _fitting(self) -> bool:
        """Whether a trainer is training the module, which otherwise samples or exports."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    @property
    def multi_engine(self) -> MultiEngineDeepSpeedStrategy | None:
        """The trainer's strategy, if it has an engine for each role."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, MultiEngineDeepSpeedStrategy) else None

    @property
    def fully_sharded(self) -> FSDP2Strategy | None:
        """The trainer's strategy, if it is FSDP2."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, FSDP2Strategy) else None

    def trained_networks(self) -> dict[str, Trained]:
        """The trained roles, for a strategy that has an engine for each."""
        return trained_networks(self.roles)

    def build_roles(self, network: nn.Module) -> None:
        """Build the roles from the family's loaded network, as copies or as adapters."""
        self.family.save_memory(slicing=self.memory.vae_slicing, tiling=self.memory.vae_tiling)
        self.latent_shape = self.family.latent_shape(self.height, self.width)
        specs = self.role_specs()
        if self._only is not None:
            specs = tuple(spec.alone(self.generator) for spec in specs if spec.name == self._only)
        placed, size = self._placement, self.micro_batch_size
        if self.lora is not None:
            kind = AdapterRoles if placed is None else ShardedAdapterRoles
            self.roles = kind(self.family, network, specs, size, lora=self.lora, seed=self.seed)
        elif placed is not None:
            self.roles = ShardedRoles(self.family, network, specs, size, placed.copy_for)
        else:
            self.roles = CopiedRoles(self.family, network, specs, size)
        if isinstance(self.roles, ShardedRoles | ShardedAdapterRoles):
            self.roles.latent_shape = self.latent_shape
        if placed is not None:
            placed.place(self.roles)
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

    def stream(self, purpose: str, turn: int = 0) -> BatchStream:
        """Random stream of a purpose in this update.

        It depends only on seed, update, purpose, ``turn`` and the row of the batch of all ranks, so checkpoints need
        not store it, numbers drawn elsewhere (logging, evaluation) do not change a run, and neither does the number
        of ranks.
        """

        def of(*place: object) -> torch.Generator:
            return stream(self.seed, *place, self.updates, purpose, turn)

        return BatchStream(of, self.global_rank, self.world_size)

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 without a trainer."""
        return 1 if self._trainer is None else self._trainer.world_size

    def weights_digest(self, role: str) -> str:
        """Digest of the teacher's weights and of a role's own; all ranks must call it."""
        if self._placement is not None and isinstance(self.roles, ShardedRoles):
            weights = self._placement.fingerprint(self.roles.standalone(role))
        else:
            state = self.roles.state_dict()
            names = [*self.roles.start_names(), *self.roles.names_of(role)]
            weights = fingerprint((name, state[name]) for name in names)
        return f"{self.teacher_digest} {weights}"

    # Training.

    def configure_callbacks(self) -> list[pl.Callback]:
        """No further callbacks. Fail if one of the trainer could have no effect, before it loads anything itself."""
        if self._fitting:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            check_fitting(self.trainer, endless=isinstance(data, PromptDataModule))
        return []

    def setup(self, stage: str) -> None:
        """Fail early if the trainer's settings do not fit, or the method cannot learn from the data."""
        if stage == "fit":
            check_precision(self.trainer.precision)
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            ask_for_whole_updates(self, data)
            for role in self.role_specs():
                if role.optimizer is not None:
                    role.optimizer.check(role.name, self.trainer.max_steps)
            if self.multi_engine is not None:
                check_stages(self.multi_engine, self.role_specs(), adapters=self.lora is not None)
            check_sharding(self.trainer.strategy, self.role_specs())
            sharded = self.multi_engine is not None or self.fully_sharded is not None
            self.speed.check(self.family, self.no_overlap(), adapters=self.lora is not None, sharded=sharded)
            check_source(self, data)

    # Lightning does not count a wrapper as an override. It would warn of one whenever there is a data module.
    @wraps(pl.LightningModule.transfer_batch_to_device)
    def transfer_batch_to_device(  # type: ignore[override]
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if not self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        check_fed(self, batch)
        return batch

    def limit_micro_batches(self, size: int) -> None:
        """Hold at most ``size`` samples in memory at once, or fewer if ``micro_batch_size`` is smaller."""
        self.micro_batch_size = min(size, self.micro_batch_size or size)
        if hasattr(self, "roles"):
            self.roles.micro_batch_size = self.micro_batch_size

    def on_fit_start(self) -> None:
        """Move text encoders and VAE to the device; embed all prompts if configured.

        Raises:
            UserError: If adapters are to start merged and neither ``start_from`` nor a resumed run has any.
        """
        if merges(self) and not self.roles.start_names():
            raise UserError(
                "it is merged, but no checkpoint is given",
                where="model.lora.start",
                remedy="set model.start_from to a checkpoint of a run with model.lora, or use continued",
            )
        self.family.to(self.device)
        if self.embedding_cache is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if not hasattr(data, "texts"):
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
        """One optimizer per trained role, in the order of the specs, each with its schedule."""
        out = []
        for role in self.roles.trained:
            settings = self.roles.optimization_of(role)
            optimizer = settings.optimizer(self.roles.parameters_of(role))
            end = -1 if settings.schedule == "constant" else self.trainer.max_steps
            schedule = settings.scheduler(optimizer, end)
            out.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}})
        return out

    def training_step(self, batch: PromptBatch, batch_index: int) -> dict[str, Any]:
        """One update of the method; its record, or None, and its logs for callbacks, as ``outputs``."""
        self.guard.settle()
        texts = [prompt.text for prompt in batch.prompts]
        before = self.roles.evaluations.total()
        watch = Stopwatch()
        with listening(watch), watch("rest"):
            conditioning = self.embeddings(texts)
            optimizers = dict(zip(self.roles.trained, _listed(self.optimizers()), strict=True))
            engine = self._engine_kind()(self, self.roles, optimizers, self.guard, self.updates + 1, tuple(texts))
            done = self.update(Batch(batch.prompts, batch.groups, conditioning, self.real_x0(batch.prompts)), engine)
            engine.finish()
        self.updates += 1
        self.evaluations += self.roles.evaluations.total() - before
        logs = mean_over_ranks(done.logs | engine.logs() | self.reward_logs(), self.device)
        for role, schedule in zip(self.roles.trained, _listed(self.lr_schedulers()), strict=True):
            logs[f"learning_rate/{role}"] = torch.tensor(optimizers[role].param_groups[0]["lr"])
            schedule.step()
        # Lightning's loggers use a metric of this name as their axis; it would count from 0. On the CPU, since a copy
        # to the device would wait for it.
        self.log("step", torch.tensor(float(self.updates)), batch_size=len(batch))
        if "loss" in logs:
            self.log("loss", logs.pop("loss"), prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        seconds = {f"train/seconds/{name.replace(' ', '_')}": torch.tensor(s) for name, s in watch.seconds.items()}
        self.log_dict(seconds | {"train/seconds": sum(seconds.values())}, batch_size=len(batch))
        return {"record": done.record, "logs": logs}

    def on_validation_start(self) -> None:
        """Move text encoders and VAE to the device, for ``trainer.validate``."""
        self.family.to(self.device)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Nothing: ``trainer.validate`` is for callbacks such as ``GenerationEvaluation``, with their own prompts."""

    def _engine_kind(self) -> type[LightningEngine]:
        if self.multi_engine is not None:
            return DeepSpeedEngine
        return LightningEngine if self.fully_sharded is None else FSDPEngine

    def reward_logs(self) -> dict[str, Tensor]:
        """What the rewards of the last update say about themselves."""
        return {}

    def on_train_end(self) -> None:
        """Fail if the last update was not finite."""
        self.guard.settle()

    def all_ranks(self, decision: bool) -> bool:
        """Whether the decision is true on all ranks."""
        return self.trainer.strategy.reduce_boolean_decision(decision, all=True)

    # Checkpoints hold what was trained; the frozen teacher stays in its pipeline.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All roles except the teacher."""
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not self._is_frozen(name)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the provenance, so that the checkpoint can be restored without its configuration file.

        Raises:
            UserError: If a weight or moment is not finite; nothing is written then.
        """
        self.guard.settle()
        when = f"after update {self.updates}"
        remedy = "earlier checkpoints are unchanged; lower the learning rates and resume from one of them"
        check_whole(self, checkpoint, when, remedy)
        here: dict[str, Any] = {"teacher": self.teacher_digest, "settings": fixed_settings(self)}
        here |= {"updates": self.updates, "evaluations": self.evaluations}
        with suppress(ValueError):  # on_fit_start has said it
            here["configuration"] = self.configuration()
        checkpoint["provenance"] = asdict(replace(self.provenance, **here))
        checkpoint["random_states"] = global_states(self.device)

    def configuration(self) -> str:
        """What commands restore this module with, as YAML: the configuration of ``fit``, or its own arguments.

        Raises:
            ValueError: If an argument is an object that no configuration can have.
        """
        if self.provenance.configuration:
            return self.provenance.configuration
        model = configuration_of(self)
        model["init_args"] = {"height": self.height, "width": self.width, **model["init_args"]}
        return yaml.safe_dump({"model": model}, sort_keys=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors that a checkpoint of this module has, by name."""
        whole = {f"roles.{name}": shape for name, shape in self.roles.shapes().items()}
        return {name: whole.get(name, tuple(value.shape)) for name, value in self.state_dict().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fail before any weight changes if the checkpoint does not fit; add the teacher to it.

        The current settings replace those in the checkpoint, see ``resuming.py``.
        """
        check_fits(self, checkpoint)
        check_finite(learned(checkpoint), "in the checkpoint")
        origin, mine = read_provenance(checkpoint), self.provenance
        check_resumable(self, origin, mine.started_from)
        self.updates, self.evaluations = origin.updates, origin.evaluations
        self.provenance = replace(mine, scores=origin.scores, started_from=origin.started_from)
        if self._fitting:
            use_current_optimization(self, checkpoint)
            self._random_states = checkpoint.get("random_states")
            if origin.configuration and mine.configuration:
                report_changes(origin.configuration, mine.configuration)
        teacher = {name: value for name, value in super().state_dict().items() if self._is_frozen(name)}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **teacher}

    def on_train_start(self) -> None:
        """Continue the global random generators of a resumed run, after everything else that may draw from them."""
        if self._random_states is None:
            return
        check_shards(self, "in the checkpoint", "use an earlier checkpoint")
        try:
            restore_global_states(self._random_states, self.device, self.global_rank)
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
            raise UserError(f"its random states are malformed: {error}", where="checkpoint") from error
        self._random_states = None

    def _is_frozen(self, name: str) -> bool:
        return name.startswith("roles.") and self.roles.is_frozen(name.removeprefix("roles."))


def _listed(found: Any) -> list[Any]:
    """Lightning returns one optimizer or schedule as itself and several as a list."""
    return found if isinstance(found, list) else [found]
