"""A callback that records the final state of each rank; configurations name it ``digest.Digest``."""

import hashlib
import json
from pathlib import Path

import lightning.pytorch as pl


class Digest(pl.Callback):
    """Writes ``digest-<rank>.json``: prompts seen, number of updates, and a hash of each role's weights."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.prompts: list[list[str]] = []
        self.moved: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.prompts.append([prompt.text for prompt in batch.prompts])

    def on_train_end(self, trainer, pl_module):
        roles = pl_module.roles
        state = roles.state_dict()
        names = {role: roles.names_of(role) for role in ("generator", "fake_score", "ema", "old")}
        names["teacher"] = [name for name in state if roles.is_frozen(name)]
        digests = {
            role: hashlib.sha256(b"".join(state[name].cpu().numpy().tobytes() for name in its)).hexdigest()
            for role, its in names.items()
        }
        content = {"prompts": self.prompts, "digests": digests, "updates": trainer.global_step}
        Path(self.directory, f"digest-{trainer.global_rank}.json").write_text(json.dumps(content))
