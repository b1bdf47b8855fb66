"""Rows, chat templates, tokens and packed batches."""
