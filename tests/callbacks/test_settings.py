"""A run's settings in config.yaml and in its loggers."""

import yaml
from lightning.pytorch.loggers import CSVLogger

from gdmd_lightning.callbacks.settings import flat
from gdmd_lightning.cli import main


def listed(directory):
    """The settings and the names of figures that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(directory)).Reload()

    def read(part):
        metadata = events.SummaryMetadata(f"_hparams_/{part}")
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    values = read("session_start_info").session_start_info.hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}, {
        info.name.tag for info in read("experiment").experiment.metric_infos
    }


def test_tensorboard_lists_the_settings_by_the_keys_of_the_command_line(recorded_run):
    settings, figures = listed(recorded_run)
    config = yaml.safe_load((recorded_run / "config.yaml").read_text())
    assert settings["model.init_args.matching.fake_score_updates"] == 2
    assert settings["trainer.callbacks.1.class_path"].endswith("GradientRewardRecord")
    assert not [key for key in settings if key.startswith(("trainer.logger", "ckpt_path"))]
    assert settings.items() >= {f"data.{k}": v for k, v in config["data"].items() if isinstance(v, int | str)}.items()
    assert figures == {"loss", "eval/geneval/overall"}


def test_listing_settings_logs_no_figure(recorded_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recorded_run)).Reload()
    assert min(event.step for event in events.Scalars("loss")) == 1
    assert "hp_metric" not in events.Tags()["scalars"]


def test_every_other_logger_gets_the_settings_and_no_secret(fast_fit, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(CSVLogger, "log_hyperparams", lambda self, settings: given.append(settings))
    monkeypatch.setenv("WORD_FROM_OUTSIDE", "a-secret-word")
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: run, version: ., prefix: "
    logger += "'${oc.env:WORD_FROM_OUTSIDE}'}}"
    main(["fit", *fast_fit, f"--trainer.logger={logger}", "--trainer.max_steps=1"])
    (settings,) = given
    assert settings["trainer"]["logger"]["init_args"]["prefix"] == "${oc.env:WORD_FROM_OUTSIDE}"
    assert "a-secret-word" not in str(settings)


def test_flat_settings_number_the_items_of_lists():
    nested = {"a": {"b": [1, {"c": None}], "d": []}, "e": True, "f": 0.5}
    assert dict(flat(nested)) == {"a.b.0": 1, "a.b.1.c": "None", "e": True, "f": 0.5}
