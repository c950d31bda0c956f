"""Prompts for training: where they are read from, in which order, and how far a run has come."""
