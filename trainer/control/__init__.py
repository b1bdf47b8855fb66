"""Who may use a server, how much, and the record of what was changed. No torch."""
