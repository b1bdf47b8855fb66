"""The training API: the verbs of a training loop that a client owns, on slots of one base model.

In process, `open_service` gives the verbs as methods. `python -m trainer.api` is the executor behind `/api/v1` of
`trainer serve --training`; the gateway starts it by its command line. The public names are loaded when they are first
used: `datum`, `wire` and `protocol` are without torch, the others are not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trainer.api.datum import Datum
    from trainer.api.service import Service, TrainingModel, open_service
    from trainer.api.slots import Passed

__all__ = ["Datum", "Passed", "Service", "TrainingModel", "open_service"]
_MODULES: Final = {
    "Datum": "trainer.api.datum",
    "Passed": "trainer.api.slots",
    "Service": "trainer.api.service",
    "TrainingModel": "trainer.api.service",
    "open_service": "trainer.api.service",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
