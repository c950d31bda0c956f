"""DMD2: distribution matching with a GAN on real images, whose discriminator is a head on the fake score's features.

Source: DMD2 (2405.14867), section 4.3; backward simulation and the two time scales are those of ``methods/dmd.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.data.images import ImageSource
from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, in_micro_batches
from gdmd_lightning.methods.base import State, Update, weighted_sum
from gdmd_lightning.methods.gan_terms import GAN, GANDraw
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.objectives.gan import gan_discriminator_loss, gan_generator_loss
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import ranged
from gdmd_lightning.ranks import std
from gdmd_lightning.roles import Head, Optimization, RoleSpec


@ranged
class DMD2(MatchingModule):
    """Distribution matching distillation with a GAN.

    Args:
        family: The teacher's pipeline.
        images: Real images of the training prompts.
        gan: The adversarial part.
        discriminator: The discriminator's optimizer; it steps with the fake score.
        matching_module: Arguments of :class:`MatchingModule`.
    """

    def __init__(
        self,
        family: ModelFamily,
        images: ImageSource,
        gan: GAN = GAN(),
        discriminator: Optimization = Optimization(),
        **matching_module: Any,
    ) -> None:
        super().__init__(family, **matching_module)
        self.images, self.gan, self.discriminator = images, gan, discriminator

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles of distribution matching, and the discriminator."""
        head = Head(self.gan.hidden, self.seed)
        return (*super().role_specs(), RoleSpec("discriminator", optimizer=self.discriminator, head=head))

    def setup(self, stage: str) -> None:
        """Fail early if prompts have no images."""
        super().setup(stage)
        data: Any = self.trainer.datamodule if stage == "fit" else None  # type: ignore[attr-defined]
        if data is not None:
            self.images.check(data)

    def real_x0(self, prompts: Sequence[Prompt]) -> Tensor:
        """Latents of real images of these prompts, ``[B, C, H, W]``."""
        if self.device.type == "meta":  # a plan has no pixels
            images = torch.empty(len(prompts), 3, self.height, self.width, device=self.device)
        else:
            rngs = self.stream("images").each_row(len(prompts))
            images = self.images.draw(prompts, self.height, self.width, rngs).to(self.device)
        encode = self.family.encode_images
        return in_micro_batches(lambda rows: encode(images[rows]), len(images), self.micro_batch_size)

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on matching and GAN, then the steps of fake score and discriminator."""
        state = self.rollout_state(batch)
        draw = self.draw_renoise(state)
        against = GANDraw.of(self.gan, len(batch), self.latent_shape, self.stream("gan"), self.device)
        samples: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            for rows, share in self.micro_batches(len(batch)):
                latents = state.latents.select(rows)
                x = self.student_x0(latents)
                match = self.match(x, latents.conditioning, draw.select(rows))
                noisy = against.renoised(x, against.eps_fake, rows, latents.conditioning)
                features = self.roles.features("fake_score", noisy, through=True)
                adversarial = gan_generator_loss(self.roles.logits("discriminator", features, through=True))
                loss = dm_loss(x, match.target, match.n) + self.gan.generator_weight * adversarial
                backward(share * loss)
                samples.append(x.detach())
                weighted_sum(logs, share, loss=loss, gan_loss=adversarial, normalizer=match.n.mean())
        x0 = torch.cat(samples)
        logs["sample_std"] = std(x0)
        return Update(logs | self.train_fake_score(batch, state, x0, learn))

    def fake_score_step(self, batch: Batch, state: State, x0: Tensor, turn: int, learn: Learn) -> dict[str, Tensor]:
        """Flow matching and the discriminator's loss; the discriminator steps on the features that this step saw."""
        latents, eps = self.renoised_for_fake_score(batch, state, x0, turn)
        real, weight = batch.real_x0, self.gan.fake_score_weight
        assert real is not None, "DMD2 needs real images in its batch"
        pair = GANDraw.of(self.gan, len(batch), self.latent_shape, self.stream("gan critic", turn), self.device)
        seen: list[tuple[Tensor, ...]] = []
        logs: dict[str, Tensor] = {}
        with learn("fake_score") as backward:
            for rows, share in self.micro_batches(len(batch)):
                loss = self.fake_score_loss(latents.select(rows), x0[rows], eps[rows])
                conditioning = batch.conditioning.select(rows)
                features = [
                    self.roles.features("fake_score", pair.renoised(x[rows], eps_of, rows, conditioning))
                    for x, eps_of in ((real, pair.eps_real), (x0, pair.eps_fake))
                ]
                logits = [self.roles.logits("discriminator", each, through=True) for each in features]
                adversarial = gan_discriminator_loss(*logits)
                backward(share * (loss + weight * adversarial))
                seen.append(tuple(each.detach() for each in features))
                weighted_sum(logs, share, fake_score_loss=loss, discriminator_loss=adversarial)
        with learn("discriminator") as backward:
            for (_, share), features_of in zip(self.micro_batches(len(batch)), seen, strict=True):
                logits = [self.roles.logits("discriminator", each) for each in features_of]
                backward(share * weight * gan_discriminator_loss(*logits))
        return logs
