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
        kl_reference: That network: the ``teacher``, or the generator at the ``start`` of the run. They are the same
            unless ``start_from`` is given.
        kl_guidance_scale: Guidance scale of the teacher as the reference. 1 is no guidance, as in the papers, whose
            runs start there; a distilled generator has learned the guided teacher.
        inner_epochs: Generator steps per update, all on the same judged samples, at least 1.
        distillation: Arguments of :class:`DistillationModule`.

    Raises:
        UserError: If a value is out of range, a reference or its guidance is given without a weight, or the start
            is to be guided.
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
        kl_guidance_scale: NonNegative = 1.0,
        inner_epochs: Count = 1,
        **distillation: Any,
    ) -> None:
        super().__init__(family, steps=steps, **distillation)
        self.sample_advantages = sample_advantages
        self.kl_weight, self.kl_guidance_scale, self.inner_epochs = kl_weight, kl_guidance_scale, inner_epochs
        self.reference = REFERENCE if kl_reference == "start" else "teacher"
        self._check_reference()
        self.judge = self.judge_with(reward)

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """A trained generator, its average, and its state at the start of the run where that is the reference."""
        reference = (RoleSpec(REFERENCE, snapshot_of="generator"),) if self.reference == REFERENCE else ()
        return (*super().role_specs(), *reference)

    def _check_reference(self) -> None:
        start, guided = self.reference == REFERENCE, self.kl_guidance_scale != 1.0
        where = f"{type(self).__name__}."
        if start and self.kl_weight == 0:
            raise UserError("it is start, but kl_weight is 0", where=f"{where}kl_reference", remedy="give a weight")
        if guided and (start or self.kl_weight == 0):
            why = "kl_reference is start" if start else "kl_weight is 0"
            raise UserError(
                f"it is {self.kl_guidance_scale}, but {why}",
                where=f"{where}kl_guidance_scale",
                remedy="a distilled start needs no guidance; use 1" if start else "give a weight",
            )
