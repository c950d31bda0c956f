"""Rewards that stop their run; configurations name them ``stopping.StopIn`` and ``stopping.StopAt``."""

import os
import signal
import sys

import torch

from gdmd_lightning.rewards.base import Reward


class StopIn(Reward):
    """Sends a signal to its own process, or exits, when it is called for the ``call``-th time."""

    differentiable = True

    def __init__(self, call: int = 2, number: int = 0, rank: int = 0, name: str = "stopping") -> None:
        super().__init__()
        self.name = name
        self.call, self.number, self.rank, self.calls = call, number, rank, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == self.call and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            if self.number:
                os.kill(os.getpid(), signal.Signals(self.number))
            else:
                sys.exit(0)
        return images.mean(dim=(1, 2, 3)) + torch.zeros(len(images))


at: dict[int, int] = {}
"""For :class:`StopAt`: at which of its calls it sends which signal, or exits for 0. No setting of the reward."""
calls: list[int] = []
"""Number of pictures in each call of :class:`StopAt`."""


class StopAt(Reward):
    """Sends signals to its own process, or exits, at the calls in :data:`at`."""

    name = "stopping"
    differentiable = True

    def score(self, images, prompts):
        calls.append(len(images))
        number = at.get(len(calls))
        if number:
            os.kill(os.getpid(), signal.Signals(number))
        elif number == 0:
            sys.exit(1)
        return images.mean(dim=(1, 2, 3))
