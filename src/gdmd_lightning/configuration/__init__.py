"""From arguments and checkpoints to modules: find configs, explain wrong arguments, train, restore."""
