"""The embedded engine: a process that continues token sequences, with many adapters on one base model."""
