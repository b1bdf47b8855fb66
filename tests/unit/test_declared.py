"""What the code imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("trainer", "tests", "scripts", "benchmarks", "docs/examples")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def imported_by(folder: str) -> dict[str, Path]:
    """Third-party distributions that the folder's files import, each with one file that does."""
    installed = packages_distributions()
    found: dict[str, Path] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS:
                distribution = SHARED.get(name) or installed.get(name, [NAMED_OTHERWISE.get(name, name)])[0]
                found[distribution.lower().replace("_", "-")] = file
    return found


def requirements(lines: list[str]) -> set[str]:
    """Names of the distributions that requirement lines ask for.

    >>> sorted(requirements(["torch>=2.11,<2.14", "huggingface_hub>=2"]))
    ['huggingface-hub', 'torch']
    """
    return {re.split(r"[<>=\[; ]", line)[0].lower().replace("_", "-") for line in lines}


ELSEWHERE = {"tinker"}
"""Imported by scripts that run in an environment of their own."""
MODULES = {file.stem for folder in FOLDERS[1:] for file in (ROOT / folder).rglob("*.py")}
OURS = {"trainer", "chaos", *ELSEWHERE, *MODULES}
"""The package, and the modules that tests and tools import from beside themselves."""
OPTIONAL_EXTRAS = (
    "accounts", "math", "s3", "qlora", "evals", "serve", "training", "tensorboard", "trackio", "mlflow", "mcp", "ray",
    "otel", "flash", "lowering",
)  # fmt: skip
SHARED = {"google": "protobuf", "opentelemetry": "opentelemetry-sdk"}
"""Distributions of modules whose first name several distributions share."""
NAMED_OTHERWISE = {"mlflow": "mlflow-skinny", "flash_attn": "flash-attn-4", "cutlass": "nvidia-cutlass-dsl"}
"""Distributions that need not be installed here, by the module that they bring."""
OTHER_INTERPRETER = {"verifiers"}
"""What is installed only where the recipe's `python` of an environment points to."""
RUNTIME = requirements(PROJECT["dependencies"])
OPTIONAL = requirements([line for name in OPTIONAL_EXTRAS for line in EXTRAS[name]])
DEVELOPMENT = requirements(EXTRAS["dev"])


def test_the_package_imports_only_its_dependencies_and_extras() -> None:
    undeclared = {name: file for name, file in imported_by("trainer").items() if name not in RUNTIME | OPTIONAL}
    assert undeclared.keys() == OTHER_INTERPRETER


def test_tests_and_tools_import_only_what_the_development_extra_adds() -> None:
    declared = RUNTIME | OPTIONAL | DEVELOPMENT
    for folder in FOLDERS[1:]:
        undeclared = {name: file for name, file in imported_by(folder).items() if name not in declared}
        assert not undeclared, folder


def test_an_import_that_nobody_declares_is_found() -> None:
    assert "psutil" in imported_by("tests")
    assert "psutil" not in RUNTIME
