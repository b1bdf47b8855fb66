"""What a new user begins with: a first recipe for their rows, the quickstart's files, a small real model."""
