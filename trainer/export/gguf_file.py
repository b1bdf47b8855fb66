"""Writes a model or an adapter as one GGUF file, tensor by tensor, and reads an adapter back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias

import gguf
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from trainer.errors import ModelError
from trainer.export.gguf_families import ROPE_FACTORS, Family
from trainer.export.gguf_tokenizer import add_tokenizer

GGUFKind: TypeAlias = Literal["bf16", "f16", "q8_0"]
_TYPES: Final = {
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK: Final = 32
"""Values of a row that q8_0 stores with one scale."""

PEFT_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")

Tensors: TypeAlias = Iterable[tuple[str, torch.Tensor]]


def write_model(model: Path, file: Path, kind: GGUFKind, name: str) -> None:
    """Write a model directory as one GGUF file.

    Args:
        model: config.json, safetensors weights and tokenizer.
        file: the file to write.
        kind: how matrices are stored; vectors are float32.
        name: of the model, shown by programs that load it.

    Raises:
        ModelError: the family or the tokenizer is not written here.
    """
    config = AutoConfig.from_pretrained(model)
    family = Family.of(config, str(model))
    writer = gguf.GGUFWriter(None, family.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    family.add_sizes(writer)
    add_tokenizer(writer, AutoTokenizer.from_pretrained(model), config.vocab_size)
    _write(writer, file, kind, lambda: _model_tensors(family, model))


def write_adapter(adapter: Path, base: str, revision: str | None, file: Path, kind: GGUFKind, name: str) -> None:
    """Write a PEFT adapter as one GGUF file, which llama.cpp adds to a GGUF file of its base.

    Args:
        adapter: adapter_config.json and adapter_model.safetensors.
        base: path of the base model.
        revision: commit of a base model on a hub.
        file: the file to write.
        kind: how the matrices are stored.
        name: of the adapter, shown by programs that load it.

    Raises:
        ModelError: the family or the kind of adapter is not written here.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    if config.use_dora:
        raise ModelError(f"{adapter}: llama.cpp does not support DoRA adapters. Add --merge to export a whole model.")
    family = Family.of(AutoConfig.from_pretrained(base, revision=revision), base)
    writer = gguf.GGUFWriter(None, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank, rslora by alpha / sqrt(rank)
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _write(writer, file, kind, lambda: _adapter_tensors(family, adapter))


def _adapter_tensors(family: Family, adapter: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF name and value of the two matrices of every layer; the rows of B are the outputs of the layer."""
    for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        parsed = PEFT_NAME.fullmatch(name)
        if parsed is None:
            raise ModelError(f"{adapter}: {name}: llama.cpp supports adapters of linear layers only. Add --merge.")
        module, matrix = parsed["module"], parsed["matrix"]
        is_output = matrix == "B"
        arranged = family.arranged(f"{module}.weight", tensor) if is_output else tensor
        yield f"{family.tensor_name(module + '.weight')}.lora_{matrix.lower()}", arranged


def read_adapter(file: Path, adapter: Path, base: str, revision: str | None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's GGUF file under PEFT's names, in float32.

    Args:
        file: the file, as `write_adapter` wrote it.
        adapter: the adapter that it was written from: says the names.
        base: path of the base model.
        revision: commit of a base model on a hub.
    """
    family = Family.of(AutoConfig.from_pretrained(base, revision=revision), base)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    tensors = {}
    for name in load_file(adapter / "adapter_model.safetensors"):
        parsed = PEFT_NAME.fullmatch(name)
        assert parsed is not None, "the writer accepted it"
        tensor = stored[f"{family.tensor_name(parsed['module'] + '.weight')}.lora_{parsed['matrix'].lower()}"]
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        tensors[name] = family.restored(f"{parsed['module']}.weight", value) if parsed["matrix"] == "B" else value
    return tensors


def _model_tensors(family: Family, model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """GGUF name and value of every tensor, one in memory at a time."""
    for part in sorted(model.glob("*.safetensors")):
        with safe_open(part, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if not (name == "lm_head.weight" and family.config.tie_word_embeddings):
                    yield family.tensor_name(name), family.arranged(name, tensors.get_tensor(name))
    factors = family.rope_factors()
    if factors is not None:
        yield ROPE_FACTORS, factors


def _write(writer: gguf.GGUFWriter, file: Path, kind: GGUFKind, tensors: Callable[[], Tensors]) -> None:
    """Write header and tensors; they are read twice, first for their shapes."""
    ggml_type, file_type = _TYPES[kind]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors():
        stored = _type_of(tensor, ggml_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        num_bytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tensor.shape, torch.empty(0).numpy().dtype, num_bytes, raw_dtype=stored)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        writer.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), _type_of(tensor, ggml_type)))
    writer.close()


def _type_of(tensor: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a tensor is stored: vectors exactly, matrices as wanted, or as f16 where rows are no multiple of a block."""
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return wanted
