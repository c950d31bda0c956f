"""Distill text-to-image diffusion models into few-step generators, with gradient rewards."""

__version__ = "0.2.0"
