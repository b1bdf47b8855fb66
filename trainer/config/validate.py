"""Every mistake of a document against its schema, in words for people."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.config.document import Document, KeyPath

M = TypeVar("M", bound=BaseModel)

WANTED: Final[Mapping[str, str]] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
}
"""What a value must be, by pydantic's name of the problem; its own words serve for the rest."""
PATTERN_WORDS: Final = "letters, digits, `.`, `_` or `-`, beginning with a letter or digit"
NEAR_CUTOFF: Final = 0.6
SHOWN_CHARS: Final = 60


def validate(model: type[M], document: Document) -> tuple[M | None, dict[KeyPath, str]]:
    """Validate; where values are wrong, drop them and look again, so that contradictions elsewhere are found too.

    Returns:
        The section without the wrong values, or None where it cannot do without them; and what is wrong with each.
    """
    try:
        return model.model_validate(document.data), {}
    except ValidationError as error:
        problems: dict[KeyPath, list[Any]] = {}
        for problem in error.errors():
            problems.setdefault(_real_path(problem["loc"], document.data), []).append(problem)
    mistakes = {}
    pruned = copy.deepcopy(document.data)
    for path, found in problems.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in problems):
            continue  # another branch of a union; the deeper one is what was meant
        mistakes[path] = _explain(found, path, model)
        _drop(pruned, path)
    try:
        return model.model_validate(pruned), mistakes
    except ValidationError:
        return None, mistakes


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
        data = data[part]
    if isinstance(data, dict) and path:
        data.pop(path[-1], None)
    elif isinstance(data, list) and path:
        data[int(path[-1])] = None  # stays invalid: removing it would shift the others


def _explain(problems: list[Any], path: KeyPath, model: type[BaseModel]) -> str:
    """What is wrong with one value; several problems are the branches of a union."""
    kind, value = problems[0]["type"], problems[0]["input"]
    if kind == "extra_forbidden":
        names = list(_fields_at(model, path[:-1]))
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=NEAR_CUTOFF)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"
        return f"unknown field; {hint}"
    if kind == "missing":
        meaning = _fields_at(model, path[:-1]).get(str(path[-1])) or ""
        first, _, _ = meaning.replace("\n", " ").partition(". ")
        return f"missing. {first.rstrip('.')}." if first else "missing"
    wanted = " or ".join(dict.fromkeys(_wanted(problem, path, model) for problem in problems))
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 3] + "..."
    return f"{wanted if wanted[:1].isupper() else f'must be {wanted}'} (got {shown}){_hint(kind, value, problems)}"


def _wanted(problem: Any, path: KeyPath, model: type[BaseModel]) -> str:
    kind, message = problem["type"], str(problem["msg"])
    if kind in {"model_type", "model_attributes_type", "dataclass_type"}:
        fields = [name for name, text in _fields_at(model, path).items() if not (text or "").startswith("Set by")]
        return f"a section with fields of its own: {', '.join(fields)}"
    if kind == "literal_error":
        options = _options(problem)
        return f"one of {', '.join(options)}" if len(options) > 1 else f"`{options[0]}`"
    if kind == "string_pattern_mismatch":
        return PATTERN_WORDS
    if kind == "too_short":
        return "a list with at least one entry"
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return WANTED.get(kind, message)


def _options(problem: Any) -> list[str]:
    return re.findall(r"'([^']*)'", str(problem["ctx"]["expected"]))


def _hint(kind: str, value: Any, problems: list[Any]) -> str:
    if kind in {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        return "; remove the quotes" if _reads_as_number(value) or value in {"true", "false"} else ""
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    for problem in problems:
        if problem["type"] == "literal_error" and isinstance(value, str):
            near = difflib.get_close_matches(value, _options(problem), n=1, cutoff=NEAR_CUTOFF)
            if near:
                return f"; did you mean `{near[0]}`?"
    return ""


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fields_at(model: type[BaseModel], path: KeyPath) -> dict[str, str | None]:
    """Fields of the section at this path, with their meaning."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        info = current.model_fields.get(part) if current else None
        current = _section_in(info.annotation) if info else None
    return {name: info.description for name, info in current.model_fields.items()} if current else {}


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
