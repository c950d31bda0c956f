"""Rewards: one file per reward."""
