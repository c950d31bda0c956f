"""What a prompt source is by its content, so that a resumed run reads the same prompts wherever they are now."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gdmd_lightning.data.hub import HubDataset
from gdmd_lightning.data.readers import GenEvalPrompts, PromptSource, ShapesPrompts
from gdmd_lightning.errors import UserError


def content_of(source: PromptSource) -> str:
    """Digest of a source's content.

    Files, and all files of a local folder, are read once, at about 1 GB per second. The Shapes world is its split, and
    GenEval's training prompts are all the same: their seeds are settings of their own. A data set on the hub is its
    name and current revision.

    Raises:
        UserError: If a file cannot be read.
    """
    if isinstance(source, ShapesPrompts):
        return f"shapes {source.split}"
    if isinstance(source, GenEvalPrompts):
        return source.name
    path = Path(source.name)
    if isinstance(source, HubDataset) and not path.exists():
        return f"{source.name} {_revision(source.name)}"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(type(source).__name__.encode(), digest_size=16)
    try:
        for file in files:
            if file != path:
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while part := content.read(1 << 20):
                    digest.update(part)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=source.name) from error
    return digest.hexdigest()


def _revision(name: str) -> str:
    """Current revision of a data set on the hub; empty offline, where ``datasets`` reads its local copy."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(name).sha)
    except OfflineModeIsEnabled:
        return ""
    except Exception as error:  # the hub's client raises unrelated types without a connection
        raise UserError(f"its revision cannot be read: {error}", where=name, remedy="try again") from error
