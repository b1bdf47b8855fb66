"""The engine's fallback: a model's own forward pass and cache, one sequence after another. Slow, and for every model.

It runs what has no paged attention here: recurrent states and convolutions, mixtures, quantized layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from trainer.config.recipe import ModelSettings
from trainer.engine.adapters import AdapterVersion, Routing, load_adapter
from trainer.engine.model import EngineModel, StepRow
from trainer.engine.pages import PAGE, PagePool
from trainer.errors import ModelError
from trainer.model.base_model import load_base, logit_transform
from trainer.model.own_forward import TOLERANCE, UNFIT, OwnForward, cannot_run_alone, use_own_attention
from trainer.sampling.fused import is_fusible

TRIAL: Final = (9, 4)
"""Tokens of the trial's prompt, and those that are added one by one."""
UNBOUNDED: Final = 1 << 20
"""Window of a model whose configuration names none (recurrent ones); the budget of tokens limits requests."""


def open_model(settings: ModelSettings, max_rank: int) -> EngineModel | OwnModel:
    """Load a base model: with paged attention where its family has it, else with its own forward pass.

    Args:
        settings: path, revision, dtype, quantization.
        max_rank: the highest rank of an adapter.

    Raises:
        ModelError: it cannot be loaded.
    """
    causal_lm = load_base(settings, torch.device("cpu"))
    if settings.quantization is None and is_fusible(causal_lm):
        return EngineModel(settings, max_rank, causal_lm)
    return OwnModel(settings, max_rank, causal_lm)


