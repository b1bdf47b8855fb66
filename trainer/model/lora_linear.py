"""The LoRA linear layer: PEFT's, with the fused product of lora_product.py in front.

PEFT creates the layer and owns its parameters. Its own forward runs where the formula differs (DoRA, dropout while
training) and where the adapter is merged or disabled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, final

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from trainer.errors import ModelError
from trainer.model.batch import TokenOwners
from trainer.model.lora_product import LoraProduct, Part, RoutedLoraProduct, compiled_lora_product


@final
class Routing:
    """The token owners of the pack that is in the model; shared by the policy and its LoRA layers."""

    def __init__(self) -> None:
        """Start without owners: all tokens use the active adapter."""
        self.owners: TokenOwners | None = None

    @contextmanager
    def of(self, owners: TokenOwners | None) -> Iterator[None]:
        """Route the tokens of a forward pass within the block."""
        previous, self.owners = self.owners, owners
        try:
            yield
        finally:
            self.owners = previous

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of gradient checkpointing: recomputation, in the backward pass, routes as forward did."""
        return nullcontext(), self.of(self.owners)


class Group(Protocol):
    """Layers with the same input that compute their products together: `lora_group.ProductGroup`."""

    members: tuple[FusedLinear, ...]

    def output_of(self, index: int, x: torch.Tensor, name: str) -> torch.Tensor:
        """The output of a layer."""


@final
class FusedLinear(PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer with the fused product in front."""

    routing: Routing | None = None
    """Set by `Adapters`; None outside a policy."""
    group: Group | None = None
    """Used in compiled layers; None: the layer computes its own product."""
    group_index: int = 0
    """Number of the layer in its group."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """W x + b + scaling * B A x of [..., in].

        Raises:
            ModelError: a pack has several owners, and the layer or one of their adapters does not support it.
        """
        if self.routing is not None and self.routing.owners is not None and not self.disable_adapters:
            return self._routed(x, self.routing.owners)
        name, base = self.plain_adapter(), self.base_layer
        if args or kwargs or name is None:
            return super().forward(x, *args, **kwargs)
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and self.group is not None and all(each._is_plain(name) for each in self.group.members):
            return self.group.output_of(self.group_index, x, name)
        product = compiled_lora_product if is_compiling else LoraProduct.apply
        return product(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )

    def _routed(self, x: torch.Tensor, owners: TokenOwners) -> torch.Tensor:
        if x.numel() != owners.num_tokens * x.shape[-1]:
            raise ModelError(
                f"a layer gets {x.numel() // x.shape[-1]} of the pack's {owners.num_tokens} tokens: layers that see "
                "only a part of the pack, such as experts, do not support packs of several adapters"
            )
        parts, tensors = [], []
        for name, rows in owners.rows.items():
            if name in self.lora_A:
                if not self._is_plain(name):
                    raise ModelError(f"adapter {name}: DoRA and dropout are not supported in packs of several adapters")
                parts.append(Part(rows, self.scaling[name]))
                tensors += [self.lora_A[name].weight, self.lora_B[name].weight]
        base = self.base_layer
        output: torch.Tensor = RoutedLoraProduct.apply(x, base.weight, base.bias, parts, *tensors)  # type: ignore[no-untyped-call]
        return output

    def plain_adapter(self) -> str | None:
        """The adapter that all tokens use, if it computes the formula above at present."""
        names = self.active_adapters
        is_routed = self.routing is not None and self.routing.owners is not None
        return names[0] if not is_routed and len(names) == 1 and self._is_plain(names[0]) else None

    def _is_plain(self, name: str) -> bool:
        """Whether this adapter computes the formula above at present."""
        return (
            name in self.lora_A
            and not self.disable_adapters
            and not self.merged
            and name not in self.lora_variant
            and (isinstance(self.lora_dropout[name], nn.Identity) or not self.training)
            and not self.base_layer.weight.requires_grad
            and self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
        )


def use_fused_linear(config: peft.LoraConfig) -> None:
    """Let PEFT create the fused layer for every plain linear layer."""
    config._register_custom_module({nn.Linear: FusedLinear})
