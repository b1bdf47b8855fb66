"""Modules whose doctests cannot be collected because an optional package is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["trainer/inference/harness_model.py"]
