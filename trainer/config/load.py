"""From YAML to a valid recipe or shape, or to every mistake at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from pydantic import BaseModel, ValidationError

from trainer.config.document import Document, KeyPath, apply_override, read_document
from trainer.config.recipe import Recipe
from trainer.config.semantics import Finding, contradictions
from trainer.config.shape import TrainingShape
from trainer.errors import RecipeError, ShapeError

M = TypeVar("M", bound=BaseModel)


@final
@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, where each value came from, and what is odd but allowed."""

    recipe: Recipe
    document: Document
    warnings: tuple[str, ...]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and validate a recipe.

    Raises:
        RecipeError: with every mistake, one line each, carrying file, line and remedy.
    """
    document = read_document(path)
    for assignment in overrides:
        apply_override(document, assignment)
    recipe, mistakes = _validate(Recipe, document)
    mistakes = document.mistakes + mistakes
    findings = contradictions(recipe, path.parent) if recipe is not None else []
    mistakes += [_finding_line(finding, document) for finding in findings if finding.is_error]
    if mistakes or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(mistakes), key=_line_number))
    warnings = tuple(_finding_line(finding, document) for finding in findings if not finding.is_error)
    return LoadedRecipe(recipe, document, warnings)


def load_shape(path: Path) -> TrainingShape:
    """Read and validate one training shape."""
    document = read_document(path)
    shape, mistakes = _validate(TrainingShape, document)
    if mistakes or shape is None:
        raise RecipeError(document.mistakes + mistakes)
    return shape


def config_dirs(kind: str) -> list[Path]:
    """Where shapes, accelerate configurations and model cards are looked up: the working directory, then ours."""
    package = Path(__file__).resolve().parent.parent
    places = [Path("configs") / kind, package.parent / "configs" / kind, package / "configs" / kind]
    return [place for place in places if place.is_dir()]


def all_shapes() -> list[TrainingShape]:
    """Every shape by name, the first found wins, smallest first."""
    found: dict[str, TrainingShape] = {}
    for place in config_dirs("shapes"):
        for path in sorted(place.glob("*.yaml")):
            shape = load_shape(path)
            found.setdefault(shape.name, shape)
    return sorted(found.values(), key=lambda shape: (shape.gpus, shape.gpu_memory_gib, shape.name))


def find_shape(name: str) -> TrainingShape:
    """The shape of this name, or of this file.

    Raises:
        ShapeError: there is none, with the nearest names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return load_shape(Path(name))
    shapes = {shape.name: shape for shape in all_shapes()}
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f". There are: {', '.join(shapes)}"
        raise ShapeError(f"shape {name}: unknown{hint}")
    return shapes[name]


def _finding_line(finding: Finding, document: Document) -> str:
    return f"{document.where(finding.path)}: {finding.text}"


def _line_number(mistake: str) -> tuple[int, str]:
    parts = mistake.split(":", 2)
    return (int(parts[1]), "") if len(parts) > 1 and parts[1].isdigit() else (1 << 30, mistake)


def _validate(model: type[M], document: Document) -> tuple[M | None, list[str]]:
    """Validate; where values are wrong, drop them and look again, so that contradictions elsewhere are found too."""
    try:
        return model.model_validate(document.data), []
    except ValidationError as error:
        mistakes = []
        pruned = copy.deepcopy(document.data)
        for problem in error.errors():
            path = _real_path(problem["loc"], document.data)
            mistakes.append(_explain(problem, path, model, document))
            _drop(pruned, path)
    try:
        return model.model_validate(pruned), _one_per_path(mistakes)
    except ValidationError:
        return None, _one_per_path(mistakes)


def _one_per_path(mistakes: list[str]) -> list[str]:
    """A union reports each of its branches; the first is enough."""
    seen: dict[str, str] = {}
    for mistake in mistakes:
        where, _, _ = mistake.rpartition(": ")
        seen.setdefault(where, mistake)
    return list(seen.values())


def _real_path(loc: Sequence[str | int], data: Any) -> KeyPath:
    """Drop the names of union branches, which pydantic mixes into the location."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(data, dict) and (part in data or last) and "[" not in str(part):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            path.append(part)
            data = data[part]
    return tuple(path)


def _drop(data: Any, path: KeyPath) -> None:
    for part in path[:-1]:
        if not isinstance(data, dict | list):
            return
        try:
            data = data[part]  # type: ignore[call-overload]
        except (KeyError, IndexError):
            return
    if isinstance(data, dict) and path:
        data.pop(path[-1], None)


def _explain(problem: Any, path: KeyPath, model: type[BaseModel], document: Document) -> str:
    where = document.where(path)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        names = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.6)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"
        return f"{where}: unknown field; {hint}"
    if kind == "missing":
        section = ".".join(str(part) for part in path[:-1]) or "the recipe"
        return f"{where}: missing; {section} needs `{path[-1]}`"
    message = str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if kind == "literal_error":
        options = [option.strip().strip("'") for option in message.replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(value), options, n=1)
        message = f"must be one of {', '.join(options)}" + (f"; did you mean `{near[0]}`?" if near else "")
    elif kind == "string_pattern_mismatch":
        message = "must be letters, digits, `.`, `_` or `-`, beginning with a letter or digit"
    else:
        message = f"must be {message}" if not message[:1].isupper() else message
    return f"{where}: {message} (got {value!r})"


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Names of the fields of the section at this path."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        info = current.model_fields.get(part) if current else None
        current = _section_in(info.annotation) if info else None
    return list(current.model_fields) if current else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
