"""Shapes: an embedded text-to-image world in the manner of GenEval that a CPU can learn."""
