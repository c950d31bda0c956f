"""Broken rewards, one for each kind of mistake; configurations name them ``bad_rewards.<class>``."""

import torch

from gdmd_lightning.rewards.base import Reward


class NotANumber(Reward):
    name = "not_a_number"

    def score(self, images, prompts):
        return torch.tensor([float("nan")] + [0.0] * (len(images) - 1))


class WrongShape(Reward):
    name = "wrong_shape"

    def score(self, images, prompts):
        return torch.zeros(len(images), 1)


class NoTensor(Reward):
    name = "no_tensor"

    def score(self, images, prompts):
        return [0.0] * len(images)


class Raising(Reward):
    name = "raising"

    def score(self, images, prompts):
        raise KeyError("no such\nweights")


class Unfinished(Reward):
    name = "unfinished"
