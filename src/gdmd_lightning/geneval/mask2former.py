"""GenEval's detector: Mask2Former finds the objects, CLIP names their colors.

Everything up to the network's outputs and from them to boxes follows the original's mmdet; docs/geneval.md lists what
differs.

Source: djghosh13/geneval, ``evaluate_images.py``; mmdet's ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.pretrained import DTYPES, Precision, check_directory, load_pretrained
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.geneval.classes import CLASSES, COLORS
from gdmd_lightning.geneval.colors import ColorClassifier
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.rules import OFFICIAL, Detection, Rules, counted
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, ranged

DIVISOR = 32
MOST_OBJECTS = 100

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Instances:
    """The objects of one picture, most confident first, ``K`` of them.

    Args:
        classes: Index into ``CLASSES``, ``[K]``.
        scores: Probability of the class times mean probability of the mask's pixels, ``[K]``.
        masks: ``[K, H, W]``, boolean, none of them empty.
        boxes: Left, top, right and bottom edge of the mask in pixels, ``[K, 4]``, integer.
    """

    classes: Tensor
    scores: Tensor
    masks: Tensor
    boxes: Tensor


@ranged
class Mask2FormerDetector(Detector):
    """Finds the 80 classes of COCO, and the colors of those objects whose color a prompt asks for.

    Pictures are rounded to 8 bits first, so that a picture and its file have the same verdict.

    Args:
        path: Directory or hub id of a ``Mask2FormerForUniversalSegmentation`` for COCO's instances, such as
            ``facebook/mask2former-swin-small-coco-instance``.
        colors: Directory or hub id of the color classifier's ``CLIPModel``, such as ``openai/clip-vit-large-patch14``.
        rules: GenEval's thresholds and limits.
        shortest_edge, longest_edge: Pictures are resized so that the short side has ``shortest_edge`` pixels, or
            fewer if the long side would have more than ``longest_edge``.
        batch_size: Pictures in the network at once.
        dtype: Precision of both networks' weights; objects and colors are found from float32 outputs.

    Raises:
        UserError: If the precision is unknown, or a local directory holds no such model.
    """

    classes = CLASSES
    colors = COLORS

    def __init__(
        self,
        path: str,
        colors: str,
        rules: Rules = OFFICIAL,
        shortest_edge: Count = 800,
        longest_edge: Count = 1333,
        batch_size: Count = 8,
        dtype: Precision = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"it is {dtype!r}", where="Mask2FormerDetector.dtype", remedy=f"use {', '.join(DTYPES)}")
        self.where = "GenEval's detector"
        self.path = resolve(str(path))
        check_directory(self.path, self.where, "Mask2FormerForUniversalSegmentation")
        self.color_classifier = ColorClassifier(colors, dtype)
        self.dtype = DTYPES[dtype]
        self.rules = rules
        self.shortest_edge, self.longest_edge, self.batch_size = shortest_edge, longest_edge, batch_size
        self._network: Any = None
        self._device = torch.device("cpu")

    def prepare(self) -> None:
        self._model()
        self.color_classifier.prepare()

    def to(self, device: torch.device) -> None:
        self._device = device
        self.color_classifier.to(device)
        if self._network is not None:
            self._network.to(device)

    def sketch(self) -> nn.Module:
        from transformers import Mask2FormerForUniversalSegmentation

        network = sketch_model(Mask2FormerForUniversalSegmentation, self.path).to(self.dtype)
        return nn.ModuleList([network, self.color_classifier.sketch()])

    @torch.no_grad()
    def detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        images = images.detach().to(self._device, torch.float32)
        images = (images * 255).round().clamp(0, 255) / 255
        out: list[list[Detection]] = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            for image, found in zip(part, self.instances(part), strict=True):
                out.append(self._colored(image, found, prompts[len(out)]))
        return out

    @torch.no_grad()
    def instances(self, images: Tensor) -> list[Instances]:
        """The objects of each of ``images [B, 3, H, W]`` in [0, 1], with any score."""
        pixels, (height, width) = self.prepared(images)
        outputs = self._model()(pixel_values=pixels.to(self.dtype))
        logits = outputs.masks_queries_logits.float()
        logits = F.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        return [
            instances_of(classes, masks, images.shape[-2:])
            for classes, masks in zip(outputs.class_queries_logits.float(), logits, strict=True)
        ]

    def prepared(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalized pixels, padded with 0 to a multiple of 32, and their height and width without padding."""
        height, width = images.shape[-2:]
        scale = min(self.shortest_edge / min(height, width), self.longest_edge / max(height, width))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = F.interpolate(images, size, mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return F.pad((pixels - mean) / std, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size

    def _colored(self, image: Tensor, found: Instances, prompt: Prompt) -> list[Detection]:
        """The detections of a picture, with a color where a clause of its prompt judges it."""
        boxes = [(int(a), int(b), int(c), int(d)) for a, b, c, d in found.boxes.tolist()]
        detections = [
            Detection(CLASSES[label], box, score)
            for label, box, score in zip(found.classes.tolist(), boxes, found.scores.tolist(), strict=True)
        ]
        # The rules rank objects by score, and those with equal scores by their place, the last first.
        by_class = counted(detections, prompt.metadata, self.rules)
        wanted: dict[str, int] = {}
        for clause in prompt.metadata.get("include", []):
            if "color" in clause:
                wanted[clause["class"]] = max(wanted.get(clause["class"], 0), clause["count"])
        for name, count in wanted.items():
            objects = by_class.get(name, [])
            judged = objects if self.rules.color_first else objects[:count]
            rows = [next(i for i, each in enumerate(detections) if each is one) for one in judged]
            if rows:
                names = self.color_classifier.classify(image, [boxes[i] for i in rows], found.masks[rows], name)
                for i, color in zip(rows, names, strict=True):
                    detections[i] = replace(detections[i], color=color)
        return detections

    def _model(self) -> Any:
        if self._network is None:
            from transformers import Mask2FormerForUniversalSegmentation

            network = load_pretrained(Mask2FormerForUniversalSegmentation, self.path, self.where).to(self.dtype)
            check_classes(network.config.id2label, self.path, self.where)
            self._network = network.requires_grad_(False).eval().to(self._device)
        return self._network


def check_classes(names: dict[int, str], path: str, where: str) -> None:
    """Check that a network's outputs are COCO's 80 classes in COCO's order.

    Raises:
        UserError: If they are not.
    """
    for index, wanted in enumerate(CLASSES):
        found = str(names.get(index, "missing")).lower()
        # COCO's own names are shorter in three places: "mouse" for "computer mouse". British names are older.
        same = found in wanted or wanted in found or {found, wanted} in _SYNONYMS
        if not same or len(names) != len(CLASSES):
            raise UserError(
                f"{path!r} has {len(names)} classes, and number {index} is {found!r}",
                where=where,
                remedy=f"give a model of the {len(CLASSES)} classes of COCO's instances, here {wanted!r}",
            )


_SYNONYMS = (
    {"motorbike", "motorcycle"},
    {"aeroplane", "airplane"},
    {"sofa", "couch"},
    {"pottedplant", "potted plant"},
    {"diningtable", "dining table"},
    {"tvmonitor", "tv"},
    {"doughnut", "donut"},
    {"hair dryer", "hair drier"},
)


def instances_of(class_logits: Tensor, mask_logits: Tensor, size: Sequence[int]) -> Instances:
    """Objects from the network's outputs for one picture.

    ``score = P(class) * mean of sigmoid(mask_logits) where mask_logits > 0``; a query may give objects of several
    classes. Of all pairs of query and class the 100 with the highest P(class) are taken.

    Args:
        class_logits: ``[Q, classes + 1]``, the last for "no object".
        mask_logits: ``[Q, h, w]``.
        size: Height and width of the picture, to which masks are resized.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    top, index = probabilities.flatten().topk(min(MOST_OBJECTS, probabilities.numel()))
    queries, classes = index // probabilities.shape[1], index % probabilities.shape[1]
    logits = F.interpolate(mask_logits[None], (size[0], size[1]), mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    area = inside.sum((1, 2))
    quality = (logits.sigmoid() * inside).sum((1, 2)) / (area + 1e-6)
    scores = top * quality[queries]
    order = scores.argsort(descending=True, stable=True)
    order = order[area[queries[order]] > 0]
    masks = inside[queries[order]]
    return Instances(classes[order], scores[order], masks, _boxes(masks))


def _boxes(masks: Tensor) -> Tensor:
    """The smallest box around each mask, ``[K, 4]``; right and bottom edges are one pixel further, as in mmdet."""
    edges = []
    for pixels in (masks.any(1), masks.any(2)):  # columns, rows
        number = torch.arange(pixels.shape[1], device=masks.device)
        first = torch.where(pixels, number, pixels.shape[1]).amin(1) if len(pixels) else number[:0]
        last = torch.where(pixels, number, -1).amax(1) if len(pixels) else number[:0]
        edges.append((first, last + 1))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1)
