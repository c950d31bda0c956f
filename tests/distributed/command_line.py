"""The command line on a rank that a launcher has started: ``python command_line.py fit ...``."""

import sys

from conftest import HERE

from gdmd_lightning.cli import main

sys.path += [str(HERE / "faults")]

if __name__ == "__main__":
    main(sys.argv[1:])
