"""Prompts: readers, the order in training with its exact position, and embeddings."""
