"""Callbacks: evaluation at checkpoints, the record of gradient rewards, clean interruption."""
