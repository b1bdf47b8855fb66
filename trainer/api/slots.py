"""Slots for adapters on one base model, and passes in which the tokens of several slots share a pack.

A slot has an adapter and a learner of its own. A pack takes at most one micro-batch of each slot, and each micro-batch
is what the slot would run alone: logprobs and gradients are those of being alone, to the bit in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, final

import numpy as np
import torch

from trainer.algorithms import LossTerms
from trainer.api.datum import TARGETS, WEIGHTS, Array, Datum, check_data, config_of, loss_inputs_of
from trainer.api.losses import loss_terms
from trainer.config.recipe import LoraSettings, ModelSettings
from trainer.data.tokens import TokenSequence
from trainer.distributed.world import World
from trainer.errors import ModelError, NumericalError
from trainer.model.batch import Batch, fill
from trainer.model.packing_check import verify_packing
from trainer.model.policy import Policy, load_policy
from trainer.planning.identity import model_digest
from trainer.training.learner import Learner
from trainer.training.schedule import AdamParams

CustomLoss: TypeAlias = Callable[[Sequence[Datum], Sequence[torch.Tensor]], tuple[torch.Tensor, Mapping[str, float]]]
"""From the data and the [T] logprobs of each, with gradient, to a scalar and metrics."""
PLACEHOLDER: Final = LoraSettings(rank=1)
"""The adapter that PEFT cannot be without; no token belongs to it."""
WINDOWS: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
"""Names that models give to the most tokens they read."""
UNLIMITED: Final = 1 << 20


@final
@dataclass(frozen=True)
class Passed:
    """What a forward pass returns."""

    logprobs: list[Array]
    """[T] float32 of each datum's targets, under the weights before any update."""
    losses: list[Array]
    """[T] float32: the terms whose sum is the loss."""
    metrics: dict[str, float]
    """`loss:sum`, `tokens:sum`, and what the loss measures; a name ends with how parts are reduced."""


@final
@dataclass(frozen=True)
class MicroBatch:
    """Data of one slot that go through the model together."""

    slot: Slot
    data: tuple[Datum, ...]
    loss: str
    config: Mapping[str, float]

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(datum.num_tokens for datum in self.data)


