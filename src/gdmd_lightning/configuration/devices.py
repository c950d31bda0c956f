"""The device that a command runs on."""

from __future__ import annotations

from gdmd_lightning.errors import UserError

DEVICE_HELP = "cuda, cuda:1, mps, cpu, or auto: cuda if available, else cpu"


def usable_device(name: str) -> str:
    """A device that tensors can be placed on; ``auto`` is ``cuda`` if available, else ``cpu``.

    Raises:
        UserError: If there is no such device.
    """
    import torch  # takes seconds, which wrong arguments of a command should not wait for

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        # A device without memory (meta) cannot give a value back.
        torch.zeros(1, device=chosen).item()
    # torch's errors for an unknown name, for missing CUDA, and for a device that holds no values.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        remedy = f"use {DEVICE_HELP}"
        raise UserError(f"{chosen!r} cannot be used: {reason}", where="--device", remedy=remedy) from error
    return chosen
