"""A reward that stops its run; configurations name it ``stopping.StopIn``."""

import os
import signal
import sys

import torch

from gdmd_lightning.rewards.base import Reward


class StopIn(Reward):
    """Sends a signal to its own process, or exits, when it is called for the ``call``-th time."""

    name = "stopping"
    differentiable = True

    def __init__(self, call: int = 2, number: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.call, self.number, self.rank, self.calls = call, number, rank, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == self.call and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            if self.number:
                os.kill(os.getpid(), signal.Signals(self.number))
            else:
                sys.exit(0)
        return images.mean(dim=(1, 2, 3)) + torch.zeros(len(images))
