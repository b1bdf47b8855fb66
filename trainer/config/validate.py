"""Report every mistake of a document against its schema, in plain words."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.document import KeyPath, dotted

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
"""The expected value by pydantic's error type; pydantic's own words are used for other types."""
PATTERN_WORDS: Final = "letters, digits, `.`, `_` or `-`, beginning with a letter or digit"
NEAR_CUTOFF: Final = 0.6
SHOWN_CHARS: Final = 60
MAX_PLACES: Final = 2
MAX_DEPTH: Final = 1


def validate_tagged(
    base: type[BaseModel],
    variants: Mapping[str, type[M]],
    tag: str,
    data: dict[str, object],
    remedies: Mapping[str, str] | None = None,
) -> tuple[M | None, dict[KeyPath, str]]:
    """Validate against the variant that the value of `tag` selects.

    Where the tag is missing or wrong, the other fields are validated against the variant that knows most of them, so
    that all mistakes are reported at once.

    Args:
        base: The fields that all variants have in common, `tag` included.
        variants: The model for each value of `tag`.
        tag: Name of the field that selects the variant.
        data: The document.
        remedies: As for `validate`.

    Returns:
        As `validate`.
    """
    value = data.get(tag)
    chosen = value if isinstance(value, str) and value in variants else None
    assumed = chosen or max(variants, key=lambda name: len(variants[name].model_fields.keys() & data.keys()))
    elsewhere = {
        field: f"belongs to `{tag}: {name}`; remove it or change the {tag}"
        for name, variant in variants.items()
        for field in variant.model_fields.keys() - variants[assumed].model_fields.keys()
    }
    valid, mistakes = validate(variants[assumed], {**data, tag: assumed}, elsewhere, remedies)
    if chosen is not None:
        return valid, mistakes
    about_tag = validate(base, data)[1]
    return None, {**mistakes, (tag,): about_tag[(tag,)]}


def validate(
    model: type[M],
    data: dict[str, object],
    elsewhere: Mapping[str, str] | None = None,
    remedies: Mapping[str, str] | None = None,
) -> tuple[M | None, dict[KeyPath, str]]:
    """Validate a document; after dropping wrong values, validate again, so that the rest can be checked further.

    Args:
        model: The schema.
        data: The document.
        elsewhere: What to say of top-level fields that the schema does not have, but a related one does.
        remedies: What to say of unknown fields that other tools have, by name.

    Returns:
        The section without the wrong values, or None if a required value is wrong; and each mistake by its path.
    """
    try:
        return model.model_validate(data), {}
    except ValidationError as error:
        problems: dict[KeyPath, list[ErrorDetails]] = {}
        for problem in error.errors():
            problems.setdefault(_real_path(problem["loc"], data), []).append(problem)
    mistakes: dict[KeyPath, str] = {}
    pruned = copy.deepcopy(data)
    for path, group in problems.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in problems):
            continue  # a branch of a union that was not meant: another branch failed deeper
        is_elsewhere = len(path) == 1 and group[0]["type"] == "extra_forbidden" and path[0] in (elsewhere or {})
        mistakes[path] = (
            (elsewhere or {})[str(path[0])] if is_elsewhere else _explain(group, path, model, remedies or {})
        )
        _drop(pruned, path)
    try:
        return model.model_validate(pruned), mistakes
    except ValidationError:
        return None, mistakes


def _real_path(loc: Sequence[str | int], data: object) -> KeyPath:
    """Return the path of a value in the document, without the names of union branches in pydantic's location."""
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


def _explain(problems: list[ErrorDetails], path: KeyPath, model: type[BaseModel], remedies: Mapping[str, str]) -> str:
    """Describe what is wrong with one value; a union has one problem for each branch."""
    kind, value = problems[0]["type"], problems[0]["input"]
    if kind == "extra_forbidden":
        return f"unknown field; {_unknown(path, model, remedies)}"
    if kind == "missing":
        meaning = _fields_at(model, path[:-1]).get(str(path[-1])) or ""
        first, _, _ = meaning.replace("\n", " ").partition(". ")
        return f"missing. {first.rstrip('.')}." if first else "missing"
    wanted = " or ".join(dict.fromkeys(_wanted(problem, path, model) for problem in problems))
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 3] + "..."
    return f"{wanted if wanted[:1].isupper() else f'must be {wanted}'} (got {shown}){_hint(kind, value, problems)}"


def _unknown(path: KeyPath, model: type[BaseModel], remedies: Mapping[str, str]) -> str:
    """What was meant by an unknown field."""
    name = str(path[-1])
    places = [place for place in _places(model, name) if place != path]
    if places and len(places) <= MAX_PLACES:
        return f"write it as {' or '.join(f'`{dotted(place)}`' for place in places)}"
    if name in remedies:
        return remedies[name]
    names = list(_fields_at(model, path[:-1]))
    near = difflib.get_close_matches(name, names, n=1, cutoff=NEAR_CUTOFF)
    return f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"


def _places(model: type[BaseModel], name: str, path: KeyPath = ()) -> list[KeyPath]:
    """Where the schema has a field of this name; not in sections of lists, and two sections deep at most."""
    places: list[KeyPath] = [(*path, name)] if name in model.model_fields else []
    for field, info in model.model_fields.items():
        section = _section_in(info.annotation)
        if section is not None and len(path) < MAX_DEPTH and get_origin(info.annotation) is not list:
            places += _places(section, name, (*path, field))
    return places


def _wanted(problem: ErrorDetails, path: KeyPath, model: type[BaseModel]) -> str:
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


def _options(problem: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(problem.get("ctx", {})["expected"]))


def _hint(kind: str, value: object, problems: list[ErrorDetails]) -> str:
    if kind in {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        return "; remove the quotes" if _reads_as_number(value) or value in {"true", "false"} else ""
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if isinstance(value, str) and "${" in value:
        return "; variables of the shell are not replaced in a recipe: use --set"
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
    """Return the fields of the section at this path, with their descriptions."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        info = current.model_fields.get(part) if current else None
        current = _section_in(info.annotation) if info else None
    return {name: info.description for name, info in current.model_fields.items()} if current else {}


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
