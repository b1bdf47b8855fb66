"""Silences transformers, for every entry point that loads a model."""

from __future__ import annotations

import warnings

from transformers.utils import logging


def quiet_transformers() -> None:
    """Turn off progress bars and messages that are meant for callers of transformers, not for our users."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
