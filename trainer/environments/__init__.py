"""Environments and tools of rollouts with several turns; each runs in a process of its own. No torch."""
