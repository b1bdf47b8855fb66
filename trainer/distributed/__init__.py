"""Ranks: collectives, sharded parameters, preemption."""
