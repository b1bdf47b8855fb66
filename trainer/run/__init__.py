"""The run directory: paths, locks, readers, the rollout journal, progress for people. No torch."""
