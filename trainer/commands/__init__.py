"""The command line, one module per verb. No torch."""
