"""Memory planning: what an update needs per GPU, before anything is downloaded."""
