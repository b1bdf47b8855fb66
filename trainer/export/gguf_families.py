"""Model families that are written to GGUF: sizes, names of tensors, order of rotary dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import gguf
import torch
from gguf import MODEL_ARCH
from transformers import PreTrainedConfig

from trainer.errors import ModelError

ARCHITECTURES: Final = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
"""By `model_type` of config.json."""
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Tensor with one divisor per rotary frequency, of Llama 3.1 and later."""


@final
@dataclass(frozen=True)
class Family:
    """One model's family and sizes."""

    config: PreTrainedConfig
    arch: MODEL_ARCH

    @classmethod
    def of(cls, config: PreTrainedConfig, source: str) -> Family:
        """The family of a model.

        Args:
            config: of the model.
            source: the model's path, for the message.

        Raises:
            ModelError: it is not one that is written here; says how llama.cpp's own converter is run.
        """
        reason = _unsupported(config)
        if reason is not None:
            raise ModelError(
                f"{source}: {reason}. Written here are {', '.join(ARCHITECTURES)}. For others add "
                "`--converter PATH/convert_hf_to_gguf.py` of a llama.cpp checkout."
            )
        return cls(config, ARCHITECTURES[config.model_type])

    @property
    def name(self) -> str:
        """llama.cpp's name of the family."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    def tensor_name(self, name: str) -> str:
        """GGUF's name of a tensor.

        Raises:
            ModelError: the family has no such tensor.
        """
        names = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(
                f"{name}: no tensor of {self.name} in GGUF. Add `--converter PATH` to use llama.cpp's own."
            )
        return found

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with rows in llama.cpp's order.

        In a llama head llama.cpp rotates dimensions (0, 1), (2, 3), ...; transformers (0, n/2), (1, n/2 + 1), ...

        Args:
            name: in transformers.
            tensor: its rows are the outputs of the layer.
        """
        return self._with_halves_swapped(name, tensor, (2, self.head_dim // 2))

    def restored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The opposite of `arranged`, with the same arguments."""
        return self._with_halves_swapped(name, tensor, (self.head_dim // 2, 2))

    def _with_halves_swapped(self, name: str, tensor: torch.Tensor, halves: tuple[int, int]) -> torch.Tensor:
        is_rotated = ".q_proj." in name or ".k_proj." in name
        if self.arch != MODEL_ARCH.LLAMA or not is_rotated:
            return tensor
        by_head = tensor.reshape(tensor.shape[0] // self.head_dim, *halves, *tensor.shape[1:])
        return by_head.swapaxes(1, 2).reshape(tensor.shape)

    def add_sizes(self, writer: gguf.GGUFWriter) -> None:
        """Write the hyper-parameters into the header."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)

    def rope_factors(self) -> torch.Tensor | None:
        """[head_dim / 2] divisors of the rotary frequencies; None where they are used as they are.

        Llama 3.1: wavelengths above original / low_freq_factor are stretched by `factor`, those below
        original / high_freq_factor stay, and between the two the frequencies are interpolated.
        """
        rope = self.config.rope_parameters
        if rope["rope_type"] != "llama3":
            return None
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
        smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
        smooth = smooth.clamp(0.0, 1.0)  # 0: stretched, 1: as it is
        return (1.0 / ((1.0 - smooth) / factor + smooth)).float()


def _unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model is not written here; None where it is."""
    if config.model_type not in ARCHITECTURES:
        return f"is a model of type {config.model_type!r}"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in {"default", "llama3"}:
        return f"has rotary scaling of type {rope_type!r}"
    if getattr(config, "use_sliding_window", False):
        return "has sliding windows"
    return None
