"""Recipes and training shapes as typed data, and the plan they make. No torch."""
