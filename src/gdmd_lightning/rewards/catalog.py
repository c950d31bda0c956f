"""What rewards there are: where their weights come from, and whether this machine has them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

COMMON = ("model.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.txt")
"""Names of files that many models have: alone in a directory they do not say of which model they are."""


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Args:
        file: Its name.
        source: The hub id that it is in, or the address of the page that links to it.
    """

    file: str
    source: str

    @property
    def command(self) -> str:
        """How to get it."""
        if "://" in self.source:
            return f"download {self.file} from {self.source}"
        return f"hf download {self.source}"

    def find(self, directories: tuple[Path, ...]) -> Path | None:
        """The file in one of the directories, below them by hub id, or in the cache of the hub's library.

        A file with a name of :data:`COMMON` is looked for by hub id only.
        """
        for directory in directories:
            by_id, by_name = directory / self.source / self.file, directory / self.file
            for place in (by_id,) if self.file in COMMON else (by_name, by_id):
                if place.is_file():
                    return place
        if "://" in self.source:
            return None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.source, self.file)
        return Path(found) if isinstance(found, str) else None


@dataclass(frozen=True)
class Entry:
    """A reward.

    Args:
        name: Its class.
        scores: Its range or usual value, in words.
        differentiable: Whether its scores have a gradient.
        license: License of the weights.
        weights: What it needs.
        packages: What must be installed, by the name to import.
    """

    name: str
    scores: str
    differentiable: bool
    license: str
    weights: tuple[Weights, ...] = ()
    packages: tuple[str, ...] = ()

    def state(self, directories: tuple[Path, ...]) -> tuple[str, ...]:
        """One line for each thing needed: where it is, or how to get it."""
        lines = [
            f"{package} is not installed: pip install 'gdmd-lightning[rewards]'"
            for package in self.packages
            if importlib.util.find_spec(package) is None
        ]
        for each in self.weights:
            found = each.find(directories)
            lines.append(f"found: {found}" if found else f"not found: {each.command}")
        return tuple(lines) or ("ready: needs no further files",)


CLIP_L = Weights("model.safetensors", "openai/clip-vit-large-patch14")
AESTHETIC = Weights(
    "sac+logos+ava1-l14-linearMSE.pth", "https://github.com/christophschuhmann/improved-aesthetic-predictor"
)
BERT = Weights("vocab.txt", "google-bert/bert-base-uncased")
DETECTOR = Weights("model.safetensors", "facebook/mask2former-swin-small-coco-instance")
IMAGE_REWARD = (Weights("ImageReward.pt", "THUDM/ImageReward"), BERT)
PICKSCORE = (
    Weights("model.safetensors", "yuvalkirstain/PickScore_v1"),
    Weights("tokenizer.json", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
)
HPS = (Weights("HPS_v2.1_compressed.pt", "xswu/HPSv2"),)

HPSV3 = (Weights("HPSv3.safetensors", "MizzenAI/HPSv3"), Weights("tokenizer.json", "Qwen/Qwen2-VL-7B-Instruct"))
QWEN3_VL = Weights("model.safetensors.index.json", "Qwen/Qwen3-VL-8B-Instruct")

REWARDS = (
    Entry("HPSv2", "about 0.28", True, "Apache 2.0", HPS, ("open_clip",)),
    Entry("HPSv3", "about 10, unbounded", True, "see its model card; Qwen2-VL: Apache 2.0", HPSV3),
    Entry("PickScore", "about 22", True, "see its model card", PICKSCORE),
    Entry("CLIPScore", "-1 to 1, about 0.3", True, "MIT", (CLIP_L,)),
    Entry("ImageReward", "about 0, standardized", True, "Apache 2.0", IMAGE_REWARD),
    Entry("AestheticScore", "1 to 10, about 5.6", True, "see its page; CLIP: MIT", (CLIP_L, AESTHETIC)),
    Entry("GenEvalReward", "0 or 1, or graded", False, "see its model card; CLIP: MIT", (DETECTOR, CLIP_L)),
    Entry("GenEval2Reward", "0 to 1", True, "Apache 2.0; its prompts: CC BY-NC 4.0", (QWEN3_VL,)),
    Entry("OCRReward", "0 to 1", False, "Apache 2.0", (), ("rapidocr", "onnxruntime")),
    Entry("ContrastiveReward", "-1 to 1", True, "of the model that you give"),
    Entry("ShapesReward", "0 to 1", False, "of this project"),
    Entry("CombinedReward", "weighted sum of others", True, "of its parts"),
)
