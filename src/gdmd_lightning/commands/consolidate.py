"""Write the plain checkpoint of one that several ranks wrote in shards: a single file, as one process writes it."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.errors import UserError


def main(arguments: list[str]) -> int:
    """``consolidate CHECKPOINT OUT``."""
    parser = ArgumentParser(
        prog="gdmd_lightning consolidate", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=str, help="a checkpoint directory written by fit with DeepSpeed")
    parser.add_argument("out", type=Path, help="file to write; must not exist")
    options = parsed(parser, arguments)

    from gdmd_lightning.methods.checkpointing import WholeCheckpoints, read_checkpoint
    from gdmd_lightning.strategies.shards import is_sharded

    if options.out.exists():
        raise UserError(f"{str(options.out)!r} exists", where="consolidate", remedy="give another file")
    if Path(options.checkpoint).is_file() and not is_sharded(options.checkpoint):
        raise UserError(f"{options.checkpoint!r} is a plain checkpoint already", where="consolidate")
    checkpoint = read_checkpoint(options.checkpoint)
    WholeCheckpoints().save_checkpoint(checkpoint, options.out)
    print(f"{options.out}: {len(checkpoint['state_dict'])} tensors of update {checkpoint['global_step']}")
    return 0
