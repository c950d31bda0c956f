"""From arguments and checkpoints to modules: finding configs, explaining wrong arguments, training, restoring."""
