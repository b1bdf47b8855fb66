"""Names in `lora.target_modules` that cannot get an adapter; does not import torch."""

from __future__ import annotations

import difflib
import json
import os
import struct
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import Recipe
from trainer.errors import ModelError

EMBEDDINGS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings"})
"""Usual names of the token embedding."""
HEADS: Final = frozenset({"lm_head", "embed_out"})
"""Usual names of the LM head."""
TRANSFORMERS_NAMES: Final = frozenset({"q_proj", "qkv_proj", "c_attn", "query_key_value"})
"""A checkpoint with one of these names its layers as transformers does, so a name that it lacks does not exist."""
NEAR_CUTOFF: Final = 0.6
EMBEDDING_TARGET: Final = (
    "the token embedding cannot have an adapter; leave it out, or train all parameters (`lora: null`)"
)
HEAD_TARGET: Final = "the head cannot have an adapter; leave it out"


def is_target(target: str, module: str) -> bool:
    """Whether a name in `lora.target_modules` selects a module: `q_proj` selects `model.layers.0.self_attn.q_proj`.

    Args:
        target: The name in the recipe.
        module: Full name of the module.
    """
    return module == target or module.endswith(f".{target}")


def unmatched_target(targets: Iterable[str], modules: Collection[str]) -> str | None:
    """Return what is wrong with the first name that selects no module; None if all select one.

    Args:
        targets: Names in the recipe.
        modules: Full names of the modules that may have an adapter.
    """
    for target in targets:
        if not any(is_target(target, module) for module in modules):
            near = _near(target, modules)
            hint = f"did you mean `{near}`?" if near else f"known here: {', '.join(_last_names(modules))}"
            return f"no layer of the model is named `{target}`; {hint}"
    return None


def _near(target: str, modules: Iterable[str]) -> str | None:
    names = _last_names(modules)
    return next(iter(difflib.get_close_matches(target.rpartition(".")[2], names, n=1, cutoff=NEAR_CUTOFF)), None)


def _last_names(modules: Iterable[str]) -> list[str]:
    names = {module.rpartition(".")[2] for module in modules}
    return sorted(name for name in names - EMBEDDINGS - HEADS if not name.isdigit())


def refuse_unfit_targets(recipe: Recipe, where: str, *, has_experts: bool) -> None:
    """Refuse names that the weights' files show to be wrong; without files on this machine, the run does.

    Args:
        recipe: The recipe.
        where: How the message begins: `file:line: lora.target_modules`.
        has_experts: Whether the model is a mixture. Its experts have other names in the files than in transformers, so
            only a name that is close to one in the files is refused.

    Raises:
        ModelError: A name selects no module, the token embedding or the head.
    """
    targets = recipe.lora.target_modules if recipe.lora is not None else "all-linear"
    if isinstance(targets, str):
        return
    for target in targets:
        name = target.rpartition(".")[2]
        if name in EMBEDDINGS:
            raise ModelError(f"{where}: {EMBEDDING_TARGET}")
        if name in HEADS:
            raise ModelError(f"{where}: {HEAD_TARGET}")
    modules = stored_modules(recipe.model.path, recipe.model.revision)
    problem = unmatched_target(targets, modules) if modules else None
    if problem is None:
        return
    is_complete = not has_experts and not TRANSFORMERS_NAMES.isdisjoint(_last_names(modules))
    if is_complete or "did you mean" in problem:
        raise ModelError(f"{where}: {problem}")


def stored_modules(path: str, revision: str | None) -> frozenset[str]:
    """Return the names of the modules with matrices in a model's safetensors files; empty if none is on this machine.

    Args:
        path: Directory or hub name.
        revision: Commit of a hub model.
    """
    for directory in (Path(path), *_snapshots(path, revision)):
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        try:
            if index.is_file():
                names: Sequence[str] = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                return _modules(name for name in names if "norm" not in name.split(".")[-2])
            if single.is_file():
                header = _header(single)
                return _modules(name for name, entry in header.items() if len(entry.get("shape", ())) >= 2)
        except (OSError, ValueError, KeyError, IndexError, struct.error, AttributeError):
            return frozenset()  # a broken file is reported when it is loaded
    return frozenset()


def _modules(tensors: Iterable[str]) -> frozenset[str]:
    return frozenset(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Return the header of a safetensors file: 8 bytes of length, then JSON by tensor name."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    return header


def _snapshots(hub_name: str, revision: str | None) -> list[Path]:
    """Return the downloaded revisions of a hub model, without importing huggingface_hub."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return sorted(cache.glob(f"models--{hub_name.replace('/', '--')}/snapshots/{revision or '*'}"))
