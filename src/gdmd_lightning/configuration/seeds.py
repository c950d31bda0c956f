"""One seed for a run: ``seed_everything``, unless model or data have their own."""

from __future__ import annotations

from typing import Any

from gdmd_lightning.errors import UserError


def share_seed(settings: Any) -> None:
    """Set the seeds of model and data that are null to ``seed_everything``, so that the configuration states them.

    Args:
        settings: A parsed configuration of ``fit`` after Lightning has turned ``seed_everything: true`` into a number:
            that of the environment variable ``PL_GLOBAL_SEED``, or 0.

    Raises:
        UserError: If ``seed_everything`` is false and a seed is missing.
    """
    for key, arguments in (("model.seed", settings.model.init_args), ("data.seed", settings.data)):
        if arguments.seed is not None:
            continue
        if settings.seed_everything is False:
            raise UserError(
                "it is null, and seed_everything is false", where=key, remedy="set it, or give seed_everything a number"
            )
        arguments.seed = settings.seed_everything
