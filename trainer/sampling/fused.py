"""Decodes common model families with a third of the operations of their own modules.

Decoding one token of a small model takes a few hundred small operations, and launching them costs more than computing
them. Here a layer is
    h = h + O attend(rope(norm(QKV norm(h)))),   h = h + down(silu(gate) * up),   [gate, up] = GU norm(h)
with one product for Q, K, V, one for gate, up, and the additions fused into the products. The linear weights are
copied, so this is used on CPUs only, where memory is cheap; the copy has the layout that the kernels read fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, final

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from trainer.model.attention import packed_attention
from trainer.model.layout import CachedLayout
from trainer.model.turn_cache import TurnCache
from trainer.sampling.decoder import DecodingLinear, is_plain_linear
from trainer.sampling.rows import PackedRows, Rows

if TYPE_CHECKING:
    from trainer.model.policy import Policy

FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose layers compute the formula above; only Qwen3 has the inner norm."""


class Linear(Protocol):
    """Linear layers with one common input."""

    def refresh(self) -> None:
        """Take the model's current weights."""

    def __call__(self, inputs: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, out] W x + b + added, with what adapters add."""


@final
@dataclass(frozen=True)
class FusedLayer:
    """One layer of the formula above."""

    index: int
    attention: nn.Module
    """The model's own module, which identifies the layer."""
    scaling: float
    window: int | None
    norms: tuple[nn.Module, nn.Module]
    """Before attention, and before the MLP."""
    inner_norms: tuple[nn.Module, nn.Module] | None
    """Of each head's query, and of its key."""
    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


