"""Fine-tuning from one recipe: SFT and GRPO-based RFT that survives losing its machine.

The public names below are loaded when they are first used, without torch; `import trainer` itself loads nothing.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trainer.jobs import Job, Outcome, reconnect_and_wait, submit
    from trainer.rewards.contract import Score
    from trainer.types import Row

__version__ = "0.1.0"
__all__ = ["Job", "Outcome", "Row", "Score", "reconnect_and_wait", "submit"]

_MODULES: Final = {
    "Job": "trainer.jobs",
    "Outcome": "trainer.jobs",
    "Row": "trainer.types",
    "Score": "trainer.rewards.contract",
    "reconnect_and_wait": "trainer.jobs",
    "submit": "trainer.jobs",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})


# bitsandbytes warns in every process, on CPUs with AVX512-BF16, that an optional kernel of a hub cannot be loaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
