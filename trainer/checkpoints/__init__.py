"""Checkpoints on local disk and their copies on remote storage."""
