"""Shapes and launcher configurations that ship with the package; data only."""
