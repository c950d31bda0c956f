"""What a run says beside its own lines."""

import warnings

from gdmd_lightning.configuration import training


def test_a_run_that_validates_warns_of_nothing(fast_fit):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cli = training.run([*fast_fit, "--trainer.max_steps=2", "--trainer.limit_val_batches=1.0"])
        cli.trainer.validate(cli.model, cli.datamodule)
    said = [str(each.message) for each in found if issubclass(each.category, UserWarning)]
    assert said == []
