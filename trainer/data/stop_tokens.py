"""Where generation stops, and how many tokens the model knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trainer.errors import ModelError


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str) -> frozenset[int]:
    """Tokens at which generation stops: the tokenizer's and those of generation_config.json.

    Raises:
        ModelError: there is none.
    """
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if (Path(model_path) / "generation_config.json").is_file():
        found |= _as_set(GenerationConfig.from_pretrained(model_path).eos_token_id)
    if not found:
        found = _as_set(_model_config(model_path).get("eos_token_id"))
    if not found:
        raise ModelError(f"{model_path}: knows no stop token; set eos_token in tokenizer_config.json")
    return frozenset(found)


def embedding_rows(model_path: str) -> int | None:
    """Tokens that have a row in the model's embedding; None where there is no config.json to say so."""
    config = _model_config(model_path)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _model_config(model_path: str) -> dict[str, Any]:
    file = Path(model_path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _as_set(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
