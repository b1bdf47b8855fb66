"""One training example as the API takes it: tokens, and named loss inputs of the same length. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias, final

import numpy as np
import numpy.typing as npt

from trainer.config.presets import PRESETS
from trainer.errors import DataError, UserError

Array: TypeAlias = npt.NDArray[Any]
TARGETS: Final = "target_tokens"
WEIGHTS: Final = "weights"
LOGPROBS: Final = "logprobs"
ADVANTAGES: Final = "advantages"
RATIO_MASK: Final = "sequence_ratio_mask"
CLIP: Final[Mapping[str, float]] = MappingProxyType({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
"""Bounds of the ratio policy / sampler, with the defaults of the protocol."""

GSPO_CLIP: Final[Mapping[str, float]] = MappingProxyType(
    {
        "clip_low_threshold": 1 - PRESETS["gspo"].clip_low,
        "clip_high_threshold": 1 + PRESETS["gspo"].clip_high,
    }
)
"""The same of `gspo`: those of its paper and of recipes, since they bound the mean over a sequence."""


@final
@dataclass(frozen=True)
class LossInputsOf:
    """What a loss takes."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    config: Mapping[str, float] = field(default_factory=lambda: CLIP)
    """Its numbers, with their defaults."""


LOSS_INPUTS: Final[Mapping[str, LossInputsOf]] = {
    "cross_entropy": LossInputsOf(frozenset({TARGETS}), frozenset({WEIGHTS}), config={}),
    "importance_sampling": LossInputsOf(frozenset({TARGETS, LOGPROBS, ADVANTAGES}), config={}),
    "ppo": LossInputsOf(frozenset({TARGETS, LOGPROBS, ADVANTAGES})),
    "cispo": LossInputsOf(frozenset({TARGETS, LOGPROBS, ADVANTAGES})),
    "gspo": LossInputsOf(frozenset({TARGETS, LOGPROBS, ADVANTAGES, RATIO_MASK}), config=GSPO_CLIP),
}
"""The losses by name; see `losses` for the formulas."""


@final
@dataclass(frozen=True)
class Datum:
    """Tokens, and the inputs of the loss at each of them; position t predicts `target_tokens[t]`.

    Of a prompt (5, 6) and an answer (7, 2):

    >>> datum = Datum.shifted((5, 6, 7, 2), weights=(0.0, 0.0, 1.0, 1.0))
    >>> datum.tokens, datum.inputs["target_tokens"].tolist(), datum.inputs["weights"].tolist()
    ((5, 6, 7), [6, 7, 2], [0.0, 1.0, 1.0])
    """

    tokens: tuple[int, ...]
    """T ids that the model reads."""
    inputs: Mapping[str, Array]
    """[T] each: `target_tokens` int64, the others float32."""

    @classmethod
    def of(cls, tokens: Sequence[int], **inputs: Sequence[int] | Sequence[float] | Array) -> Datum:
        """From lists.

        Args:
            tokens: that the model reads.
            **inputs: of the loss, by name.
        """
        arrays = {
            name: np.asarray(values, dtype=np.int64 if name == TARGETS else np.float32)
            for name, values in inputs.items()
        }
        return cls(tuple(int(token) for token in tokens), arrays)

    @classmethod
    def shifted(cls, token_ids: Sequence[int], **inputs: Sequence[float] | Array) -> Datum:
        """From a whole sequence: each token but the last predicts the one behind it.

        Args:
            token_ids: the sequence.
            **inputs: of each token; that of the first token is left out, since nothing predicts it.
        """
        later = {name: np.asarray(values, dtype=np.float32)[1:] for name, values in inputs.items()}
        return cls.of(token_ids[:-1], **{TARGETS: np.asarray(token_ids[1:])}, **later)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.tokens)


def check_data(data: Sequence[Datum], inputs: LossInputsOf, loss: str, *, vocab: int, window: int) -> None:
    """Refuse what cannot be trained on.

    Args:
        data: the examples.
        inputs: what the loss takes.
        loss: its name, for messages.
        vocab: number of token ids.
        window: most tokens of an example.

    Raises:
        DataError: an example has the wrong shape, a token that does not exist, a missing or unknown input, or a number
            that is not finite; the message names its index.
    """
    if not data:
        raise DataError("no data: send at least one datum")
    for index, datum in enumerate(data):
        where = f"datum {index}"
        if not datum.tokens:
            raise DataError(f"{where}: model_input has no tokens")
        if datum.num_tokens > window:
            raise DataError(f"{where}: {datum.num_tokens:,} tokens, the model reads at most {window:,}")
        missing, unknown = (
            inputs.required - datum.inputs.keys(),
            datum.inputs.keys() - inputs.required - inputs.optional,
        )
        if missing:
            raise DataError(f"{where}: {loss} needs loss_fn_inputs {', '.join(sorted(missing))}")
        if unknown:
            raise DataError(
                f"{where}: {loss} does not take {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(sorted(inputs.required | inputs.optional))}"
            )
        _check_tokens(where, "model_input", np.asarray(datum.tokens, dtype=np.int64), vocab)
        for name, values in datum.inputs.items():
            if values.shape != (datum.num_tokens,):
                raise DataError(
                    f"{where}: {name} has shape {list(values.shape)}, and model_input {datum.num_tokens} tokens"
                )
            if name == TARGETS:
                _check_tokens(where, name, values, vocab)
            elif not np.isfinite(values).all():
                raise DataError(f"{where}: {name}[{int(np.flatnonzero(~np.isfinite(values))[0])}] is not finite")
            elif name == RATIO_MASK and not values.any():
                raise DataError(f"{where}: {name} marks no token; mark those that were sampled with 1")


def _check_tokens(where: str, name: str, ids: Array, vocab: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab))
    if len(bad):
        raise DataError(f"{where}: {name}[{bad[0]}] is {ids[bad[0]]}; the model has the tokens 0 to {vocab - 1:,}")


def loss_inputs_of(loss: str) -> LossInputsOf:
    """What a loss takes.

    Raises:
        UserError: there is no loss of this name.
    """
    if loss not in LOSS_INPUTS:
        raise UserError(
            f"loss_fn {loss!r} is not one of {', '.join(LOSS_INPUTS)}; any other runs as a custom loss, in the client"
        )
    return LOSS_INPUTS[loss]


def config_of(loss: str, given: Mapping[str, float | str] | None) -> dict[str, float]:
    """The numbers of a loss: what was given over the defaults.

    Raises:
        UserError: one is unknown, or no finite number.
    """
    defaults = loss_inputs_of(loss).config
    for name, value in (given or {}).items():
        if name not in defaults:
            takes = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
            raise UserError(f"loss_fn_config: {loss} does not take {name}; {takes}")
        if isinstance(value, str) or not np.isfinite(value):
            raise UserError(f"loss_fn_config: {name} = {value!r} is not a finite number")
    return {**defaults, **{name: float(value) for name, value in (given or {}).items()}}
