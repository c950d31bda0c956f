"""Human Preference Score v3: Qwen2-VL with a regression head, on today's transformers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.pretrained import AGAIN, check_complete, check_directory, is_local, load_any
from gdmd_lightning.families.qwen_vl import chats, check_texts, load_processor, model_inputs
from gdmd_lightning.families.sketch import configurations
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.rewards.heads import cast_but_head
from gdmd_lightning.rewards.network import NetworkReward, Precision
from gdmd_lightning.rewards.weights import check_file, fill, find_file, read_weights

FILE = "HPSv3.safetensors"
PIXELS = 256 * 28 * 28
"""Pictures are resized to about as many; source: MizzenAI/HPSv3, ``inference.py``."""
REWARD = "<|Reward|>"
"""The token whose hidden state is read; it is added to the end of the vocabulary."""
PLACE = "{text_prompt}"
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
WHERE_TO_GET = "download hpsv3/dataset/data_collator_qwen.py from github.com/MizzenAI/HPSv3 and give its path"

RENAMED = (
    (r"^rm_head\.", "head."),
    (r"^(model\.)?visual\.", "backbone.visual."),
    (r"^model\.(language_model\.)?", "backbone.language_model."),
)
"""From the published names, which are those of transformers before 4.52, or later ones, to ours."""
UNUSED = ("lm_head.",)
EMBEDDING = "backbone.language_model.embed_tokens.weight"


@ranged
class HPSv3(NetworkReward):
    """Preference learned from people's choices, the mean of a Gaussian; about 10 for a good picture, unbounded.

    ``head(h)[0]``, ``h`` being the last hidden state of Qwen2-VL at the token ``<|Reward|>`` behind the picture, an
    instruction and the prompt. Positions count tokens, also within the picture: the original passes embeddings to the
    language model, which then knows nothing of rows and columns.

    Source: 2508.03789; MizzenAI/HPSv3, ``inference.py`` and ``qwen2vl_trainer.py``.

    Args:
        path: ``HPSv3.safetensors``, its directory, or the hub id ``MizzenAI/HPSv3``.
        processor: Directory or hub id with configuration and processor of the backbone:
            ``Qwen/Qwen2-VL-7B-Instruct``. Its weights are not needed.
        instruction: The original's ``data_collator_qwen.py``, of which two texts are read and nothing is run; or a text
            file with the places ``{text_prompt}`` and ``<|Reward|>``.
        name: Name in logs.
        dtype: Precision of the backbone's weights; the head stays in float32.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If the weights, the processor or the instruction are missing or broken, or the weights are those of
            another network.
    """

    def __init__(
        self,
        path: str,
        processor: str,
        instruction: str | None = None,
        name: str = "hpsv3",
        dtype: Precision = "bfloat16",
        batch_size: Count = 8,
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        self.processor = resolve(str(processor))
        self.instruction = read_instruction(instruction, self.where)
        check_file(self.path, FILE, self.where)
        check_directory(self.processor, self.where, "Qwen2-VL", types=("qwen2_vl",))
        self._processor: Any = self._loaded_processor() if is_local(self.processor) else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_texts([prompt.text for prompt in prompts], (REWARD, "<|image_pad|>"), self.where)

    def load(self) -> nn.Module:
        file = find_file(self.path, FILE, self.where)
        weights = renamed(read_weights(file, self.where))
        if self._processor is None:
            self._processor = self._loaded_processor()
        config, words = self._config(), len(self._processor.tokenizer)
        if EMBEDDING not in weights or len(weights[EMBEDDING]) != words:
            found = f"{len(weights[EMBEDDING])} words" if EMBEDDING in weights else "no words"
            what = f"{str(file)!r} has {found}, and the processor with {REWARD} {words}"
            raise UserError(what, where=self.where, remedy=AGAIN)
        config.text_config.vocab_size = words
        backbone = _filled(config, weights, self.dtype, self.where, str(file))
        head = regression_head(config.text_config.hidden_size)
        fill(head, _part(weights, "head."), self.where, str(file))
        return nn.ModuleDict({"backbone": backbone, "head": head})

    def cast(self, network: Any) -> nn.Module:
        return cast_but_head(network, self.dtype)

    def sketch(self) -> nn.Module:
        from transformers import Qwen2VLModel

        config = self._config()
        with torch.device("meta"):
            backbone = Qwen2VLModel(config).to(self.dtype)
            return nn.ModuleDict({"backbone": backbone, "head": regression_head(config.text_config.hidden_size)})

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        check_texts(texts, (REWARD,), self.where)
        whole = chats(self._processor, [self.instruction.replace(PLACE, text) for text in texts])
        inputs = model_inputs(self._processor, whole, images, PIXELS, PIXELS, "right", self.where)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        hidden = network["backbone"](**inputs, use_cache=False).last_hidden_state
        read = inputs["input_ids"] == self._processor.tokenizer.convert_tokens_to_ids(REWARD)
        head = network["head"]
        scores: Tensor = head(hidden[read].to(head[0].weight.dtype))[:, 0]
        return scores

    def _config(self) -> Any:
        from transformers import Qwen2VLConfig

        return load_any(Qwen2VLConfig, str(configurations(self.processor)), self.where)

    def _loaded_processor(self) -> Any:
        processor = load_processor(self.processor, self.where)
        processor.tokenizer.add_tokens([REWARD], special_tokens=True)
        return processor


def read_instruction(path: str | None, where: str) -> str:
    """The text around a prompt, with the places :data:`PLACE` and :data:`REWARD`.

    Args:
        path: A text file, or a Python file that assigns :data:`CONSTANTS`, which are joined.
        where: What needs it, for the message.

    Raises:
        UserError: If there is none, it cannot be read, or it does not have each place once.
    """
    if path is None:
        raise UserError("the instruction is not set", where=where, remedy=WHERE_TO_GET)
    try:
        text = Path(resolve(str(path))).expanduser().read_text(encoding="utf-8")
        if str(path).endswith(".py"):
            found = {
                target.id: ast.literal_eval(node.value)
                for node in ast.parse(text).body
                if isinstance(node, ast.Assign)
                for target in node.targets
                if isinstance(target, ast.Name) and target.id in CONSTANTS
            }
            text = "".join(found[name] for name in CONSTANTS)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, RecursionError) as error:
        what = f"the instruction {str(path)!r} cannot be read: {' '.join(str(error).split())[:200]}"
        raise UserError(what, where=where, remedy=WHERE_TO_GET) from error
    for place in (PLACE, REWARD):
        if text.count(place) != 1:
            what = f"the instruction {str(path)!r} has {text.count(place)} times {place}, not once"
            raise UserError(what, where=where, remedy=WHERE_TO_GET)
    return text


def regression_head(width: int) -> nn.Sequential:
    """From a hidden state to mean and deviation; dropout keeps the numbers in the names of published weights."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights by our names, without the language model's own head."""
    found = {}
    for key, value in weights.items():
        if not key.startswith(UNUSED):
            name = next((re.sub(old, new, key) for old, new in RENAMED if re.match(old, key)), key)
            found[name] = value
    return found


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _filled(config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, where: str, source: str) -> nn.Module:
    """The backbone with exactly these weights.

    Raises:
        UserError: If one is missing, unexpected, or of another shape.
    """
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Qwen2VLModel(config).state_dict().items()}
    mine = _part(weights, "backbone.")
    others = {key for key in weights if not key.startswith(("backbone.", "head."))}
    wrong = {key for key in mine.keys() & shapes.keys() if mine[key].shape != shapes[key]}
    unexpected = (mine.keys() - shapes.keys()) | others
    keys = {"missing": shapes.keys() - mine.keys(), "mismatched": wrong, "unexpected": unexpected}
    check_complete(keys, where, source, "Qwen2-VL with a regression head")
    # The library builds on the meta device and fills tables that no file holds, such as those of positions.
    backbone: nn.Module = Qwen2VLModel.from_pretrained(None, config=config, state_dict=mine, dtype=dtype)
    return backbone
