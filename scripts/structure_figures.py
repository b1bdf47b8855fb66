#!/usr/bin/env python
"""Print figures of a checkout's structure, for docs/log.md: modules, rooms, layers, imports, uses of `Any`.

python scripts/structure_figures.py [CHECKOUT]
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PACKAGE: Final = "trainer"


def main(root: Path) -> None:
    """Print one figure a line."""
    modules = {module_name(file, root): file for file in sorted((root / PACKAGE).rglob("*.py"))}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in modules.items()}
    edges = {(name, target) for name, tree in trees.items() for target in imports(tree, modules) if target != name}
    crossing = {(importer, target) for importer, target in edges if room(importer) != room(target)}
    lengths = [length for tree in trees.values() for length in function_lengths(tree)]
    top = [name for name, file in modules.items() if file.parent == root / PACKAGE and not file.stem.startswith("__")]
    figures: dict[str, object] = {
        "modules": len(modules),
        "modules at top level": len(top),
        "rooms and top-level modules": len({room(name) for name in modules} - {PACKAGE, "__main__"}),
        "layers of the import contract": num_layers(root),
        "imports between modules": len(edges),
        "imports between modules of different rooms": len(crossing),
        "arrows between rooms": len({(room(importer), room(target)) for importer, target in crossing}),
        "uses of Any, import lines not counted": sum(any_uses(tree) for tree in trees.values()),
        "lines of a function, median": statistics.median(lengths),
        "lines of the longest function": max(lengths),
        "lines of the longest file": max(
            len(file.read_text(encoding="utf-8").splitlines()) for file in modules.values()
        ),
    }
    for name, value in figures.items():
        print(f"{name:<45}{value:>7}")


def module_name(file: Path, root: Path) -> str:
    """The dotted name of a file.

    >>> module_name(Path("/x/trainer/data/__init__.py"), Path("/x"))
    'trainer.data'
    """
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The first name below the package.

    >>> room("trainer.data.chat"), room("trainer")
    ('data', 'trainer')
    """
    return module.split(".")[1] if "." in module else module


def imports(tree: ast.Module, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, also within functions; the package itself is not counted."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for full_name in names:
            name = full_name
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            if name in modules and name != PACKAGE:
                yield name


def num_layers(root: Path) -> int:
    """Layers that pyproject.toml declares."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    return sum(len(contract["layers"]) for contract in contracts if contract["type"] == "layers")


def any_uses(tree: ast.Module) -> int:
    """How often `Any` stands in annotations and code, annotations in quotes included."""
    plain = sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return plain + sum(len(re.findall(r"\bAny\b", text)) for text in strings if "\n" not in text and " " not in text)


def function_lengths(tree: ast.Module) -> Iterator[int]:
    """Lines of each function, its decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
