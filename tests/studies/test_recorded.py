"""Settings of a directory against those it is continued with."""

import pytest

from gdmd_lightning.errors import UserError
from gdmd_lightning.schedules import Uniform
from gdmd_lightning.studies import recorded
from gdmd_lightning.studies.recorded import check_recorded, record_settings

METHOD = {"model.class_path": "gdmd_lightning.methods.gdmd.GDMD"}
LEVELS = {"model.matching.renoise_distribution": "gdmd_lightning.schedules.UniformTimestep"}
LOW = {"model.matching.renoise_distribution.low": 0.02}


def check(directory, settings, sections=None):
    check_recorded(directory, settings, sections or {}, where="arm", out=directory)


def test_a_component_added_since_was_the_default_of_the_innermost_recorded_one(tmp_path, monkeypatch):
    """``UniformTimestep`` has a default of its own for what the method's own ``Uniform`` has another one."""
    record_settings(tmp_path, METHOD | LEVELS)
    arguments = recorded.arguments_of_class

    def with_another_default(class_path):
        found = arguments(class_path)
        if class_path in METHOD.values():
            found["matching.renoise_distribution"].default.init_args.low = 0.5
        return found

    monkeypatch.setattr(recorded, "arguments_of_class", with_another_default)
    check(tmp_path, METHOD | LEVELS | LOW)
    record_settings(tmp_path, METHOD)
    other = {"model.matching.renoise_distribution": "gdmd_lightning.schedules.Uniform"}
    with pytest.raises(UserError, match=r"low is 0.02 \(was 0.5\)"):
        check(tmp_path, METHOD | other | LOW)


def test_a_class_that_is_gone_is_named_and_not_imported(tmp_path):
    gone = {"model.class_path": "gdmd_lightning.methods.gone.Gone"}
    record_settings(tmp_path, gone)
    with pytest.raises(UserError, match=r"model.class_path is .*GDMD' \(was .*Gone'\)"):
        check(tmp_path, METHOD | {"model.steps": 4})


def test_settings_of_a_section(tmp_path):
    record_settings(tmp_path, {"low": 0.1})
    check(tmp_path, {"low": 0.1, "high": 0.98}, {"": Uniform})
    with pytest.raises(UserError, match=r"high is 0.9 \(was 0.98\)"):
        check(tmp_path, {"low": 0.1, "high": 0.9}, {"": Uniform})
