"""Compiles the decoder layers of a policy on a GPU; for policy.py only.

A compiled layer receives tensors and block masks (flex.py) instead of the pack's layout, so that packs of any length
use one compiled graph. Packs are padded to a multiple of a mask block: only kernels for whole blocks are needed. The
first forward pass runs the layers uncompiled. It shows which kinds of attention the layers have and which adapted
layers read the same input (lora_group.py), and every refusal of a model that packed attention does not support is made
there.

What is compiled is a layer's `forward`: hooks of the layer run before and behind it. In a sharded policy those are
FSDP's, which gather the layer's parameters and free them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any, Final, final

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.config.recipe import LoraSettings
from trainer.distributed.sharding import layers_of
from trainer.errors import ModelError
from trainer.model.base_model import has_experts
from trainer.model.batch import Batch, padding_of
from trainer.model.flash_choice import uses_flash
from trainer.model.flex import FlexLayout, prepare_compiler
from trainer.model.layout import PackedLayout
from trainer.model.lora_group import GroupSearch, ProductGroup
from trainer.model.lora_mlp import GatedLayer, find_gated

KEPT: Final = frozenset(
    {"trainer.lora_product.default", "trainer.lora_group.default", "trainer.lora_mlp.default", "flex_attention"}
    | {"trainer.flash_attention.default", "aten.mm.default", "aten.addmm.default"}
)
"""Operators whose results selective checkpointing keeps: products and attention."""
CHECKPOINTING: Final = "forward_with_checkpointing"
"""Name of the function that transformers wraps around a layer's forward; it chooses whether to recompute it."""


@final
class CompiledLayers:
    """The decoder layers of a model, compiled for packs of one adapter."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        backend: str | Callable[..., Any] = "inductor",
        *,
        is_selective: bool = False,
        flash_attention: bool = True,
    ) -> None:
        """Prepare the layers; they are compiled when they first receive a `FlexLayout`.

        Args:
            causal_lm: with packed attention.
            backend: of torch.compile.
            is_selective: recompute everything but products and attention in the backward pass.
            flash_attention: use FlashAttention-4 where `uses_flash` says so.
        """
        prepare_compiler()
        # Otherwise sizes such as `head_dim` would be constants in whole layers only, and inputs in sharded ones.
        torch._dynamo.config.skip_fsdp_guards = False
        self.is_selective, self.flash_attention = is_selective, flash_attention
        self.layers: list[Any] = layers_of(causal_lm, causal_lm._no_split_modules or ())
        self.problem: str | None = None
        """Why the layers run uncompiled all the same; None: they are compiled."""
        self._first: PackedLayout | None = None
        self._search: GroupSearch | None = GroupSearch(self.layers)
        self.groups: list[ProductGroup] = []
        """Layers whose products are computed together."""
        self.gated: list[GatedLayer] = []
        """Those that are one operator with the layer behind them."""
        for layer in self.layers:
            layer.forward = _Forward(self, layer, backend)
        self._hook = causal_lm.get_input_embeddings().register_forward_hook(_with_gradient)

    def input_of(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, PackedLayout | FlexLayout]:
        """Token ids [T], positions [T] and the layout that the layers receive; T is padded for compiled layers.

        Args:
            batch: the pack.

        Raises:
            ModelError: a sequence is longer than the window of a layer that does not pass it to attention.
        """
        if self._first is None or batch.owners is not None:
            self._first = self._first or batch.layout
            return batch.token_ids, batch.positions, batch.layout
        if self._search is not None:
            self.groups, self._search = self._search.finish(), None
            self.gated = find_gated(self.layers, self.groups)
            self.flash_attention = self.flash_attention and uses_flash(self._first.kinds, batch.token_ids.device)
        for window in self._first.hidden_windows:
            if batch.layout.max_len > window:
                raise ModelError(
                    f"the layers do not pass their window of {window:,} tokens to attention: longer sequences cannot "
                    f"be trained; set data.max_seq_tokens to {window}"
                )
        padding = padding_of(batch.num_tokens)  # 0 for packs made for a GPU
        ids, positions = (nn.functional.pad(row, (0, padding)) for row in (batch.token_ids, batch.positions))
        return ids, positions, FlexLayout.of(batch.layout, self._first.kinds, padding, uses_flash=self.flash_attention)

    def remove(self) -> None:
        """Run the layers uncompiled from now on."""
        self._hook.remove()
        if self._search is not None:
            self._search.cancel()
        for gated in self.gated:
            gated.dissolve()
        for group in self.groups:
            group.dissolve()
        for layer in self.layers:
            del layer.forward


@final
class _Forward:
    """A layer's forward: compiled where it receives a `FlexLayout`, as it is elsewhere, such as for sampling."""

    def __init__(self, owner: CompiledLayers, layer: Any, backend: str | Callable[..., Any]) -> None:
        forward = type(layer).forward
        self._is_wrapped = False
        while forward.__code__.co_name == CHECKPOINTING:
            forward, self._is_wrapped = forward.__wrapped__, True
        inner = MethodType(forward, layer)
        self._owner, self._layer = owner, layer
        self._compiled = torch.compile(
            partial(_selectively, inner) if owner.is_selective else inner,
            fullgraph=True,
            dynamic=True,
            backend=backend,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, layer = self._owner, self._layer
        if owner.problem is not None or not isinstance(kwargs.get("packed"), FlexLayout):
            return type(layer).forward(layer, *args, **kwargs)
        try:
            if self._is_wrapped and layer.gradient_checkpointing and layer.training and not owner.is_selective:
                return layer._gradient_checkpointing_func(partial(self._compiled, **kwargs), *args)
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            owner.problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            warnings.warn(f"decoder layers run uncompiled, which is slower: {owner.problem}", stacklevel=2)
            return type(layer).forward(layer, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the layer, such as a decoder's, runs as it is."""
        return MethodType(type(self._layer).forward, deepcopy(self._layer, memo))


def _selectively(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, of which the backward pass has the results of `KEPT` and recomputes all others."""
    context_fn = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(partial(inner, **kwargs), *args, use_reentrant=False, context_fn=context_fn)


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _with_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Embeddings that require a gradient even if they are frozen: the first layer would be compiled apart."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def is_compilable(causal_lm: PreTrainedModel, lora: LoraSettings | None) -> bool:
    """Whether the layers are of a kind that compiles to one graph: no experts, 4-bit weights, dropout or DoRA.

    Args:
        causal_lm: the model.
        lora: its adapter, or None.
    """
    is_plain = lora is None or (lora.dropout == 0 and not lora.dora)
    return is_plain and not has_experts(causal_lm) and not getattr(causal_lm, "is_quantized", False)
