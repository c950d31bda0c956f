"""A tiny Mask2Former with random weights, of the class that GenEval's detector is published in."""

from pathlib import Path

import torch

from gdmd_lightning.geneval.classes import CLASSES


def save_mask2former(directory: Path, names: tuple[str, ...] = CLASSES) -> Path:
    """Save it with these names of classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 32}
    config = Mask2FormerConfig(
        backbone_config=backbone, num_queries=6, id2label=dict(enumerate(names)), **sizes, **layers
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # Confident enough that some objects pass the thresholds.
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(directory)
    return directory
