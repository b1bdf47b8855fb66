"""The policy's model in the form that decodes fastest, beside the one that learns.

A structural copy of the model shares every tensor with the policy; only its linear layers are replaced. Such a layer
computes W x + s B (A x) by itself, without the bookkeeping of a PEFT layer. The adapter is not merged: a bf16 sum W + s BA
rounds small adapters away, so the sampler would draw from the base while the policy has already moved (docs/log.md).

On a CPU with bf16 products, W is also kept in the order that its kernels read: one more copy of the linear weights.
"""

from __future__ import annotations

import copy
from typing import Any, final

import peft
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from trainer.errors import ModelError
from trainer.policy import Policy


@final
class DecodingLinear(nn.Module):
    """A linear layer and its adapter, for reading only."""

    def __init__(self, base: nn.Linear, adapter: peft.tuners.lora.Linear | None, *, is_packed: bool) -> None:
        """Stand in for a layer; `refresh` before the first use."""
        super().__init__()
        # in tuples, so that they are no parameters of this module: they belong to the policy
        self._sources = (base, adapter)
        self._is_packed = is_packed
        self._is_frozen = not base.weight.requires_grad
        self._weight: torch.Tensor | None = None
        self._down = self._up = None

    def refresh(self) -> None:
        """Take the policy's present weights."""
        base, adapter = self._sources
        if self._weight is None or not self._is_frozen:
            self._weight = _packed(base.weight) if self._is_packed else base.weight.detach()
        if adapter is not None:
            name = adapter.active_adapters[0]
            self._down = adapter.lora_A[name].weight.detach().clone()
            self._up = adapter.lora_B[name].weight * adapter.scaling[name]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """W x + b + s B (A x); the adapter's products in its own float32, as PEFT has them."""
        bias = self._sources[0].bias
        delta = None
        if self._down is not None:
            delta = linear(linear(inputs.to(self._down.dtype), self._down), self._up).to(inputs.dtype)
        if not self._is_packed:
            out = linear(inputs, self._weight, bias)
            return out if delta is None else out + delta
        pointwise = torch.ops.mkldnn._linear_pointwise
        if delta is None:
            return pointwise(inputs, self._weight, bias, "none", [], "")
        return pointwise.binary(inputs, delta, self._weight, bias, "add")


@final
class Decoder:
    """Backbone and head that read the policy's weights as they were last taken."""

    def __init__(self, policy: Policy) -> None:
        """Copy the structure, not the weights.

        Raises:
            ModelError: the weights are sharded over ranks.
        """
        source = policy.causal_lm
        if any(isinstance(parameter, DTensor) for parameter in source.parameters()):
            raise ModelError("a sharded model cannot be sampled in process; set rollout.sampler to vllm")
        shared = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
        self.causal_lm: PreTrainedModel = copy.deepcopy(source, shared)
        weight = source.get_output_embeddings().weight
        is_packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_bf16_products()
        self._linears: list[DecodingLinear] = []
        self._replace(self.causal_lm, is_packed)
        self.causal_lm.eval()

    def refresh(self) -> None:
        """Take the policy's present weights."""
        for layer in self._linears:
            layer.refresh()

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, layout: Any) -> torch.Tensor:
        """[T, H] last hidden states of a pack."""
        output = self.causal_lm.base_model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, packed=layout
        )
        return output.last_hidden_state[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] products with the head, before scale, soft cap and temperature."""
        return self.causal_lm.get_output_embeddings()(hidden)

    def _replace(self, module: nn.Module, is_packed: bool) -> None:
        for name, child in module.named_children():
            base, adapter = child, None
            if isinstance(child, peft.tuners.lora.Linear) and _is_plain(child):
                base, adapter = child.get_base_layer(), child
            if type(base) is nn.Linear:
                layer = DecodingLinear(base, adapter, is_packed=is_packed)
                setattr(module, name, layer)
                self._linears.append(layer)
            else:
                self._replace(child, is_packed)


def _is_plain(layer: peft.tuners.lora.Linear) -> bool:
    """Whether the layer computes W x + s B (A x) in evaluation; others (DoRA, say) are kept as they are."""
    names = layer.active_adapters
    return len(names) == 1 and names[0] not in layer.lora_variant and not layer.lora_bias[names[0]]


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _has_bf16_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
