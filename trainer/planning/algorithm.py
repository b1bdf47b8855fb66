"""Resolve a recipe's algorithm: fill in the defaults of the algorithm it names."""

from __future__ import annotations

from dataclasses import asdict, replace

from trainer.config.presets import PRESETS, ResolvedAlgorithm
from trainer.config.rft_sections import AlgorithmSettings


def resolve_algorithm(given: AlgorithmSettings) -> ResolvedAlgorithm:
    """Return the recipe's numbers; where the recipe gives none, those of the algorithm that it names.

    >>> resolve_algorithm(AlgorithmSettings(name="dapo", clip_low=0.1)).clip_high
    0.28
    """
    preset = PRESETS[given.name]
    written = {name: value for name, value in given.model_dump().items() if value is not None}
    return replace(preset, **written)


def algorithm_values(algorithm: ResolvedAlgorithm) -> dict[str, object]:
    """Return the resolved values under the names of the recipe's `algorithm` section."""
    values = asdict(algorithm)
    return {name: values[name] for name in AlgorithmSettings.model_fields}
