"""YAML documents that remember the line of every value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import yaml

from trainer.errors import RecipeError

KeyPath = tuple[str | int, ...]
SOURCE_FIELDS: Final = frozenset({"path", "hub", "config", "split", "revision"})


_KINDS: Final = {type(None): "nothing", yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a number, as YAML 1.2 specifies; PyYAML reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


@final
@dataclass
class Document:
    """A YAML mapping with the line of each value, and the values changed by `--set`."""

    file: str
    data: dict[str, object]
    lines: dict[KeyPath, int]
    mistakes: list[str] = field(default_factory=list)
    overridden: set[KeyPath] = field(default_factory=set)

    def line_of(self, path: KeyPath) -> int | None:
        """Return the line of a value, or of the nearest enclosing section."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def where(self, path: KeyPath) -> str:
        """Return how messages about a value begin: `file:line: a.b.c`, or `--set a.b.c` for an override."""
        name = dotted(path)
        source = self.source_of(path)
        return f"--set {name}" if source == "--set" else f"{source}: {name}"

    def source_of(self, path: KeyPath) -> str:
        """Return `file:line`, or `--set` for an override."""
        if any(path[: len(over)] == over for over in self.overridden):
            return "--set"
        if path not in self.lines and any(over[: len(path)] == path for over in self.overridden):
            return "--set"
        line = self.line_of(path)
        return f"{self.file}:{line}" if line else self.file

    def origin_of(self, path: KeyPath) -> str | None:
        """Return the origin of a value: `--set`, `file:line`, or None if the user did not give it."""
        if any(over[: len(path)] == path for over in self.overridden):
            return "--set"
        return self.source_of(path) if path in self.lines else None

    def override(self, path: KeyPath, value: object) -> None:
        """Record that `--set` gave this value, which replaces the value in the file."""
        self.lines = {known: line for known, line in self.lines.items() if known[: len(path)] != path}
        self.overridden.update(leaf for leaf, _ in leaves(value, path))


def dotted(path: KeyPath) -> str:
    """Return the path in dotted notation.

    >>> dotted(("rewards", 0, "use"))
    'rewards.0.use'
    """
    return ".".join(str(part) for part in path)


def leaves(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    """Yield every value that is not a section, with its path; a list of plain values is one value.

    >>> dict(leaves({"a": {"b": 1}, "c": [2, 3], "d": [{"e": 4}]}))
    {('a', 'b'): 1, ('c',): [2, 3], ('d', 0, 'e'): 4}
    """
    if isinstance(value, dict) and value:
        for key, inside in value.items():
            yield from leaves(inside, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inside in enumerate(value):
            yield from leaves(inside, (*path, index))
    else:
        yield path, value


def read_document(path: Path) -> Document:
    """Read a YAML mapping and the line of each value.

    Raises:
        RecipeError: The file is missing, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such file. Give the path of a recipe, for example recipes/"]) from None
    except (IsADirectoryError, PermissionError) as error:
        raise RecipeError([f"{path}: cannot be read ({error.strerror})"]) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecipeError([f"{path}:{line}: byte {error.start} is not UTF-8. Save the file as UTF-8."]) from None
    document = Document(file=str(path), data={}, lines={})
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError([f"{path}:1: expected a mapping of fields, found {_KINDS[type(node)]}"])
        document.data = _read_mapping(loader, node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = mark.line + 1 if mark else 1
        raise RecipeError([f"{path}:{number}: not YAML: {_yaml_problem(error, text, number)}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # control characters, invalid date, recursive alias
        raise RecipeError([f"{path}: not YAML: {str(error).splitlines()[0]}"]) from None
    return document


def _yaml_problem(error: yaml.MarkedYAMLError, text: str, number: int) -> str:
    """What is wrong, with the remedy for a tab in the indentation, which YAML forbids."""
    lines = text.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "the line is indented with a tab; use spaces"
    return str(error.problem or error.context)


def _read_mapping(loader: _Loader, node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, object]:
    result: dict[str, object] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        here = (*path, key)
        line = key_node.start_mark.line + 1
        if key in result:
            first = document.lines[here]
            document.mistakes.append(f"{document.file}:{line}: {dotted(here)}: given twice (first on line {first})")
        document.lines[here] = line
        result[key] = _read_node(loader, value_node, here, document)
    return result


def _read_node(loader: _Loader, node: yaml.Node, path: KeyPath, document: Document) -> object:
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(loader, node, path, document)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            items.append(_read_node(loader, item, (*path, index), document))
        return items
    return loader.construct_object(node, deep=True)


def apply_override(document: Document, assignment: str) -> None:
    """Apply one `--set a.b.c=value`. The value is parsed as YAML; a number in the key indexes a list."""
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        document.mistakes.append(f"--set {assignment}: expected key=value, for example optimizer.learning_rate=1e-4")
        return
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in name.strip().split("."))
    try:
        value = yaml.load(text, Loader=_Loader) if text else None  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError):
        value = text
    target: object = document.data
    for part, following in itertools.pairwise(path):
        inside = _section_under(target, part, following)
        if inside is None or not _put(target, part, inside):
            document.mistakes.append(_no_entry(assignment, path, document.data))
            return
        target = inside
    if not _put(target, path[-1], value):
        document.mistakes.append(_no_entry(assignment, path, document.data))
        return
    document.override(path, value)


def _section_under(target: Any, part: str | int, following: str | int) -> object:
    """Return the section or list that the next part of the key refers to; a new one if there is none."""
    inside: object = None
    if isinstance(target, dict):
        inside = target.get(str(part))
    elif isinstance(part, int) and part < len(target):
        inside = target[part]
    if isinstance(inside, dict | list):
        return inside
    if isinstance(following, int):
        return [] if inside is None else None
    if isinstance(inside, str) and following in SOURCE_FIELDS:
        return {"path": inside}  # `data.train: file` is short for `data.train: {path: file}`
    return {}


def _put(target: Any, part: str | int, value: object) -> bool:
    """Set an entry; the index after the last one of a list appends. Returns whether there is such an entry."""
    if isinstance(target, dict):
        target[str(part)] = value
        return True
    if not isinstance(part, int) or part > len(target):
        return False
    target[part : part + 1] = [value]
    return True


def _no_entry(assignment: str, path: KeyPath, data: object) -> str:
    known: KeyPath = ()
    for part in path:
        inside = data.get(str(part)) if isinstance(data, dict) else None
        if isinstance(data, list) and isinstance(part, int) and part < len(data):
            inside = data[part]
        if inside is None:
            break
        data, known = inside, (*known, part)
    what = f"a list of {len(data)}" if isinstance(data, list) else f"{data!r:.60}, no list"
    return f"--set {assignment}: there is no {dotted(path)}; {dotted(known)} is {what}"
