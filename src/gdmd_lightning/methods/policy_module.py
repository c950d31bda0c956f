"""What methods share that learn from judged samples of whole rollouts and not from distillation."""

from __future__ import annotations

from typing import Any, Literal

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.ranges import Count, NonNegative, Steps, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import REFERENCE, RoleSpec


@ranged
class PolicyModule(DistillationModule):
    """All samples of an update are rolled out and judged once, and compared within their prompts.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        steps: Steps of a rollout, and of generation.
        sample_advantages: How rewards become advantages.
        kl_weight: Weight of the distance from a frozen network, at least 0; 0 for none, which saves its evaluations.
        kl_reference: That network: the ``teacher``, without guidance, or the generator at the ``start`` of the run.
            They are the same unless ``start_from`` is given; a distilled generator has learned the guided teacher.
        inner_epochs: Generator steps per update, all on the same judged samples, at least 1.
        distillation: Arguments of :class:`DistillationModule`.

    Raises:
        UserError: If a value is out of range, or a reference is given without a weight.
    """

    judge: Judge
    needs_groups = True

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        steps: Steps = 10,
        sample_advantages: SampleAdvantages = SampleAdvantages(),
        kl_weight: NonNegative = 0.0,
        kl_reference: Literal["teacher", "start"] = "teacher",
        inner_epochs: Count = 1,
        **distillation: Any,
    ) -> None:
        super().__init__(family, steps=steps, **distillation)
        self.sample_advantages = sample_advantages
        self.kl_weight, self.inner_epochs = kl_weight, inner_epochs
        self.reference = REFERENCE if kl_reference == "start" else "teacher"
        if self.reference == REFERENCE and kl_weight == 0:
            raise UserError(
                "it is start, but kl_weight is 0", where=f"{type(self).__name__}.kl_reference", remedy="give a weight"
            )
        self.judge = self.judge_with(reward)

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """A trained generator, its average, and its state at the start of the run where that is the reference."""
        reference = (RoleSpec(REFERENCE, snapshot_of="generator"),) if self.reference == REFERENCE else ()
        return (*super().role_specs(), *reference)
