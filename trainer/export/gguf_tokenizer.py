"""Describes a tokenizer in GGUF: tokens, merges, special ids, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from trainer.errors import ModelError

_ENGLISH: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt-2": ("ByteLevel",),
    "smollm": ("Digits", "ByteLevel"),
    "qwen2": (_ENGLISH + r"\p{N}" + _REST,),
    "llama-bpe": (_ENGLISH + r"\p{N}{1,3}" + _REST,),
}
"""llama.cpp's name of a way to split text before the merges; either steps, or the regular expression of a Split."""
END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Write a byte-level BPE tokenizer into the header of a GGUF file.

    Args:
        writer: of a file whose header is not written yet.
        tokenizer: of the exported model.
        num_embeddings: rows of the embedding; rows without a token get a placeholder.

    Raises:
        ModelError: llama.cpp would tokenize differently.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    split = split_name(document)
    tokens, types = _tokens(tokenizer, document, num_embeddings)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_merge_text(merge) for merge in document["model"]["merges"]])
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, _end_of_turn_id(tokenizer)),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its first token before every text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def split_name(document: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json.

    >>> byte_level = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    >>> split_name({"model": {"type": "BPE"}, "pre_tokenizer": byte_level, "normalizer": None})
    'gpt-2'

    Raises:
        ModelError: it is not one of those that llama.cpp has under a name.
    """
    model, normalizer = document["model"], document.get("normalizer")
    top = document.get("pre_tokenizer") or {}
    steps = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    last = steps[-1]
    is_byte_level = model["type"] == "BPE" and last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if is_byte_level and (normalizer is None or normalizer["type"] == "NFC"):
        for name, wanted in SPLITS.items():
            ignores_merges = name == "llama-bpe"
            if _split_of(steps) == wanted and bool(model.get("ignore_merges")) == ignores_merges:
                return name
    raise ModelError(
        "the tokenizer is none of those that are written to GGUF here: byte-level BPE that splits text like "
        f"{', '.join(SPLITS)}. llama.cpp's own converter may support it: add `--converter PATH`."
    )


def _split_of(steps: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """The steps in the notation of SPLITS; empty where a step has other settings than llama.cpp's."""
    last, before = steps[-1], steps[:-1]
    if not before:
        return ("ByteLevel",) if last["use_regex"] else ()
    first = before[0]
    if len(before) > 1:
        return ()
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return ("Digits", "ByteLevel")
    is_isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    return (first["pattern"].get("Regex", ""),) if is_isolated and not last["use_regex"] else ()


def _tokens(
    tokenizer: PreTrainedTokenizerBase, document: Mapping[str, Any], num_embeddings: int
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every row of the embedding."""
    tokens = [f"[PAD{index}]" for index in range(num_embeddings)]
    types = [TokenType.UNUSED] * num_embeddings
    added = {token["id"]: token["special"] for token in document["added_tokens"]}
    for text, index in tokenizer.get_vocab().items():
        if index >= num_embeddings:
            raise ModelError(f"token {text!r} has id {index}; the embedding has {num_embeddings} rows")
        is_special = added.get(index)
        tokens[index] = text
        types[index] = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}[is_special]
    return tokens, types


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer, where it is not the tokenizer's end of text."""
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[text] for text in END_OF_TURN if text in vocabulary]
    template = str(tokenizer.chat_template)
    used = [index for index in known if tokenizer.convert_ids_to_tokens(index) in template]
    return used[0] if used else None
