"""Runs one test of a function in the process of the code under test. Standard library only.

A test compares with `==`. An object of the code's own class whose `__eq__` always says yes would pass any such test, so
`==` and `!=` in tests, and the comparison of calls, go through `is_same`.
"""

import ast
from typing import Any

SAME = "__is_same__"
MAX_DEPTH = 50
CODE_MODULES = ("completion", "__main__")
"""What `run` calls the module of the code under test."""


def is_same(left: Any, right: Any) -> bool:
    """Whether two values are equal, and no object of the code's own classes says so of an object of another class."""
    return bool(left == right) and not _forges(left, right, MAX_DEPTH)


def _forges(left: Any, right: Any, depth: int) -> bool:
    kinds = type(left), type(right)
    if depth == 0 or (kinds[0] is not kinds[1] and any(map(_has_own_equality, kinds))):
        return True
    if isinstance(left, dict) and isinstance(right, dict):
        return any(key not in right or _forges(value, right[key], depth - 1) for key, value in left.items())
    if isinstance(left, (set, frozenset)) and isinstance(right, (set, frozenset)):
        return {kind for kind in map(type, left) if _has_own_equality(kind)} != {
            kind for kind in map(type, right) if _has_own_equality(kind)
        }
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return any(_forges(*pair, depth - 1) for pair in zip(left, right, strict=False))
    return False


def _has_own_equality(kind: type) -> bool:
    """Whether a class of the code under test decides what its objects equal."""
    return any("__eq__" in vars(base) and base.__module__ in CODE_MODULES for base in kind.__mro__)


class _Comparisons(ast.NodeTransformer):
    """Replaces `a == b` and `a != b` by calls of `is_same`; chains such as `a == b == c` stay as they are."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Replace a single comparison."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        call: ast.expr = ast.Call(ast.Name(SAME, ast.Load()), [node.left, node.comparators[0]], [])
        if isinstance(node.ops[0], ast.NotEq):
            call = ast.UnaryOp(ast.Not(), call)
        return ast.copy_location(call, node)


def run_test(test: dict[str, Any], names: dict[str, Any], file: str) -> None:
    """Run a test, which raises where it fails.

    Args:
        test: `{"statement": "assert f(2) == 4"}` or `{"call": "f", "args": [2], "result": 4}`.
        names: the global names of the code.
        file: what a traceback calls the test.
    """
    if "statement" in test:
        tree = ast.fix_missing_locations(_Comparisons().visit(ast.parse(test["statement"], file)))
        names[SAME] = is_same
        exec(compile(tree, file, "exec", dont_inherit=True), names)
        return
    name, wanted = test["call"], test["result"]
    function = names[name] if name in names else getattr(names["Solution"](), name)
    result = function(*test["args"])
    result = list(result) if isinstance(result, tuple) else result  # the expected value is JSON, which has no tuples
    if not (is_same(result, wanted) or is_same([result], wanted)):  # APPS wraps the result in a list
        raise AssertionError(f"{name} gave {result!r}, not {wanted!r}")
