"""Shapes: a small embedded text-to-image world, modeled on GenEval, that a CPU can learn."""
