"""What ranks need, imported once before they are forked."""

import importlib
from contextlib import suppress

MODULES = ("gdmd_lightning.cli", "gdmd_lightning.strategies", "tiny", "peft", "torch.distributed.fsdp")
CLASSES = {
    "diffusers": ("StableDiffusion3Pipeline", "AutoencoderKL", "SD3Transformer2DModel"),
    "transformers": ("CLIPTextModelWithProjection", "CLIPTokenizer"),
}
"""These packages import a class when it is asked for."""
DEEPSPEED = ("deepspeed", "deepspeed.module_inject", "deepspeed.runtime.zero.stage3", "torch._inductor.compile_fx")

for _module in MODULES:
    importlib.import_module(_module)
for _package, _names in CLASSES.items():
    for _name in _names:
        getattr(importlib.import_module(_package), _name)
with suppress(ImportError):  # optional: without it the tests that need it are skipped
    for _module in DEEPSPEED:
        importlib.import_module(_module)
