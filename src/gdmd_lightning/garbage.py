"""How often Python looks for cycles of objects that nothing else refers to.

Importing torch, Lightning and diffusers, parsing a configuration and building networks create more than a million
objects, nearly all of which stay. With its usual thresholds Python walks over them again and again: of the 21 s of
``plan`` for SD3, 2.5 s.
"""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
RARE = (200_000, 10, 10)


def collect_rarely() -> None:
    """For the start of a command: objects are created to stay."""
    gc.set_threshold(*RARE)


def collect_as_usual() -> None:
    """For training: a cycle may hold tensors, whose memory must not wait."""
    gc.set_threshold(*USUAL)
