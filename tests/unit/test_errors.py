"""The tree of errors drawn in the docstring is the tree of classes."""

from __future__ import annotations

import re

from trainer import errors
from trainer.errors import TrainerError


def drawn() -> dict[str, tuple[str | None, int]]:
    """Parent and exit code of each error, as the docstring draws them."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []
    for indent, name, code in re.findall(r"^( +)(\w+Error) +(\d+) ", errors.__doc__ or "", re.MULTILINE):
        above = [(depth, parent) for depth, parent in above if depth < len(indent)]
        tree[name] = (above[-1][1] if above else None, int(code))
        above.append((len(indent), name))
    return tree


def test_docstring_draws_every_error_with_its_parent_and_exit_code():
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, TrainerError)]
    assert drawn() == {
        each.__name__: (each.__base__.__name__ if each is not TrainerError else None, each.exit_code)
        for each in classes
    }