@final
class HookedLinear:
    """A linear layer of the model, whose outputs get s B (A x) of the adapter that the present row has."""

    def __init__(self, module: nn.Linear, number: int, name: str, routing: Routing, dtype: torch.dtype) -> None:
        """Hook the layer.

        Args:
            module: the layer; it may hold quantized weights.
            number: of this product in the model.
            name: of the layer in the model.
            routing: of the present row.
            dtype: of the model's hidden states.
        """
        self.number, self._routing, self._dtype = number, routing, dtype
        self.names: tuple[str, ...] = (name,)
        self.inputs = module.in_features
        self.outputs: tuple[int, ...] = (module.out_features,)
        module.register_forward_hook(self._add)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's hidden states."""
        return self._dtype

    def packed(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix itself."""
        return matrix

    def _add(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        for _, adapter in self._routing.groups:
            pair = adapter.products.get(self.number)
            if pair is not None:
                down, up = pair
                added: torch.Tensor = (inputs[0].to(self._dtype) @ down.T) @ up.T
                return output + added.to(output.dtype)
        return None


@final
class OwnModel:
    """A base model that computes each sequence by itself, with the cache of transformers where that is right."""

    is_paged: Final = False
    """Its cache cannot be cut or joined: a prompt is read in one pass, no prefix is shared, nothing is proposed."""

    def __init__(self, settings: ModelSettings, max_rank: int, causal_lm: PreTrainedModel) -> None:
        """Hook its layers, and find out by a trial whether its cache can be used.

        Args:
            settings: by which it was loaded.
            max_rank: the highest rank of an adapter.
            causal_lm: the model.

        Raises:
            ModelError: the model cannot run tokens alone, tokens depend on later ones, or the configuration has a scale
                of logits that transformers leaves out.
        """
        use_own_attention(causal_lm)
        self._causal_lm: Any = causal_lm
        self.form = logit_transform(causal_lm)
        self.max_rank, self.dtype = max_rank, getattr(torch, settings.compute_dtype)
        self._routing = Routing()
        named = [(name, each) for name, each in causal_lm.named_modules() if isinstance(each, nn.Linear)]
        self._linears = [
            HookedLinear(module, number, name, self._routing, self.dtype) for number, (name, module) in enumerate(named)
        ]
        head = causal_lm.get_output_embeddings()
        self._head_number = next((number for number, (_, module) in enumerate(named) if module is head), None)
        text: Any = causal_lm.config.get_text_config()
        self.window = int(getattr(text, "max_position_embeddings", None) or UNBOUNDED)
        self.vocab_size = int(getattr(head, "out_features", None) or head.weight.shape[0])
        self._read: dict[object, _State] = {}
        self.page_bytes, problem = self._try_cache(self._checked_logprobs())
        self._forward = OwnForward(causal_lm, is_cached=problem is None)
        way = "with its own cache" if problem is None else f"with a pass over all tokens for each one ({problem})"
        kind = "quantized layers" if settings.quantization is not None else causal_lm.config.model_type
        self.note = f"{kind}: served by the model's own forward pass, one sequence after another, {way}: slow"

    def pool(self, num_pages: int) -> PagePool:
        """Pages that are counted and hold nothing: the budget of tokens."""
        return PagePool(0, 0, 0, num_pages, self.dtype)

    def adapter(self, name: str, directory: Path) -> AdapterVersion:
        """Load an adapter; may run in another thread than the steps.

        Raises:
            ModelError: it cannot be served, with the reason.
        """
        return load_adapter(name, directory, self._linears, self.max_rank, self._head_number)

    def forget(self, owner: object) -> None:
        """Free the state of a sequence that has ended, or waits again."""
        self._read.pop(owner, None)

    @torch.inference_mode()
    def step(self, pool: PagePool, rows: Sequence[StepRow]) -> torch.Tensor:
        """[W, V] raw head outputs of the wanted tokens, in the order of the rows.

        Args:
            pool: counts tokens, and holds nothing.
            rows: of each sequence all tokens that are new; at first the whole prompt.
        """
        outputs = []
        for row in rows:
            if row.segment.first == 0:
                self._read[row.owner] = _State()
            self._routing.groups = [] if row.adapter is None else [(slice(0, row.segment.count), row.adapter)]
            hidden = self._read[row.owner].add(self._forward, row.token_ids)
            if len(row.wanted):
                outputs.append(self._causal_lm.get_output_embeddings()(hidden[list(row.wanted)]))
        self._routing.groups = []
        return torch.cat(outputs) if outputs else torch.empty(0, self.vocab_size)

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[L, V] of the base, by one pass over all tokens without a cache.

        Args:
            token_ids: L of them.
        """
        return self._logprobs(_State().add(OwnForward(self._causal_lm, is_cached=False), token_ids))

    def _checked_logprobs(self) -> torch.Tensor:
        """[L, V] logprobs of the trial's tokens.

        Raises:
            ModelError: the model cannot run tokens alone, or tokens depend on later ones.
        """
        ids, name = self._trial_ids(), type(self._causal_lm).__name__
        try:
            whole, begin = self.logprobs(ids), self.logprobs(ids[: TRIAL[0]])
        except UNFIT as error:
            raise cannot_run_alone(self._causal_lm, error) from error
        if len(whole) != len(ids):
            raise ModelError(f"{name} has no hidden state for each token: not supported")
        seen = float((whole[: TRIAL[0]] - begin).abs().mean())
        if not seen < TOLERANCE.get(self.dtype, 1e-3):
            raise ModelError(
                f"{name}: logprobs change by {seen:.3g} on average with later tokens: no causal language model"
            )
        return whole

    @torch.inference_mode()
    def _try_cache(self, whole: torch.Tensor) -> tuple[int, str | None]:
        """Bytes of a sequence for each page of tokens, and why the cache cannot be used; None where it can.

        Args:
            whole: [L, V] logprobs of the trial's tokens without it.
        """
        ids, short = self._trial_ids(), TRIAL[0]
        fallback = PAGE * 8  # token ids alone
        if any(getattr(module, "rope_type", None) == "dynamic" for module in self._causal_lm.modules()):
            return fallback, "its rotary factors change with the length"
        forward, state, paged = OwnForward(self._causal_lm, is_cached=True), _State(), _State()
        try:
            parts = [state.add(forward, ids[:short]), *(state.add(forward, [token]) for token in ids[short:])]
            paged.add(forward, [ids[0]] * (2 * PAGE))
        except UNFIT as error:
            return fallback, f"its cache cannot be used: {(str(error).splitlines() or [type(error).__name__])[0]}"
        difference = float((self._logprobs(torch.cat(parts)) - whole).abs().mean())
        if not difference < TOLERANCE.get(self.dtype, 1e-3):
            return fallback, f"with its cache logprobs differ by {difference:.2g} on average"
        return math.ceil(sum(each.nbytes for each in _tensors(paged.cache, set())) / 2), None

    def _trial_ids(self) -> list[int]:
        step = max(1, self.vocab_size // (sum(TRIAL) + 2))
        return [(1 + index) * step % self.vocab_size for index in range(sum(TRIAL))]

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V], of the raw outputs of the head."""
        logits: torch.Tensor = self._causal_lm.get_output_embeddings()(hidden)
        return logits.float().log_softmax(-1)


@final
class _State:
    """What was read of a sequence: its cache, or its token ids where there is none."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.cache: Cache | None = None

    def add(self, forward: OwnForward, new: Sequence[int]) -> torch.Tensor:
        """[n, H] hidden states of n new tokens.

        Args:
            forward: of the model.
            new: the tokens.
        """
        ids = list(new)
        if not forward.is_cached:
            self.token_ids += new
            ids = self.token_ids
        hidden, self.cache = forward(torch.tensor([ids]), self.cache)
        return hidden[0, -len(new) :]


def _tensors(part: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor of a cache, once."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict):
        for each in part.values():
            yield from _tensors(each, seen)
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from _tensors(each, seen)
    elif type(part).__module__.startswith("transformers.") and hasattr(part, "__dict__"):
        yield from _tensors(vars(part), seen)
