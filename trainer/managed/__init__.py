"""Servers that a run or a gateway starts and supervises: their processes, restarts and end. No torch."""
