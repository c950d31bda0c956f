"""Roles stepped by DeepSpeed, one engine per role, and built in shards where their ZeRO stage says so."""

from __future__ import annotations

from torch import Tensor, nn

from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.engines.non_finite import Attempt
from gdmd_lightning.engines.placement import Placement
from gdmd_lightning.errors import UserError
from gdmd_lightning.roles import AdapterRoles, Roles, RoleSpec
from gdmd_lightning.strategies import MultiEngineDeepSpeedStrategy, Trained
from gdmd_lightning.strategies.engine_config import unknown_role


class DeepSpeedEngine(LightningEngine):
    """The steps of one update under :class:`MultiEngineDeepSpeedStrategy`.

    DeepSpeed averages, clips and steps at once, and skips a gradient that is not finite.
    """

    def zero_grad(self, role: str) -> None:
        super().zero_grad(role)
        self._role = role

    def backward(self, loss: Tensor) -> None:
        self._loss = self._loss + loss.detach()
        self.module.manual_backward(loss, role=self._role)

    def step(self, role: str) -> bool:
        strategy = self.module.trainer.strategy
        assert isinstance(strategy, MultiEngineDeepSpeedStrategy)
        strategy.optimizer_step(self.optimizers[role].optimizer, lambda: None, self.module)
        norm, taken = strategy.gradient_norm(role), strategy.step_taken(role)
        self.norms.setdefault(role, []).append(norm)
        attempt = Attempt(role, self.update, self.prompts, self._loss, norm)
        if not self.guard.allows(attempt) and taken:
            raise attempt.error(0)  # only the loss was not finite, and it is too late to skip the step
        self.skipped += not taken
        return taken


class DeepSpeedPlacement(Placement):
    """Under :class:`MultiEngineDeepSpeedStrategy`: the teacher in shards, and every role whose ZeRO stage is 3."""

    strategy: MultiEngineDeepSpeedStrategy

    def teacher(self) -> nn.Module:
        return self.strategy.frozen(self.files.construct, list(self.files.weights), self.files.dtype)

    def copy_for(self, spec: RoleSpec) -> nn.Module:
        sharded = self.strategy.stage_of(spec.source or spec.name) == 3
        network = self.strategy.build(
            self.files.construct, list(self.files.weights), sharded=sharded, rounded=self.files.dtype
        )
        return network.eval()


def check_stages(strategy: MultiEngineDeepSpeedStrategy, specs: tuple[RoleSpec, ...], *, adapters: bool) -> None:
    """Fail before anything is loaded if a role cannot be stepped in its ZeRO stage.

    Raises:
        UserError: If an adapter has ZeRO-3, an engine trains in half precision, an optimizer keeps its moments in
            a form that cannot be split, or the strategy has settings of a role that is not trained.
    """
    trained = [spec for spec in specs if spec.optimizer is not None]
    for spec in trained:
        stage = strategy.stage_of(spec.name)
        if adapters and spec.head is None and stage == 3:
            raise UserError(
                f"ZeRO 3 cannot shard the adapter of {spec.name!r}: its network is shared with the other roles",
                where="trainer.strategy",
                remedy="use stage 1 or 2 for adapters, or leave out model.lora",
            )
        config = strategy.config_of(spec.name, stage)
        half = [kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")]
        if half:
            raise UserError(
                f"{half[0]} would round the weights of {spec.name!r}, which must stay float32",
                where="trainer.strategy",
                remedy="leave it out, and set trainer.precision to bf16-mixed",
            )
        if "gradient_clipping" in config:
            raise UserError(
                f"gradient_clipping has no effect on {spec.name!r}, which has its own",
                where="trainer.strategy",
                remedy=f"set model.{spec.name}.gradient_clip",
            )
        if spec.optimizer is not None and spec.optimizer.algorithm != "adamw":
            raise UserError(
                f"the moments of {spec.optimizer.algorithm} cannot be split over ranks",
                where=f"model.{spec.name}.algorithm",
                remedy="use adamw with ZeRO",
            )
    if found := unknown_role(strategy.stages, strategy.configs, [spec.name for spec in trained]):
        raise UserError(
            f"no role {found[1]!r} is trained",
            where=f"trainer.strategy.{found[0]}",
            remedy=f"use {', '.join(spec.name for spec in trained)}",
        )


def trained_networks(roles: Roles) -> dict[str, Trained]:
    """The networks that engines step, by role: whole copies, or the parameters of an adapter."""
    found = {}
    for role in roles.trained:
        shared = isinstance(roles, AdapterRoles) and role not in roles.heads
        network = nn.ParameterList(roles.parameters_of(role)) if shared else roles.get_submodule(role)
        found[role] = Trained(network, roles.optimization_of(role).gradient_clip)
    return found
