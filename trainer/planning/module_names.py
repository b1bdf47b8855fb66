"""Which modules of a model an adapter can target, from the headers of its weight files. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from trainer.config.unsupported import HEAD_ADAPTER, HEAD_NAME

EMBEDDINGS: Final = frozenset(
    {"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "embed_positions", "lm_head"}
    | {"embed_out", "shared"}
)
"""Names of input and output embeddings: an adapter there is not supported."""
JOINED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that may read the same input: in compiled layers their adapted products are one operator."""
GATED: Final = ("gate_proj", "up_proj", "down_proj")
"""Layers of a gated MLP, which in compiled layers are one operator with their adapters."""
MAX_HEADER_BYTES: Final = 1 << 27


def module_names(model_path: str) -> frozenset[str] | None:
    """Return the dotted names of all modules with a weight; None if there are no safetensors files here.

    Args:
        model_path: The model directory.
    """
    files = sorted(Path(model_path).glob("*.safetensors")) if Path(model_path).is_dir() else []
    if not files:
        return None
    return frozenset(name.rpartition(".")[0] for file in files for name in _tensor_names(file))


def target_problems(targets: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Return what is wrong with a recipe's target modules, one text for each.

    >>> modules = ["layers.0.q_proj", "layers.0.v_proj", "embed_tokens"]
    >>> target_problems(["q_prj", "v_proj"], modules), target_problems(["embed_tokens"], modules)
    (['no module is called `q_prj`; did you mean `q_proj`?'],
     ['`embed_tokens` is an embedding: adapters go on linear layers'])

    Args:
        targets: Names as PEFT matches them: a module's name, or the end of its dotted name.
        modules: Dotted names of the model's modules.
    """
    names = list(modules)
    leaves = sorted({name.rpartition(".")[2] for name in names} - EMBEDDINGS)
    problems = []
    for target in targets:
        if target.rpartition(".")[2] == HEAD_NAME:
            problems.append(HEAD_ADAPTER)
        elif target.rpartition(".")[2] in EMBEDDINGS:
            problems.append(f"`{target}` is an embedding: adapters go on linear layers")
        elif not any(name == target or name.endswith("." + target) for name in names):
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; the model has {', '.join(leaves)}"
            problems.append(f"no module is called `{target}`{hint}")
    return problems


def _tensor_names(file: Path) -> list[str]:
    """Names in the header of a safetensors file: 8 bytes of length, then JSON; none if it is damaged."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return []
        try:
            header = json.loads(handle.read(length))
        except ValueError:  # loading the weights says what is wrong with them
            return []
    return [name for name in header if name != "__metadata__"]
