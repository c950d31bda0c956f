"""What the commands that score, sample, export and compare generators share."""
