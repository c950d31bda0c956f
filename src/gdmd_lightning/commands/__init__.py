"""What the command line does beside training: one file a command, callable from Python too."""
