"""What judges pictures: one file a reward."""
