"""Adapters: one frozen base model and K named LoRA adapters on it.

A run has one adapter, `RUN_ADAPTER`. Each has its own rank, targets and parameters. A pack whose tokens have owners
routes each token through its owner's adapter; otherwise the active adapter is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from trainer.config.recipe import LoraSettings
from trainer.config.unsupported import HEAD_ADAPTER, warm_start_problem
from trainer.errors import ModelError
from trainer.model.adapted_layers import lora_config, refuse_lost, refuse_unmatched
from trainer.model.batch import TokenOwners
from trainer.model.lora_linear import FusedLinear, Routing, use_fused_linear

RUN_ADAPTER: Final = "default"
"""The adapter of a run. PEFT's own name for a single one: it is part of the parameter names in checkpoints."""


@final
class Adapters:
    """The adapters of a base model, by name."""

    def __init__(self, causal_lm: PreTrainedModel, routing: Routing | None = None) -> None:
        """Begin without adapters.

        Args:
            causal_lm: the frozen base model.
            routing: shared with gradient checkpointing; None makes one.
        """
        self.routing = routing or Routing()
        self._base = causal_lm
        self._peft: peft.PeftModel | None = None
        self._parameter_names: dict[str, tuple[str, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they were added."""
        return tuple(self._parameter_names)

    @property
    def model(self) -> peft.PeftModel:
        """The base model with its adapters, as PEFT wraps it."""
        assert self._peft is not None, "no adapter was added"
        return self._peft

    def add(self, name: str, lora: LoraSettings, seed: int) -> None:
        """Add an adapter, which computes zero until it is trained; the first one becomes active.

        Args:
            name: a name that is not taken.
            lora: rank, targets and so on.
            seed: of the initial values.

        Raises:
            ModelError: the target modules do not exist or do not support an adapter.
        """
        assert name not in self._parameter_names
        config = lora_config(self._base, lora)
        is_quantized = getattr(self._base, "is_quantized", False)
        if not is_quantized:  # for 4-bit weights PEFT has a layer of its own
            use_fused_linear(config)
        known = {id(parameter) for parameter in self._base.parameters()}
        devices = [self._base.device] if self._base.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = peft.get_peft_model(
                        self._base, config, adapter_name=name, autocast_adapter_dtype=False
                    )
                else:
                    self._peft.add_adapter(name, config, autocast_adapter_dtype=False)
            except ValueError as error:
                refuse_unmatched(self._base, lora.target_modules)
                raise ModelError(f"lora.target_modules: {error}") from None
        if isinstance(lora.target_modules, list):
            refuse_unmatched(self._base, self.config(name).target_modules)
        if isinstance(self._base.get_output_embeddings(), BaseTunerLayer):
            raise ModelError(f"lora.target_modules: {HEAD_ADAPTER}")
        named = sorted(self._peft.named_parameters())
        self._parameter_names[name] = tuple(key for key, value in named if id(value) not in known)
        refuse_lost(self._peft, name, self.parameters(name))
        self._train_all()
        if is_quantized:  # PEFT made them in the dtype of the base's weights, which are bytes
            for parameter in self.parameters(name).values():
                parameter.data = parameter.data.to(self._base.dtype)
        for module in self._base.modules():
            if isinstance(module, FusedLinear):
                module.routing = self.routing
        if lora.warm_start is not None:
            problem = warm_start_problem(lora, Path(lora.warm_start), self.config(name).alpha_pattern)
            if problem is not None:
                raise ModelError(f"lora.warm_start: {problem}")

    def remove(self, name: str) -> None:
        """Delete an adapter; at least one must stay, which then is the active one.

        Args:
            name: of an adapter.
        """
        assert len(self._parameter_names) > 1, "PEFT cannot be without an adapter"
        del self._parameter_names[name]
        if name in self.model.active_adapters:
            self.activate(self.names[0])
        self.model.delete_adapter(name)
        self._train_all()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their name in the model, sorted."""
        named = dict(self.model.named_parameters())
        return {key: named[key] for key in self._parameter_names[name]}

    def config(self, name: str) -> peft.LoraConfig:
        """PEFT's configuration of an adapter."""
        config = self.model.peft_config[name]
        assert isinstance(config, peft.LoraConfig)
        return config

    def layer_names(self, words: Sequence[str]) -> list[str]:
        """Names of the adapted linear layers inside modules whose names have one of these words, such as q_proj.

        Args:
            words: such as "attn".
        """
        named = (name.rpartition(".") for name, module in self._base.named_modules() if isinstance(module, FusedLinear))
        return sorted({layer for parent, _, layer in named if any(word in parent for word in words)})

    def activate(self, name: str) -> None:
        """Use this adapter for packs without owners. All adapters stay trainable."""
        self.model.set_adapter(name)
        self._train_all()

    @contextmanager
    def routed(self, owners: TokenOwners | None) -> Iterator[None]:
        """Send each token of a forward pass through the adapter of its owner, within the block.

        Raises:
            ModelError: an owner is unknown, or the model has adapters in layers that cannot be routed.
        """
        if owners is not None:
            unknown = sorted(owners.rows.keys() - self._parameter_names.keys())
            if unknown:
                raise ModelError(f"no adapter {unknown[0]}; there are {', '.join(self.names)}")
            others = {type(module).__name__ for module in self._base.modules() if _is_unroutable(module)}
            if others:
                raise ModelError(
                    f"adapters in {min(others)} layers do not support packs of several adapters; use linear layers only"
                )
        with self.routing.of(owners):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, within the block."""
        with self.model.disable_adapter():
            yield

    def save(self, name: str, directory: Path, masters: Mapping[str, torch.Tensor], *, base_path: str) -> None:
        """Write an adapter as PEFT reads it.

        Args:
            name: of the adapter; not part of what is written.
            directory: an existing, empty directory.
            masters: float32 values on the CPU by parameter name.
            base_path: path of the base model, for the adapter's configuration.
        """
        self.config(name).base_model_name_or_path = base_path
        self.model.save_pretrained(str(directory), selected_adapters=[name], state_dict=dict(masters))
        nested = directory / name  # PEFT makes a folder for every name but its own
        if nested.is_dir():
            for file in sorted(nested.iterdir()):
                file.rename(directory / file.name)
            nested.rmdir()

    def load_tensors(self, name: str, directory: Path) -> dict[str, torch.Tensor]:
        """Read an adapter directory: float32 weights by the parameter names of an adapter here.

        Args:
            name: the adapter whose parameters they are for.
            directory: as `save` or PEFT wrote it.

        Raises:
            ModelError: the directory belongs to another model or adapter.
        """
        try:
            saved = load_file(directory / "adapter_model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory}: no adapter can be read: {error}") from None
        ours = self.parameters(name)
        names = peft.get_peft_model_state_dict(self.model, state_dict={key: key for key in ours}, adapter_name=name)
        loaded = {own: saved[key].float() for key, own in names.items() if key in saved}
        is_complete = loaded.keys() == ours.keys() and len(loaded) == len(saved)
        if not is_complete or any(loaded[key].shape != ours[key].shape for key in ours):
            raise ModelError(f"{directory}: its weights are not those of this model and adapter")
        return loaded

    def _train_all(self) -> None:
        """PEFT freezes every adapter but the active one; here each has a learner of its own."""
        for name in self.names:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(True)


def _is_unroutable(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, FusedLinear)
