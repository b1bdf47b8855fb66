"""States of a deployment, and the one table of transitions between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

State: TypeAlias = Literal["CREATING", "DEPLOYING", "DEPLOYED", "SCALING", "UPDATING", "FAILED", "DELETING", "DELETED"]
Event: TypeAlias = Literal["place", "ready", "scale", "update", "fail", "keep", "delete", "gone", "resume"]
"""place: the control process begins; ready: all replicas that are wanted answer; fail: none can; keep: an update failed
and the old version goes on; gone: nothing is left; resume: a new control process takes over."""

TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    ("CREATING", "place"): "DEPLOYING",
    ("CREATING", "delete"): "DELETING",
    ("CREATING", "resume"): "CREATING",
    ("DEPLOYING", "ready"): "DEPLOYED",
    ("DEPLOYING", "fail"): "FAILED",
    ("DEPLOYING", "delete"): "DELETING",
    ("DEPLOYING", "resume"): "DEPLOYING",
    ("DEPLOYED", "scale"): "SCALING",
    ("DEPLOYED", "update"): "UPDATING",
    ("DEPLOYED", "delete"): "DELETING",
    ("DEPLOYED", "resume"): "DEPLOYING",
    ("SCALING", "ready"): "DEPLOYED",
    ("SCALING", "scale"): "SCALING",
    ("SCALING", "update"): "UPDATING",
    ("SCALING", "fail"): "FAILED",
    ("SCALING", "delete"): "DELETING",
    ("SCALING", "resume"): "DEPLOYING",
    ("UPDATING", "ready"): "DEPLOYED",
    ("UPDATING", "keep"): "DEPLOYED",
    ("UPDATING", "fail"): "FAILED",
    ("UPDATING", "delete"): "DELETING",
    ("UPDATING", "resume"): "DEPLOYING",
    ("FAILED", "update"): "DEPLOYING",
    ("FAILED", "delete"): "DELETING",
    ("FAILED", "resume"): "FAILED",
    ("DELETING", "gone"): "DELETED",
    ("DELETING", "resume"): "DELETING",
}
"""What is not here cannot happen."""


class TransitionError(Exception):
    """An event that a state does not have."""


def after(state: State, event: Event) -> State:
    """The state after an event.

    >>> after("DEPLOYED", "scale")
    'SCALING'

    Raises:
        TransitionError: the state does not have this event.
    """
    if (state, event) not in TRANSITIONS:
        raise TransitionError(f"{state} has no transition for {event!r}")
    return TRANSITIONS[state, event]
