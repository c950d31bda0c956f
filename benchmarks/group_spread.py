"""What a group of samples can teach: how a generator's samples of one prompt differ in their reward, by GenEval task.

.venv/bin/python benchmarks/group_spread.py CHECKPOINT ... [--count N] [--samples N] [--group_size N] [--out FILE]

A reward moves a generator only where samples of one prompt differ in it. For each task of Shapes: the mean of the
graded reward, its standard deviation within groups, the share of pictures that GenEval calls correct, the share of
groups in which some pictures are correct and some are not, and the share of prompts with a correct picture among all
samples, which is how far the choice of the best could lead.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
from gdmd_lightning.files import atomic_file
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.geneval import GenEvalReward
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.detector import ShapesDetector
from gdmd_lightning.streams import draw_noise, stream

COLUMNS = {
    "graded": "graded reward",
    "std": "its std within groups",
    "correct": "correct",
    "mixed": "groups with both",
    "any": "prompts with one correct",
}


def scores_of(module: DistillationModule, prompt: Prompt, samples: int, index: int) -> Tensor:
    """Graded reward and verdict of samples of one prompt: ``[2, samples]``."""
    noise = draw_noise((samples, *module.latent_shape), stream("group spread", index), module.device)
    images = module.generate(noise, [prompt.text] * samples, rngs=stream("group spread sampler", index))
    judges = (ShapesReward(), GenEvalReward(ShapesDetector()))
    return torch.stack([judge.score(images, [prompt] * samples).float() for judge in judges])


def summary(scores: Tensor, group_size: int) -> dict[str, float]:
    """The columns of one task from ``[prompts, 2, samples]``; groups are consecutive samples."""
    graded, verdicts = scores.unflatten(-1, (-1, group_size)).unbind(1)  # [prompts, groups, group_size]
    share = verdicts.mean(-1)
    return {
        "graded": graded.mean().item(),
        "std": graded.std(-1).mean().item(),
        "correct": verdicts.mean().item(),
        "mixed": ((share > 0) & (share < 1)).float().mean().item(),
        "any": verdicts.flatten(1).amax(1).mean().item(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="trained on Shapes")
    parser.add_argument("--count", type=int, default=300, help="number of test prompts")
    parser.add_argument("--samples", type=int, default=16, help="samples of each prompt, a multiple of the group size")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    if options.group_size < 2 or options.samples % options.group_size:
        parser.error(f"--samples {options.samples}: give a multiple of --group_size, which is at least 2")
    prompts = read_evaluation_prompts("shapes", options.count)
    figures = {}
    for path in options.checkpoints:
        module = load_module(path, role="ema")
        tasks = defaultdict(list)
        for index, prompt in enumerate(prompts):
            tasks[prompt.metadata["tag"]].append(scores_of(module, prompt, options.samples, index))
        everything = [scores for task in tasks.values() for scores in task]
        rows = {**tasks, "all": everything}
        figures[path] = {task: summary(torch.stack(scores), options.group_size) for task, scores in rows.items()}
        print(f"\n{path}\n\n| task | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}")
        for task, row in figures[path].items():
            print(f"| {task} | {' | '.join(f'{row[column]:.3f}' for column in COLUMNS)} |", flush=True)
    if options.out is not None:
        with atomic_file(options.out) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