@final
class Base:
    """A frozen base model and its slots."""

    def __init__(self, model: ModelSettings, device: torch.device, *, micro_batch_tokens: int) -> None:
        """Load the model.

        Args:
            model: path, dtype and so on; layers are not compiled, because packs of several adapters are not.
            device: where it goes.
            micro_batch_tokens: most tokens of a pack, unless one datum is longer.

        Raises:
            ModelError: it cannot be loaded, or adapters on it cannot be trained.
        """
        self.settings = model.model_copy(update={"compile_layers": False})
        self.policy: Policy = load_policy(self.settings, PLACEHOLDER, 0, device)
        verify_packing(self.policy, device)
        self.world = World(0, 1, device)
        self.device, self.digest = device, model_digest(model.path)
        self.micro_batch_tokens = self.policy.pack_limit(micro_batch_tokens)
        config = self.policy.config
        self.window = min([int(config[name]) for name in WINDOWS if config.get(name)] or [UNLIMITED])
        self.vocab = self.policy.vocab_size
        self.slots: dict[str, Slot] = {}
        self._number = 0

    def open(self, lora: LoraSettings, seed: int) -> Slot:
        """A slot with a new adapter, which computes zero until it is trained.

        Args:
            lora: rank, targets and so on.
            seed: of the initial values.

        Raises:
            ModelError: the adapter cannot be trained on this model, or not beside others.
        """
        if lora.dropout or lora.dora or lora.warm_start is not None:
            raise ModelError("slots of a shared base take plain LoRA: no dropout, no DoRA, no warm start")
        self._number += 1
        name = f"slot{self._number}"
        adapters = self.policy.adapters
        assert adapters is not None
        try:
            adapters.add(name, lora, seed)
        except BaseException:
            if name in adapters.names:
                adapters.remove(name)
            raise
        self.slots[name] = Slot(self, name, lora)
        return self.slots[name]

    def close(self, slot: Slot) -> None:
        """Free a slot; its weights are gone."""
        del self.slots[slot.name]
        assert self.policy.adapters is not None
        self.policy.adapters.remove(slot.name)

    def layer_names(self, part: str) -> list[str]:
        """Names of the linear layers of one part of every block, such as q_proj and o_proj.

        Args:
            part: `attn` or `mlp`, as the names of the modules around the layers say.
        """
        words = {"attn": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn")}[part]
        assert self.policy.adapters is not None
        return self.policy.adapters.layer_names(words)

    def run(self, parts: Sequence[MicroBatch], *, backward: bool) -> list[Passed]:
        """One pass over the micro-batches of several slots.

        Args:
            parts: at most one of each slot.
            backward: whether to add gradients to the slots.
        """
        data = [datum for part in parts for datum in part.data]
        names = [part.slot.name for part in parts for _ in part.data]
        batch = _pack(data, names, self.device)
        self.policy.train(backward)
        with torch.set_grad_enabled(backward):
            logprobs = self.policy(batch).logprobs
            shares = logprobs.split([part.num_tokens for part in parts])
            terms = [_terms(part, share) for part, share in zip(parts, shares, strict=True)]
            if backward:
                torch.stack([each.loss.sum() for each in terms]).sum().backward()
        self.policy.eval()
        results = [_passed(*each) for each in zip(parts, shares, terms, strict=True)]
        if backward:
            for part, result in zip(parts, results, strict=True):
                sums = {name.removesuffix(":sum"): value for name, value in result.metrics.items()}
                part.slot.learner.add_sums(sums)
        return results


@final
class Slot:
    """An adapter of the base, its gradient and its optimizer."""

    def __init__(self, base: Base, name: str, lora: LoraSettings) -> None:
        """Take an adapter that the base has; see `Base.open`."""
        self.base, self.name, self.lora = base, name, lora
        self.learner = Learner(base.policy, base.world, adapter=name)

    def micro_batches(
        self, data: Sequence[Datum], loss: str, config: Mapping[str, float | str] | None = None
    ) -> list[tuple[tuple[int, ...], MicroBatch]]:
        """The micro-batches of a request, each with the indices of its data.

        Raises:
            UserError: there is no such loss, or the data are not what it takes.
        """
        inputs = loss_inputs_of(loss)
        numbers = config_of(loss, config)
        check_data(data, inputs, loss, vocab=self.base.vocab, window=self.base.window)
        groups = fill([datum.num_tokens for datum in data], self.base.micro_batch_tokens)
        return [
            (tuple(group), MicroBatch(self, tuple(data[index] for index in group), loss, numbers)) for group in groups
        ]

    def forward(
        self,
        data: Sequence[Datum],
        loss: str,
        config: Mapping[str, float | str] | None = None,
        *,
        backward: bool = False,
    ) -> Passed:
        """Score data; with `backward`, add the gradient of the loss to that of the next update.

        Raises:
            UserError: see `micro_batches`.
        """
        batches = self.micro_batches(data, loss, config)
        results = [(indices, self.base.run([batch], backward=backward)[0]) for indices, batch in batches]
        return joined(results)

    def custom(self, data: Sequence[Datum], loss: CustomLoss) -> Passed:
        """`forward` with `backward` for a loss of the caller's own, in two passes.

        The first pass gives the logprobs; the derivatives of the loss with respect to them are the weights of the
        second one. The loss sees all data at once, however they are packed.

        Raises:
            NumericalError: a derivative is not finite; no gradient was added.
        """
        targets = [Datum(datum.tokens, {TARGETS: datum.inputs[TARGETS]}) for datum in data if TARGETS in datum.inputs]
        if len(targets) < len(data):
            raise ModelError("a custom loss needs target_tokens in every datum")
        scored = self.forward(targets, "cross_entropy")
        leaves = [torch.from_numpy(values).requires_grad_() for values in scored.logprobs]
        value, metrics = loss(data, leaves)
        value.sum().backward()
        slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        if not all(bool(slope.isfinite().all()) for slope in slopes):
            raise NumericalError("the gradient of the custom loss is not finite; nothing was added")
        weighted = [
            Datum(datum.tokens, {**datum.inputs, WEIGHTS: (-slope).numpy()})
            for datum, slope in zip(targets, slopes, strict=True)
        ]
        surrogate = self.forward(weighted, "cross_entropy", backward=True)
        own = {"loss:sum": float(value.detach().sum()), "surrogate_loss:sum": surrogate.metrics["loss:sum"], **metrics}
        return replace(surrogate, metrics={**surrogate.metrics, **own})

    def optim_step(self, adam: AdamParams) -> dict[str, float]:
        """Update the weights from the gradient so far, which is cleared.

        Raises:
            NumericalError: loss or gradient is not finite; nothing was updated, and the gradient is cleared.
        """
        update = self.learner.optim_step(adam, 1.0)
        if update.metrics.get("skipped"):
            raise NumericalError("loss or gradient is not finite; nothing was updated")
        return update.metrics


def joined(parts: Sequence[tuple[Sequence[int], Passed]]) -> Passed:
    """The result of a request from those of its micro-batches, in the order of its data."""
    logprobs: dict[int, Array] = {}
    losses: dict[int, Array] = {}
    metrics: dict[str, float] = {}
    for indices, part in parts:
        logprobs.update(zip(indices, part.logprobs, strict=True))
        losses.update(zip(indices, part.losses, strict=True))
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    order = sorted(logprobs)
    return Passed([logprobs[index] for index in order], [losses[index] for index in order], metrics)


def _pack(data: Sequence[Datum], names: Sequence[str], device: torch.device) -> Batch:
    """Every position is scored, against a target that need not be the next token."""
    sequences = [
        TokenSequence(datum.tokens, (False,) * datum.num_tokens, source=str(i)) for i, datum in enumerate(data)
    ]
    batch = Batch.pack(sequences, device, adapters=names)
    targets = torch.from_numpy(np.concatenate([datum.inputs[TARGETS] for datum in data])).to(device)
    ids = _sequence_ids(data, device)
    return replace(batch, scored=torch.arange(len(targets), device=device), targets=targets, sequence_ids=ids)


def _sequence_ids(data: Sequence[Datum], device: torch.device) -> torch.Tensor:
    """[N] datum of each token of a pack."""
    lengths = torch.tensor([datum.num_tokens for datum in data])
    return torch.repeat_interleave(torch.arange(len(data)), lengths).to(device)


def _terms(part: MicroBatch, logprobs: torch.Tensor) -> LossTerms:
    inputs = {
        name: torch.from_numpy(np.concatenate([_input(datum, name) for datum in part.data])).to(logprobs.device)
        for name in {name for datum in part.data for name in datum.inputs} - {TARGETS}
    }
    return loss_terms(part.loss, logprobs, inputs, part.config, _sequence_ids(part.data, logprobs.device))


def _input(datum: Datum, name: str) -> Array:
    """One input of a datum; only weights are optional, and 1 where they are left out."""
    values = datum.inputs.get(name)
    return np.ones(datum.num_tokens, dtype=np.float32) if values is None else values


def _passed(part: MicroBatch, logprobs: torch.Tensor, terms: LossTerms) -> Passed:
    cuts = np.cumsum([datum.num_tokens for datum in part.data])[:-1]
    sums = {
        "loss:sum": terms.loss.detach().sum(),
        **{f"{name}:sum": each.sum() for name, each in terms.metrics.items()},
    }
    return Passed(
        np.split(logprobs.detach().float().cpu().numpy(), cuts),
        np.split(terms.loss.detach().float().cpu().numpy(), cuts),
        {**{name: float(value) for name, value in sums.items()}, "tokens:sum": float(len(logprobs))},
    )
