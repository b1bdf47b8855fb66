"""Other names of commands: those that work, and those that other tools use."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Final

ALIASES: Final = {
    "compare": "diff",
    "evaluate": "eval",
    "list": "runs",
    "log": "logs",
    "ls": "runs",
    "resume": "reconnect",
    "rm": "delete",
    "new": "init",
    "stop": "cancel",
    "verify": "verify-resume",
}
"""Other names of commands; they work, and `--help` does not list them."""
MEANT: Final = {
    "finetune": "train",
    "fit": "train",
    "create": "init",
    "quickstart": "init",
    "start": "init",
    "inference": "generate",
    "import": "import-config",
    "infer": "generate",
    "kill": "cancel",
    "lint": "check",
    "merge": "export",
    "predict": "generate",
    "preview": "check",
    "samples": "rollouts",
    "sft": "train",
    "tail": "logs",
    "test": "eval",
    "validate": "check",
}
"""Names that other tools use, for the question "did you mean ...?"."""


def guess(word: str, names: Collection[str]) -> str:
    """The command that was meant, or all of them.

    >>> guess("trian", ["train", "runs"]), guess("xyz", ["train", "runs"])
    ('; did you mean `train`?', '. There are: train, runs')
    """
    known = [*names, *ALIASES]
    similar = MEANT.get(word) or next(iter(difflib.get_close_matches(word, known, n=1)), None)
    if similar is not None:
        return f"; did you mean `{ALIASES.get(similar, similar)}`?"
    return f". There are: {', '.join(names)}"
