"""Tasks that generators are compared on: a teacher, test prompts, and the scores of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from gdmd_lightning.data.evaluation_prompts import COLUMN, SPLIT, read_evaluation_prompts
from gdmd_lightning.errors import UserError
from gdmd_lightning.metrics.evaluation import check_names
from gdmd_lightning.metrics.scores import GenEvalScore, RewardScore, TaskScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.clip import ContrastiveReward
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.scenes import SIZE


@dataclass(frozen=True)
class Task:
    """What a study scores generators on.

    Args:
        name: The task's name in :data:`TASKS`.
        config: A configuration that trains on the task; its model describes the teacher.
        teacher: Pipeline directory of the teacher.
        prompts: Source of the test prompts, as :func:`read_evaluation_prompts` takes it.
        column, split, tag: See there.
        scores: Makes the scores, empty.
        titles: Column title of each score, by its name.
        compared: The score whose differences to the teacher and to the control are reported.
        size: Height and width, in pixels, of the pictures that the scores can read.
    """

    name: str
    config: str
    teacher: str
    prompts: str
    scores: Callable[[], list[TaskScore]]
    titles: Mapping[str, str]
    compared: str
    size: tuple[int, int]
    column: str = COLUMN
    split: str = SPLIT
    tag: str | None = None

    def read_prompts(self, count: int) -> list[Prompt]:
        """``count`` test prompts.

        Raises:
            UserError: If the source is broken or cannot give this many.
        """
        return read_evaluation_prompts(self.prompts, count, column=self.column, split=self.split, tag=self.tag)

    def check(self, count: int) -> None:
        """Fail before anything is loaded if the scores cannot judge the first ``count`` test prompts.

        Raises:
            UserError: If a score lacks something in a prompt.
        """
        prompts = self.read_prompts(count)
        for score in self.scores():
            score.check(prompts)

    def check_size(self, name: str, height: int, width: int) -> None:
        """Fail if the scores cannot read a generator's pictures.

        Args:
            name: The generator, for the message.
            height, width: Size of its pictures in pixels.

        Raises:
            UserError: If they cannot.
        """
        if (height, width) != self.size:
            raise UserError(
                f"it makes pictures of {height}x{width}, and the scores of {self.name!r} read only "
                f"{self.size[0]}x{self.size[1]}",
                where=name,
                remedy="score it while it trains, with the callback GenerationEvaluation and your own scores",
            )


def shapes_scores() -> list[TaskScore]:
    """GenEval's verdict, the graded reward, and the contrastive scorer, which stands for HPS."""
    hps = ContrastiveReward("package:assets/shapes/scorer", name="hps_like")
    return [GenEvalScore(), RewardScore(ShapesReward()), RewardScore(hps)]


def built_scores(settings: list[dict[str, Any]]) -> list[TaskScore]:
    """Scores from their settings, ``{class_path: RewardScore, init_args: {...}}``.

    Raises:
        UserError: If a class or an argument is wrong, or two scores have the same name.
    """
    from jsonargparse import ArgumentError

    from gdmd_lightning.configuration.messages import readable_error
    from gdmd_lightning.configuration.restore import score_parser
    from gdmd_lightning.configuration.suggestions import arguments_of

    parser = score_parser("evaluate")
    try:
        scores: list[TaskScore] = parser.instantiate_classes(parser.parse_object({"scores": deepcopy(settings)})).scores
    except (ArgumentError, ValueError, TypeError) as error:
        raise readable_error(error, "evaluate", arguments_of(parser)) from error
    check_names(scores, "--scores")
    return scores


SHAPES = Task(
    name="shapes",
    config="shapes.yaml",
    teacher="package:assets/shapes",
    prompts="shapes",
    scores=shapes_scores,
    titles={"geneval": "GenEval", "shapes": "graded reward", "hps_like": "HPS-like"},
    compared="shapes",
    size=(SIZE, SIZE),
)
TASKS = {task.name: task for task in (SHAPES,)}
