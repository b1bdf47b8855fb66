"""Load a recipe or shape from YAML, reporting all mistakes at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.config.devices import KnownDevice, catalog_shape, made_shapes, read_devices
from trainer.config.document import Document, apply_override, read_document
from trainer.config.finding import Finding
from trainer.config.foreign_names import method_remedy, remedies
from trainer.config.recipe import Recipe, RecipeBase, RFTRecipe, SFTRecipe
from trainer.config.semantics import contradictions
from trainer.config.shape import TrainingShape
from trainer.config.validate import validate, validate_tagged
from trainer.errors import RecipeError, ShapeError

RECIPES: Final[Mapping[str, type[SFTRecipe] | type[RFTRecipe]]] = {"sft": SFTRecipe, "rft": RFTRecipe}
"""By `method`."""


@final
@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, its document with the origin of each value, and warnings."""

    recipe: Recipe
    document: Document
    warnings: tuple[str, ...]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, apply overrides and validate it.

    Args:
        path: The recipe file.
        overrides: `key=value` assignments of `--set`.

    Raises:
        RecipeError: The recipe has mistakes; each is one line with file, line and remedy.
    """
    document = read_document(path)
    for assignment in overrides:
        apply_override(document, assignment)
    recipe, wrong = validate_tagged(RecipeBase, RECIPES, "method", document.data, remedies())
    method = method_remedy(document.data.get("method"))
    wrong |= {("method",): method} if method is not None else {}
    mistakes = document.mistakes + [f"{document.where(path)}: {text}" for path, text in wrong.items()]
    findings = contradictions(recipe, path.parent) if recipe is not None else []
    for finding in findings:
        is_echo = any(wrong_path[: len(finding.path)] == finding.path for wrong_path in wrong)  # its value was dropped
        if finding.is_error and not is_echo:
            mistakes.append(_finding_line(finding, document))
    if mistakes or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(mistakes), key=_line_number))
    warnings = tuple(_finding_line(finding, document) for finding in findings if not finding.is_error)
    return LoadedRecipe(recipe, document, warnings)


def load_shape(path: Path) -> TrainingShape:
    """Read and validate one training shape."""
    document = read_document(path)
    shape, wrong = validate(TrainingShape, document.data)
    mistakes = document.mistakes + [f"{document.where(path)}: {text}" for path, text in wrong.items()]
    if mistakes or shape is None:
        raise RecipeError(sorted(mistakes, key=_line_number))
    return shape


def config_dirs(kind: str) -> list[Path]:
    """Return the directories of shapes, devices, accelerate configurations or model cards: the user's first."""
    package = Path(__file__).resolve().parent.parent
    directories = [Path("configs") / kind, package.parent / "configs" / kind, package / "configs" / kind]
    return [directory for directory in directories if directory.is_dir()]


def all_shapes() -> list[TrainingShape]:
    """Return the shapes that have a file, smallest first; of two with the same name, the first one found."""
    shapes: dict[str, TrainingShape] = {}
    for directory in config_dirs("shapes"):
        for path in sorted(directory.glob("*.yaml")):
            shape = load_shape(path)
            shapes.setdefault(shape.name, shape)
    return sorted(shapes.values(), key=lambda shape: (shape.gpus, shape.gpu_memory_gib, shape.name))


def known_devices() -> dict[str, KnownDevice]:
    """Return the catalog of GPUs, by short name."""
    return read_devices(config_dirs("devices"))


def known_shapes(name: str, device: KnownDevice, files: Sequence[TrainingShape]) -> list[TrainingShape]:
    """Return the shapes of a known GPU, smallest first; those that have a file as the file says.

    Args:
        name: Short name of the device.
        device: The device.
        files: The shapes that have a file.
    """
    by_name = {shape.name: shape for shape in files}
    return [by_name.get(shape.name, shape) for shape in made_shapes(name, device.device_name, device.memory_gib)]


def find_shape(name: str) -> TrainingShape:
    """Return the shape in this file, or with this name: one that has a file, or one of known devices.

    Raises:
        ShapeError: There is none; the message suggests the nearest name.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return load_shape(Path(name))
    shapes = {shape.name: shape for shape in all_shapes()}
    if name not in shapes:
        made = catalog_shape(name, known_devices())
        if made is not None:
            return made
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f". Available: {', '.join(shapes)}"
        raise ShapeError(f"shape {name}: unknown{hint}")
    return shapes[name]


def _finding_line(finding: Finding, document: Document) -> str:
    return f"{document.where(finding.path)}: {finding.text}"


def _line_number(mistake: str) -> tuple[int, str]:
    parts = mistake.split(":", 2)
    return (int(parts[1]), "") if len(parts) > 1 and parts[1].isdigit() else (1 << 30, mistake)
