"""The modules and data that the distributed tests train, in the test's process and in others."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny

from gdmd_lightning.engines.non_finite import NonFinite
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Memory, Speed
from gdmd_lightning.roles import LoRA, Optimization


class NaNOnOneRank(DMD):
    """Its generator's loss is NaN in the second update on the second rank."""

    def update(self, batch, learn):
        @contextmanager
        def sometimes(role):
            with learn(role) as backward:
                wrong = (role, self.updates, self.global_rank) == ("generator", 1, 1)
                yield lambda loss: backward(loss * float("nan") if wrong else loss)

        return super().update(batch, sometimes)


METHODS = {"DMD": DMD, "GDMD": GDMD}
DATA = {"batch_size": 8, "group_size": 4, "shuffle_buffer": 100}


def build_any(pipeline: str | Path, method: str, family: str, lora: bool = False) -> DistillationModule:
    """Any method on the tiny pipeline of any family, as the tests of families build it."""
    place = str(Path(__file__).parents[1] / "families")
    if place not in sys.path:
        sys.path.append(place)
    from test_method_runs import build as build_run

    return build_run(method, family, pipeline, lora=lora)


def build(pipeline: str | Path, method: str, **options: Any) -> DistillationModule:
    """A tiny module; GDMD has a snapshot and an old policy too."""
    if "family" in options:
        return build_any(pipeline, method, **options)
    if method == "GDMD":
        options["targets"] = TargetGroup(size=2, over="both", snapshots=1, snapshot_every=2)
    # Large steps, clipped: what is wrong in a step shows far above the tolerance of the comparison.
    steps = {"learning_rate": 1e-3, "warmup": 1}
    options.setdefault("generator", {**steps, "gradient_clip": 0.02})
    options.setdefault("fake_score", {**steps, "gradient_clip": 0.2})
    kinds = {"generator": Optimization, "fake_score": Optimization, "lora": LoRA, "non_finite": NonFinite}
    kinds |= {"memory": Memory, "speed": Speed}
    options |= {name: kinds[name](**value) for name, value in options.items() if name in kinds}
    return tiny.module(Path(pipeline), METHODS.get(method, NaNOnOneRank), **options)
