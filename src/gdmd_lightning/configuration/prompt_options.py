"""Command line options that say where prompts are in their source."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_prompt_options(parser: ArgumentParser) -> None:
    """Add ``--column``, ``--split`` and ``--tag``."""
    parser.add_argument("--column", type=str, default="prompt", help="key or column that holds the prompt")
    split = "split of a folder or a Hugging Face data set; sample also takes test of shapes and geneval"
    parser.add_argument("--split", type=str, default="train", help=split)
    parser.add_argument(
        "--tag",
        type=str | None,
        default=None,
        help="key or column by which scores are reported, or 'file' for the name of each prompt file",
    )
