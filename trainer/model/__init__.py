"""The policy model: packed batches, attention, adapters and the LM head."""
