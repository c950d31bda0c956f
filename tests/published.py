"""Tiny networks with random weights, of the classes that published rewards have, saved as their authors save them."""

import json
from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "two", "of"]


def save_clip(directory: Path) -> Path:
    """A ``CLIPModel`` for 48x48 pictures and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from gdmd_lightning.shapes.pipeline import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **ends, **sizes)
    vision = CLIPVisionConfig(image_size=48, patch_size=16, **sizes)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(directory)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(directory)
    return directory


def save_head(file: Path, width: int = 24) -> Path:
    """The aesthetic predictor's head, by its published names."""
    from gdmd_lightning.rewards.heads import regression_head

    torch.manual_seed(1)
    head = regression_head(width)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, file)
    return file


def open_clip_architecture(directory: Path) -> str:
    """Register a tiny network with open_clip and return its name."""
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (directory / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(directory / "tiny-clip.json")
    return "tiny-clip"


def save_hps(file: Path, architecture: str) -> Path:
    """Weights of that network as HPSv2 publishes them."""
    import open_clip

    torch.manual_seed(2)
    network = open_clip.create_model(architecture, load_weights=False)
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, file)
    return file


def image_reward_weights(width: int = 64, depth: int = 2) -> dict[str, torch.Tensor]:
    """Random weights by the names and shapes of ``ImageReward.pt``: 48x48 pictures in patches of 16, 12 words."""
    draw = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, 10, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
        "blip.vision_proj.weight": (8, width),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, width),
        "blip.text_proj.bias": (8,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), width),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, width),
        "blip.text_encoder.embeddings.position_ids": (1, 40),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("blip.visual_encoder.norm")
    norm("blip.text_encoder.embeddings.LayerNorm")
    for i in range(depth):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 2 * width, width)
        linear(f"{block}.mlp.fc2", width, 2 * width)
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{kind}.self.{part}", width, width)
            linear(f"{layer}.{kind}.output.dense", width, width)
            norm(f"{layer}.{kind}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 2 * width, width)
        linear(f"{layer}.output.dense", width, 2 * width)
        norm(f"{layer}.output.LayerNorm")
    into = width
    for number, out in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        linear(f"mlp.layers.{number}", out, into)
        into = out
    made = {}
    for name, shape in shapes.items():
        gain = 1.0 if "orm" in name and name.endswith("weight") and len(shape) == 1 else 0.0
        made[name] = gain + torch.randn(shape, generator=draw) * (0.3 if len(shape) > 1 else 0.1) / shape[-1] ** 0.25
    return made


def save_bert_tokenizer(directory: Path) -> Path:
    """A ``BertTokenizer`` of :data:`WORDS`."""
    from transformers import BertTokenizer

    directory.mkdir(exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory
