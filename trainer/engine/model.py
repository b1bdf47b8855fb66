"""The base model of the engine: from the tokens of a step to logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.config.recipe import ModelSettings
from trainer.engine.adapters import AdapterVersion, RoutedLinear, Routing, load_adapter
from trainer.engine.attention import Segment, StepAttention
from trainer.engine.pages import PagePool
from trainer.errors import ModelError
from trainer.model.base_model import load_base, logit_transform
from trainer.sampling.fused import FAMILIES, FusedLayers, is_fusible


@final
@dataclass(frozen=True)
class StepRow:
    """Tokens of one sequence in a step."""

    token_ids: Sequence[int]
    segment: Segment
    adapter: AdapterVersion | None
    wanted: Sequence[int]
    """Indices of its tokens whose logits are needed."""
    owner: object = None
    """The sequence, for models that keep a state of each instead of pages."""


@final
class EngineModel:
    """A base model with plain layers, on a CPU."""

    is_paged: Final = True
    """Keys and values are in the pages of a sequence: prefixes are shared, and tokens can be taken back."""
    note: Final = ""

    def __init__(self, settings: ModelSettings, max_rank: int, causal_lm: PreTrainedModel | None = None) -> None:
        """Load it.

        Args:
            settings: path, revision, dtype.
            max_rank: the highest rank of an adapter.
            causal_lm: what was loaded by these settings already.

        Raises:
            ModelError: it cannot be loaded, or is of a family that has no paged attention here.
        """
        causal_lm = causal_lm or load_base(settings, torch.device("cpu"))
        if not is_fusible(causal_lm):
            raise ModelError(
                f"{settings.path}: paged attention is for {', '.join(sorted(FAMILIES))} with plain layers, not "
                f"{causal_lm.config.model_type}"
            )
        self.form = logit_transform(causal_lm)
        self.max_rank = max_rank
        self._names = {id(module): name for name, module in causal_lm.named_modules()}
        self._routing = Routing()
        self._linears: list[RoutedLinear] = []
        self._layers = FusedLayers(causal_lm, self._linear)
        self._layers.refresh()
        config: Any = causal_lm.config
        self.dtype = causal_lm.dtype
        self.window = int(config.max_position_embeddings)
        self.vocab_size = int(causal_lm.get_output_embeddings().weight.shape[0])

    def _linear(self, sources: Sequence[nn.Module]) -> RoutedLinear:
        names = [self._names[id(source)] for source in sources]
        self._linears.append(RoutedLinear(sources, len(self._linears), names, self._routing))
        return self._linears[-1]

    @property
    def page_bytes(self) -> int:
        """Memory of one page of all layers."""
        pool = self.pool(1)
        return sum(part.nbytes for part in (*pool.keys, *pool.values))

    def pool(self, num_pages: int) -> PagePool:
        """An empty store of keys and values."""
        layers = self._layers
        return PagePool(len(layers.layers), layers.num_kv_heads, layers.head_width, num_pages, self.dtype)

    def adapter(self, name: str, directory: Path) -> AdapterVersion:
        """Load an adapter; may run in another thread than the steps.

        Raises:
            ModelError: it cannot be served, with the reason.
        """
        return load_adapter(name, directory, self._linears, self.max_rank, self._linears[0].number)

    def forget(self, owner: object) -> None:
        """Nothing to do: what is stored of a sequence is in its pages."""

    @torch.inference_mode()
    def step(self, pool: PagePool, rows: Sequence[StepRow]) -> torch.Tensor:
        """[W, V] raw head outputs of the wanted tokens, in the order of the rows; fills the store.

        Args:
            pool: the store.
            rows: those of one adapter stand together.
        """
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        start = 0
        groups: list[tuple[slice, AdapterVersion]] = []
        for row in rows:
            count = row.segment.count
            ids += row.token_ids
            positions += range(row.segment.first, row.segment.end)
            wanted += [start + index for index in row.wanted]
            if row.adapter is not None:
                if groups and groups[-1][1] is row.adapter:
                    groups[-1] = (slice(groups[-1][0].start, start + count), row.adapter)
                else:
                    groups.append((slice(start, start + count), row.adapter))
            start += count
        self._routing.groups = groups
        attention = StepAttention(pool, [row.segment for row in rows])
        hidden = self._layers.hidden(torch.tensor(ids), torch.tensor(positions), attention)
        self._routing.groups = []
        if len(wanted) < len(ids):
            hidden = hidden[wanted]
        return self._layers.head(hidden)
