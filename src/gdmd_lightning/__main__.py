"""``python -m gdmd_lightning``."""

from gdmd_lightning.cli import main

if __name__ == "__main__":
    main()
