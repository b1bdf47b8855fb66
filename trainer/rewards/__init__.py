"""Rewards: the contract, isolated workers, and built-in functions."""
