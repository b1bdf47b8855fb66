"""Whether sequences of a model can be packed, as far as its config.json tells; does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

ATTENTION_LAYERS: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Entries of `layer_types` that keep no state: packed attention separates sequences there."""
STATEFUL: Final = frozenset(
    {"bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2"}
    | {"lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe"}
    | {"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"}
    | {"lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
)
"""Model types with convolutions or recurrent layers, whose state would run over the border of packed sequences."""
UNPACKED: Final = frozenset(
    {"axk2", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "codegen", "deepseek_ocr2"}
    | {
        "deepseek_v32",
        "deepseek_v4",
        "deepseek_vl_hybrid",
        "doge",
        "dots3_note_text",
        "falcon",
        "git",
        "glm5_next",
        "glm_moe_dsa",
    }
    | {"gpt_neo", "gpt_neox_japanese", "gptj", "hy_v4", "inkling2", "inkling2_text", "inkling_text", "marian", "mbart"}
    | {"mistral_large4", "mpt", "mvp", "nemotron", "openai-gpt", "pegasus", "plbart", "qwen4_exp", "qwen4_exp_text"}
    | {"stablelm", "trocr", "xglm"}
)
"""Model types whose code does not run packs, or does not separate their sequences (docs/models.md)."""
KEEPS_STATE: Final = "keeps state between packed sequences"
NOT_SEPARATED: Final = "does not separate packed sequences"
LENGTH_DEPENDENT: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose factors depend on the length of the longest sequence of a batch."""


def why_separate(config: Mapping[str, Any], max_seq_tokens: int) -> str | None:
    """Return why the sequences of a run are trained one by one; None where nothing is known against packing.

    The run itself measures it before step 1, see `trainer.model.packing_check`.

    >>> why_separate({"model_type": "lfm2"}, 512)
    'lfm2 keeps state between packed sequences'

    Args:
        config: Content of config.json.
        max_seq_tokens: Maximum length of a sequence.
    """
    text = text_config(config)
    name = str(text.get("model_type") or config.get("model_type") or "the model")
    switch = rotary_switch(config)
    if switch is not None and max_seq_tokens > switch:
        return (
            f"{name} has other rotary factors for sequences of more than {switch:,} tokens "
            f"(`data.max_seq_tokens: {switch}` allows packing)"
        )
    kinds = text.get("layer_types")
    other = set(kinds) - ATTENTION_LAYERS if isinstance(kinds, list) else set()
    if name in STATEFUL or any(
        word in str(kind) for kind in other for word in ("linear", "mamba", "conv", "recurrent")
    ):
        return f"{name} {KEEPS_STATE}"
    return f"{name} {NOT_SEPARATED}" if name in UNPACKED else None


def rotary_problem(config: Mapping[str, Any], max_seq_tokens: int) -> str | None:
    """Return why rft cannot train sequences of this length; None if it can.

    The first tokens of a long completion are drawn with the factors of a short sequence, and trained with those of the
    whole one: they would be two policies.

    Args:
        config: Content of config.json.
        max_seq_tokens: Maximum length of prompt and completion.
    """
    switch = rotary_switch(config)
    if switch is None or max_seq_tokens <= switch:
        return None
    return (
        f"rft of {max_seq_tokens:,} tokens is not supported: the model's rotary factors change above {switch:,} "
        f"tokens, in the middle of a completion; set it to {switch}"
    )


def rotary_switch(config: Mapping[str, Any]) -> int | None:
    """Return the length above which rotary factors depend on the length of the sequence; None if they never do.

    >>> rotary_switch({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096})
    4096

    Args:
        config: Content of config.json; rotary parameters are in `rope_parameters`, in old files `rope_scaling`.
    """
    text = text_config(config)
    switches = []
    for parameters in _rotary_parameters(text):
        kind = parameters.get("rope_type") or parameters.get("type")
        if kind in LENGTH_DEPENDENT:
            original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
            original = original or (text.get("original_max_position_embeddings") if kind == "longrope" else None)
            switches.append(original or text.get("max_position_embeddings"))
    return min((int(switch) for switch in switches if switch), default=None)


def _rotary_parameters(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters of the model, or of each kind of layer."""
    parameters = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(parameters, Mapping):
        yield parameters
        yield from (each for each in parameters.values() if isinstance(each, Mapping))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config
