"""Start and supervise workers. Workers are started by argv and never imported."""
