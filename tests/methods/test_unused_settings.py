"""Settings that others leave without effect are refused."""

import pytest

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.reward_terms import Policy

UNUSED = [
    (Policy, {"form": "weighted"}, {"at": "state", "normalize": "distillation", "beta": 0.5, "old_decay": 0.8}),
    (TargetGroup, {"over": "renoise"}, {"snapshots": 1, "snapshot_every": 10}),
    (TargetAdvantages, {"compare": "sample"}, {"spread": "group"}),
]
GROUPS = {Policy: "policy", TargetGroup: "targets", TargetAdvantages: "advantages"}
CASES = [(kind, because, name, value) for kind, because, unused in UNUSED for name, value in unused.items()]


@pytest.mark.parametrize(("kind", "because", "name", "value"), CASES, ids=[name for _, _, name, _ in CASES])
def test_a_setting_without_effect_is_refused(kind, because, name, value):
    kind(**because)
    kind(**because, **{name: getattr(kind(), name)})
    with pytest.raises(UserError) as error:
        kind(**because, **{name: value})
    ((other, there),) = because.items()
    said = f"{other} {there}"
    assert str(error.value).startswith(f"model.{GROUPS[kind]}.{name}: it is {value!r}, but has no effect with {said};")


@pytest.mark.parametrize(
    ("kind", "used"),
    [
        (Policy, {"at": "state", "normalize": "distillation", "beta": 0.5, "old_decay": 0.8}),
        (TargetGroup, {"over": "both", "snapshots": 1, "snapshot_every": 10}),
        (TargetAdvantages, {"compare": "state", "spread": "group"}),
    ],
)
def test_the_same_settings_are_taken_where_they_have_an_effect(kind, used):
    assert {name: getattr(kind(**used), name) for name in used} == used
