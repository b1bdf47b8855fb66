"""The command-line arguments by which a recipe is resolved: RECIPE, --set, --shape."""

from __future__ import annotations

import argparse


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--set` and `--shape`; the values are in `.set` and `.shape`."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    parser.add_argument("--shape", metavar="NAME", help="training shape; the recipe's when left out")


def add_recipe_arguments(parser: argparse.ArgumentParser, help: str = "path of the recipe") -> None:
    """Add RECIPE, `--set` and `--shape`; the recipe is in `.recipe`."""
    parser.add_argument("recipe", metavar="RECIPE", help=help)
    add_override_arguments(parser)


def override_argv(arguments: argparse.Namespace) -> list[str]:
    """`--set` and `--shape` as they were given, for the command line of another process.

    >>> override_argv(argparse.Namespace(set=["steps=3"], shape="cpu"))
    ['--set', 'steps=3', '--shape', 'cpu']
    """
    argv = [part for assignment in arguments.set for part in ("--set", assignment)]
    return argv + (["--shape", arguments.shape] if arguments.shape else [])
