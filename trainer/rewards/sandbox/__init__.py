"""Runs untrusted Python in a locked process: `client` starts it, `run` is that process, `fences` lock it."""
