"""Train the embedded Shapes pipeline into one directory: autoencoder, scorer, then teacher."""

from __future__ import annotations

from dataclasses import fields

from jsonargparse import ArgumentParser

from gdmd_lightning.configuration.configs import with_found_configs
from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.ranges import ranges_of
from gdmd_lightning.shapes.settings import PretrainSettings


def main(arguments: list[str]) -> int:
    """``pretrain [--config shapes_teacher.yaml] [--out DIR] ...``."""
    parser = ArgumentParser(
        prog="gdmd_lightning pretrain", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="settings; a bare name means a shipped file")
    parser.add_class_arguments(PretrainSettings, as_group=False)
    options = parsed(parser, with_found_configs(arguments))
    check_options(options, **ranges_of(PretrainSettings))
    values = parser.instantiate_classes(options)
    settings = PretrainSettings(**{field.name: values[field.name] for field in fields(PretrainSettings)})
    from gdmd_lightning.studies.shapes_teacher import pretrain

    print(f"the pipeline is in {pretrain(settings)}")
    return 0
