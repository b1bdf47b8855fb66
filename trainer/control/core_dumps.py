"""No core dumps of processes that handle prompts."""

from __future__ import annotations

import resource


def forbid_core_dumps() -> None:
    """No core dump of this process and its children: it would hold prompts.

    A limit of 0 does not stop dumps that the kernel pipes to a program; it drops those of a process whose limit is 1.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
