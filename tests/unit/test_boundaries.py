"""Who may know what: facts that belong to one module, and that an import contract cannot express."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trainer

ROOT = Path(trainer.__file__).parent


def users_of(name: str) -> set[str]:
    """Modules that import a name, or read it as an attribute."""
    found = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = isinstance(node, ast.ImportFrom | ast.Import) and any(
                alias.name.split(".")[-1] == name for alias in node.names
            )
            if imported or (isinstance(node, ast.Attribute) and node.attr == name):
                found.add(str(file.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("DTensor", {"distributed/sharding.py"}),
        ("fully_shard", {"distributed/sharding.py"}),
        ("flex_attention", {"model/flex.py"}),
        ("scaled_dot_product_attention", {"model/attention.py", "engine/attention.py"}),
        # A decoder reads the structure of the model; everything else asks the policy.
        (
            "causal_lm",
            {"model/policy.py", "model/packing_check.py"}
            | {f"sampling/{name}.py" for name in ("decoder", "fused", "own_decoder", "choose_decoder")},
        ),
        ("get_peft_model", {"model/adapters.py"}),
    ],
)
def test_a_name_is_used_where_it_belongs(name, allowed):
    assert users_of(name) == allowed
