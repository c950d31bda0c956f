"""DiffusionNFT: an old policy's samples, renoised, pull the generator toward the good and away from the bad ones.

Source: DiffusionNFT (2509.16117), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import Update, weighted_sum
from gdmd_lightning.methods.nft_terms import NFT, nft_term, renoised_samples
from gdmd_lightning.methods.policy_module import PolicyModule
from gdmd_lightning.objectives.policy import optimality
from gdmd_lightning.ranges import NonNegative, ranged
from gdmd_lightning.ranks import std
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.roles import RoleSpec


@ranged
class DiffusionNFT(PolicyModule):
    """Reinforcement learning on the forward process; any sampler may take the rollouts.

    The levels of a rollout's steps are those at which the generator learns. Each inner epoch draws levels and noise of
    its own.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        nft: The velocity policies.
        kl_weight: Weight of the mean squared distance from the velocity of ``kl_reference``, at least 0; 0 for none,
            which saves its evaluations.
        policy_module: Arguments of :class:`PolicyModule`.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        nft: NFT = NFT(),
        kl_weight: NonNegative = 1e-4,
        **policy_module: Any,
    ) -> None:
        super().__init__(family, reward, kl_weight=kl_weight, **policy_module)
        nft.check_steps(self.steps)
        self.nft = nft

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """A trained generator, its average, and the old policy, whose decay depends on the update."""
        return (*super().role_specs(), RoleSpec("old", snapshot_of="generator"))

    def update(self, batch: Batch, learn: Learn) -> Update:
        """The old policy's samples are judged; the generator learns from them at its own levels."""
        self.judge.check(batch.prompts)
        x0 = self.rollout(batch, role="old").x0
        judged = self.sample_advantages(self.judge, x0, batch, self.history)
        o = optimality(judged.advantages, self.nft.advantage_clip)
        logs = {"sample_std": std(x0)} | judged.logs(self.nft.advantage_clip)
        for epoch in range(self.inner_epochs):
            index = self.nft.draw_steps(len(batch), self.steps, self.stream("train steps", epoch))
            with learn("generator") as backward:
                for turn, step in enumerate(index.unbind(1)):
                    stream = self.stream("renoise", epoch * index.shape[1] + turn)
                    renoised = renoised_samples(x0, self.sigmas[step], batch.conditioning, stream)
                    for rows, share in self.micro_batches(len(batch)):
                        latents, weight = renoised.select(rows), share / index.shape[1]
                        loss, v = nft_term(self.roles, self.nft, x0[rows], latents, o[rows])
                        if self.kl_weight > 0:
                            base = self.roles.velocity(self.reference, latents, guidance_scale=self.kl_guidance_scale)
                            kl = (v - base).square().mean()
                            loss = loss + self.kl_weight * kl
                            weighted_sum(logs, weight / self.inner_epochs, kl=kl)
                        backward(weight * loss)
                        weighted_sum(logs, weight / self.inner_epochs, loss=loss)
        self.roles.move_average("old", "generator", self.nft.old_decay(self.updates))
        return Update(logs)
