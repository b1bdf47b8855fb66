"""Resolve recipe and shape into a frozen plan and predict memory; does not import torch."""