Attend: TypeAlias = Callable[[FusedLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""[1, T, H, D] attention of a layer, from queries [1, H, T, D], keys and values [1, H_kv, T, D]."""
MakeLinear: TypeAlias = Callable[[Sequence[nn.Module]], Linear]
"""Fuses linear layers of the model that have a common input."""


@final
class FusedLayers:
    """Embedding, layers and head of a model on a CPU, with attention and linear layers of the caller's choice."""

    def __init__(self, causal_lm: PreTrainedModel, make_linear: MakeLinear) -> None:
        """Prepare the layers; `refresh` loads the weights.

        Args:
            causal_lm: a model that `is_fusible` accepts.
            make_linear: makes the linear layers, from those of the model.
        """
        self._config = causal_lm.config
        self._backbone: Any = causal_lm.base_model
        self._head = make_linear([causal_lm.get_output_embeddings()])
        self.layers = [
            _fused(index, layer, self._config, make_linear) for index, layer in enumerate(self._backbone.layers)
        ]
        self._width = int(self._backbone.layers[0].self_attn.head_dim)

    @property
    def head_width(self) -> int:
        """Components of a key."""
        return self._width

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values in each layer."""
        return int(self._config.num_key_value_heads)

    def refresh(self) -> None:
        """Take the model's current weights."""
        for layer in self.layers:
            for product in (layer.qkv, layer.output, layer.gate_up, layer.down):
                product.refresh()
        self._head.refresh()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] raw outputs of the LM head, before scale, soft cap and temperature."""
        return self._head(hidden)

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[T, H] last hidden states of a pack.

        Args:
            token_ids: [T].
            positions: [T] of each token in its sequence.
            attend: attention of a layer over the pack.
        """
        state: torch.Tensor = self._backbone.embed_tokens(token_ids)
        cos, sin = self._backbone.rotary_emb(state[None], positions[None])
        rotary = _Rotary.of(cos[0], sin[0])
        for layer in self.layers:
            state = self._layer(layer, state, rotary, attend)
        return _norm(self._backbone.norm, state)

    def _layer(self, layer: FusedLayer, state: torch.Tensor, rotary: _Rotary, attend: Attend) -> torch.Tensor:
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        joint = layer.qkv(_norm(layer.norms[0], state)).view(len(state), -1, self._width)
        query_key, value = joint[:, : heads + kv_heads], joint[:, heads + kv_heads :]
        if layer.inner_norms is not None:
            inner_query, inner_key = layer.inner_norms
            query_key = torch.cat([_norm(inner_query, query_key[:, :heads]), _norm(inner_key, query_key[:, heads:])], 1)
        query_key = rotary.apply(query_key)
        query, key, value = (part.transpose(0, 1)[None] for part in (query_key[:, :heads], query_key[:, heads:], value))
        attended = attend(layer, query, key, value)
        state = layer.output(attended.reshape(len(state), -1), added=state)
        gate, up = layer.gate_up(_norm(layer.norms[1], state)).chunk(2, -1)
        return layer.down(silu(gate).mul_(up), added=state)


@final
class FusedDecoder:
    """Decodes Llama, Mistral, Qwen2 and Qwen3 on a CPU."""

    def __init__(self, policy: Policy) -> None:
        """Prepare the layers; `refresh` loads the weights."""
        self._layers = FusedLayers(policy.causal_lm, DecodingLinear)

    def refresh(self) -> None:
        """Take the policy's current weights."""
        self._layers.refresh()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] raw outputs of the LM head, before scale, soft cap and temperature."""
        return self._layers.head(hidden)

    def start(
        self, prompts: Sequence[tuple[int, ...]], prompt_of: Sequence[int], caches: Sequence[TurnCache] | None = None
    ) -> Rows:
        """Rows that continue prompts; see `Decoder`."""
        return PackedRows(self._hidden, prompts, prompt_of, torch.device("cpu"), caches)

    def _hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, layout: CachedLayout) -> torch.Tensor:
        def attend(layer: FusedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            attended, _ = packed_attention(
                layer.attention, query, key, value, None, layer.scaling, packed=layout, sliding_window=layer.window
            )
            return attended

        return self._layers.hidden(token_ids, positions, attend)


@final
@dataclass(frozen=True)
class _Rotary:
    """Rotary embedding: x cos + (-second half, first half) sin, as x cos + swapped(x) signed_sin."""

    cos: torch.Tensor
    """[T, 1, D]."""
    signed_sin: torch.Tensor
    """[T, 1, D]: sin, with its first half negated."""

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor) -> _Rotary:
        half = sin.shape[-1] // 2
        return cls(cos[:, None], torch.cat([-sin[:, :half], sin[:, half:]], -1)[:, None])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(tensor * self.cos, tensor.roll(tensor.shape[-1] // 2, -1), self.signed_sin)


def is_fusible(causal_lm: PreTrainedModel) -> bool:
    """Whether the model is of a known family, on a CPU, with plain LoRA adapters only."""
    model: Any = causal_lm
    if model.config.model_type not in FAMILIES or model.device.type != "cpu":
        return False
    named = (module for name, module in model.named_modules() if name.endswith("_proj"))
    return all(is_plain_linear(module) for module in named) and model.config.hidden_act == "silu"


def _fused(index: int, layer: Any, config: Any, make_linear: MakeLinear) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    has_inner = config.model_type == "qwen3"
    return FusedLayer(
        index=index,
        attention=attention,
        scaling=attention.scaling,
        window=_window(attention, config),
        norms=(layer.input_layernorm, layer.post_attention_layernorm),
        inner_norms=(attention.q_norm, attention.k_norm) if has_inner else None,
        qkv=make_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=make_linear([attention.o_proj]),
        gate_up=make_linear([mlp.gate_proj, mlp.up_proj]),
        down=make_linear([mlp.down_proj]),
    )


def _window(attention: Any, config: Any) -> int | None:
    if config.model_type == "llama":
        return None
    window = config.sliding_window if config.model_type == "mistral" else attention.sliding_window
    return None if window is None else int(window)


def _norm(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    return rms_norm(tensor, tensor.shape[-1:], module.weight, module.variance_epsilon)
