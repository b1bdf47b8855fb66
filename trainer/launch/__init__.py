"""The commands and the supervisor; the worker is started by argv and never imported."""
