"""The run directory: paths, locks, readers, states, the rollout journal, progress for people. No torch."""
