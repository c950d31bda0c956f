"""One file per command: parse arguments, call, print. No command imports another."""
