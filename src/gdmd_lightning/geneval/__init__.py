"""GenEval: its rules, and what a detector must provide for them."""
