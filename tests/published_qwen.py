"""Tiny Qwen vision-language models with random weights, saved with their processors as their authors save them."""

from pathlib import Path

import torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL.append("<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "how many circle are in the image? is red yes Yes one two One Two Answer in one word. user assistant a rating"


def build_tokenizer(place: Path):
    """A ``Qwen2TokenizerFast`` of a few words and all bytes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2TokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([WORDS] * 4, vocab_size=340, special_tokens=SPECIAL)
    place.mkdir(parents=True, exist_ok=True)
    trained.save_model(str(place))
    return Qwen2TokenizerFast.from_pretrained(
        place, pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:], chat_template=TEMPLATE
    )


def save_qwen3_vl(directory: Path) -> Path:
    """A ``Qwen3VLForConditionalGeneration`` in patches of 4x4 pixels and its processor, for 256 to 4,096 pixels."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = build_tokenizer(directory)
    ids = tokenizer.convert_tokens_to_ids
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
                                    "mrope_interleaved": True},
            },
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
                "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
                "initializer_range": 0.2,
            },
            image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        )  # fmt: skip
        Qwen3VLForConditionalGeneration(config).save_pretrained(directory)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    stats = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": 4096}, **sizes, **stats)
    Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(**sizes), chat_template=TEMPLATE).save_pretrained(
        directory
    )
    return directory


def save_qwen2_vl(directory: Path) -> Path:
    """Configuration and processor of a ``Qwen2VLForConditionalGeneration`` in patches of 56x56 pixels, no weights."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = build_tokenizer(directory)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            # As published, the vocabulary of the configuration is larger than that of the tokenizer.
            "vocab_size": len(tokenizer) + 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 56,
            "initializer_range": 0.2,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    config.save_pretrained(directory)
    sizes = {"patch_size": 56, "temporal_patch_size": 2, "merge_size": 2}
    videos = Qwen2VLVideoProcessor(**sizes)
    Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, videos, chat_template=TEMPLATE).save_pretrained(
        directory
    )
    return directory


def hpsv3_weights(place: Path) -> dict[str, torch.Tensor]:
    """Random weights of that network with a head, by the names in ``HPSv3.safetensors``."""
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig.from_pretrained(place)
    config.text_config.vocab_size = len(Qwen2TokenizerFast.from_pretrained(place)) + 1
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = Qwen2VLForConditionalGeneration(config)
        head = torch.nn.Sequential(
            torch.nn.Linear(32, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05),
            torch.nn.Linear(1024, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2),
        )  # fmt: skip
    found = {f"rm_head.{key}": value.clone() for key, value in head.state_dict().items()}
    for key, value in network.state_dict().items():
        old = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        found[old] = value.clone()
    return found
