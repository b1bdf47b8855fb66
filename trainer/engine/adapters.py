"""Adapters of the engine: versions that are loaded aside, and linear layers that route each row to its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from trainer.errors import ModelError
from trainer.sampling.decoder import DecodingLinear

TENSOR: Final = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
"""Names of an adapter's tensors as PEFT writes them."""
PLAIN: Final = {"bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
"""Fields of adapter_config.json that must be absent, empty or this."""


@final
@dataclass(frozen=True)
class AdapterVersion:
    """The weights of an adapter as they were at one load; requests keep the version that they began with."""

    name: str
    digest: bytes
    """SHA-256 of its files."""
    rank: int
    products: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    """Of each adapted linear layer, by its number: A as [r, in] and s B as [out, r], in the layout of the kernels."""

    @property
    def label(self) -> str:
        """Name and the first digits of the digest."""
        return f"{self.name}@{self.digest.hex()[:12]}"


@final
class Routing:
    """Which rows of the present step belong to which adapter."""

    def __init__(self) -> None:
        """Begin with base rows only."""
        self.groups: list[tuple[slice, AdapterVersion]] = []


class Adapted(Protocol):
    """Linear layers with one common input, as a model computes them."""

    number: int
    """Of this product in the model."""
    names: tuple[str, ...]
    """Of the layers in the model."""
    inputs: int
    outputs: tuple[int, ...]
    """Of each layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's matrices."""

    def packed(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix in the layout of the kernels."""


@final
class RoutedLinear:
    """Linear layers with one common input: W x + b + added for all rows, and s B (A x) for the rows of an adapter.

    Rows of the base are not touched by the adapters of other rows, so their bits are those of a batch without adapters.
    """

    def __init__(self, sources: Sequence[nn.Module], number: int, names: Sequence[str], routing: Routing) -> None:
        """Fuse layers of the base model.

        Args:
            sources: plain linear layers.
            number: of this product in the model.
            names: of the layers in the model.
            routing: of the present step.
        """
        self.base = DecodingLinear(sources)
        self.number, self.names, self._routing = number, tuple(names), routing
        linear: list[nn.Linear] = [source for source in sources if isinstance(source, nn.Linear)]
        self.outputs = tuple(source.out_features for source in linear)
        self.inputs = linear[0].in_features
        self.packed = self.base.packed

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return self.base.weight.dtype

    def refresh(self) -> None:
        """Copy the base's weights into the layout of the kernels."""
        self.base.refresh()

    def __call__(self, inputs: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """[T, out] of a step's rows."""
        out = self.base(inputs, added)
        for rows, adapter in self._routing.groups:
            pair = adapter.products.get(self.number)
            if pair is None:
                continue
            down, up = pair
            if rows.stop - rows.start == len(out):
                return self.base.product(self.base.product(inputs, down), up, added=out)
            out[rows] = self.base.product(self.base.product(inputs[rows], down), up, added=out[rows])
        return out


@final
@dataclass
class _Reader:
    """Takes tensors of an adapter one by one, so that those left over are noticed."""

    directory: Path
    tensors: dict[str, dict[str, torch.Tensor]]

    def take(self, layer: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        parts = self.tensors.pop(layer, None)
        if parts is None:
            return None
        if parts.keys() != {"A", "B"}:
            raise ModelError(f"{self.directory}: {layer} has lora_{min(parts)} alone")
        down, up = parts["A"], parts["B"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ModelError(f"{self.directory}: {layer}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}")
        if down.shape[1] != inputs or up.shape[0] != outputs:
            raise ModelError(
                f"{self.directory}: belongs to another base model: {layer} maps {down.shape[1]} to {up.shape[0]}, "
                f"here {inputs} to {outputs}"
            )
        return down, up


def load_adapter(
    name: str, directory: Path, linears: Sequence[Adapted], max_rank: int, head: int | None
) -> AdapterVersion:
    """Read an adapter and bring it into the layout of the kernels; may run beside the steps.

    Args:
        name: under which it is served.
        directory: as PEFT writes it.
        linears: of the base model.
        max_rank: the highest rank that is accepted.
        head: number of the LM head among them; None: it is not.

    Raises:
        ModelError: it cannot be read, is no plain LoRA adapter, belongs to another base, is not finite, or adapts the
            LM head.
    """
    config, raw, digest = _files(directory)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in raw.items():
        found = TENSOR.fullmatch(key)
        if found is None:
            raise ModelError(f"{directory}: {key}: only LoRA of linear layers is served")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{directory}: {key} is not finite; the adapter is broken")
        tensors.setdefault(found["layer"], {})[found["part"]] = tensor.float()
    scale = _scale(directory, config, max_rank)
    reader, products = _Reader(directory, tensors), {}
    for linear in linears:
        pair = _joined(reader, linear, scale)
        if pair is not None:
            products[linear.number] = pair
    if reader.tensors:
        raise ModelError(f"{directory}: belongs to another base model: there is no layer {min(reader.tensors)} here")
    if head in products:
        raise ModelError(f"{directory}: adapts the LM head, which is not served; merge it (trainer export --merge)")
    return AdapterVersion(name, digest, int(config["r"]), products)


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], bytes]:
    """Configuration, tensors and digest of an adapter directory."""
    weights = directory / "adapter_model.safetensors"
    try:
        text = (directory / "adapter_config.json").read_bytes()
        config = json.loads(text)
        digest = hashlib.sha256(text + weights.read_bytes()).digest()
        return config, load_file(weights), digest
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{directory}: no adapter can be read: {error}") from None


def _scale(directory: Path, config: dict[str, Any], max_rank: int) -> float:
    """The factor s, once the configuration is one that is served."""
    for key, plain in PLAIN.items():
        value = config.get(key)
        if value and value != plain:
            raise ModelError(
                f"{directory}: {key} = {value!r} is not served; merge the adapter (trainer export --merge)"
            )
    rank = config.get("r")
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise ModelError(f"{directory}: rank {rank!r}; this server takes 1 to {max_rank} (--max-adapter-rank)")
    alpha = float(config.get("lora_alpha") or rank)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _joined(reader: _Reader, linear: Adapted, scale: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and s B of fused layers: the A's one below the other, the B's as blocks; None where no layer is adapted."""
    pairs = [
        reader.take(name, linear.inputs, outputs) for name, outputs in zip(linear.names, linear.outputs, strict=True)
    ]
    if all(pair is None for pair in pairs):
        return None
    downs = [pair[0] for pair in pairs if pair is not None]
    ups = [
        torch.zeros(outputs, 0) if pair is None else pair[1] * scale
        for pair, outputs in zip(pairs, linear.outputs, strict=True)
    ]
    down, up = torch.cat(downs).to(linear.dtype), torch.block_diag(*ups).to(linear.dtype)
    return linear.packed(down), linear.packed(up)
