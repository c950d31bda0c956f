"""Scores of generated pictures, as torchmetrics."""
