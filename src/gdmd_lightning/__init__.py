"""Distil text-to-image diffusion models into few-step generators, and lift them with gradient rewards."""

__version__ = "0.2.0"
