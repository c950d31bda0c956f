"""Compare methods over seeds at one budget of network evaluations, from the same starts."""

from __future__ import annotations

from dataclasses import fields

from jsonargparse import ArgumentParser

from gdmd_lightning.configuration.configs import with_found_configs
from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.ranges import ranges_of


def main(arguments: list[str]) -> int:
    """``compare --config NAME``; continues a stopped comparison, or one with a smaller budget."""
    found = with_found_configs(arguments)  # fails before the import, which takes seconds
    from gdmd_lightning.studies.comparison import Comparison

    parser = ArgumentParser(prog="gdmd_lightning compare", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a configuration, by path or name")
    parser.add_class_arguments(Comparison, as_group=False)
    options = parsed(parser, found)
    check_options(options, **ranges_of(Comparison))
    values = parser.instantiate_classes(options)
    comparison = Comparison(**{field.name: values[field.name] for field in fields(Comparison)})
    comparison.check()
    for line in comparison.train_and_score():
        print(line, flush=True)
    print(comparison.report())
    print(f"\npage: {comparison.out / 'index.html'}")
    return 0
