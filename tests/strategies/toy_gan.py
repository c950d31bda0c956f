"""A GAN-like toy that is not one of this package's methods: the module that ``docs/deepspeed.md`` shows."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus

from gdmd_lightning.strategies import frozen, learning


def network(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 8))


class ToyGAN(pl.LightningModule):
    def __init__(self, teacher: str, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints are without the teacher
        self.path, self.learning_rate = teacher, learning_rate

    def configure_model(self):
        if not hasattr(self, "generator"):
            self.generator, self.critic = network(), nn.Sequential(network(), nn.Linear(8, 1))
            self.teacher = frozen(self, network, self.path)

    def configure_optimizers(self):
        return [torch.optim.AdamW(each.parameters(), lr=self.learning_rate) for each in (self.generator, self.critic)]

    def training_step(self, z, number):
        for_generator, for_critic = self.optimizers()
        with torch.no_grad():
            real, fake = self.teacher(z), self.generator(z)
        with learning(self, "critic"):
            critic_loss = (softplus(self.critic(fake)) + softplus(-self.critic(real))).mean()
            self.manual_backward(critic_loss)
            for_critic.step()
            for_critic.zero_grad()
        generator_loss = torch.zeros((), device=self.device)
        with learning(self, "generator"):
            for part in z.chunk(2):  # several backward passes add up
                fake = self.generator(part)
                loss = (softplus(-self.critic(fake)).mean() + mse_loss(fake, self.teacher(part))) / 2
                self.manual_backward(loss)
                generator_loss += loss.detach()
            for_generator.step()
            for_generator.zero_grad()
        self.log_dict({"generator": generator_loss, "critic": critic_loss.detach()}, sync_dist=True)

    def state_dict(self, *args, **kwargs):
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not name.startswith("teacher.")}
