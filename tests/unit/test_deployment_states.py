"""The table of transitions, and deployments as the store keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from stores import ACTOR, with_team

from trainer.config.deployment_shape import find_deployment_shape
from trainer.control import audit
from trainer.control.accounts import AccountError
from trainer.control.deployments import (
    Spec,
    advance,
    change_deployment,
    create_deployment,
    delete_deployment,
    get_deployment,
    lead,
    leader,
    list_deployments,
    resign,
    save_status,
)
from trainer.control.lifecycle import TRANSITIONS, Event, State, TransitionError, after
from trainer.control.quotas import set_quota
from trainer.control.store import Store
from trainer.errors import RecipeError, ShapeError, UserError
from trainer.serve.deployed import shape_for

SPEC = Spec(model="m", shape="cpu")
STATES, EVENTS = get_args(State), get_args(Event)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return with_team(tmp_path)


def bring_to(store: Store, state: State) -> None:
    """Make a deployment `d` in a state, by the events of a life."""
    ways: dict[State, tuple[Event, ...]] = {
        "CREATING": (),
        "DEPLOYING": ("place",),
        "DEPLOYED": ("place", "ready"),
        "SCALING": ("place", "ready", "scale"),
        "UPDATING": ("place", "ready", "update"),
        "FAILED": ("place", "fail"),
        "DELETING": ("delete",),
        "DELETED": ("delete", "gone"),
    }
    create_deployment(store, ACTOR, "team", "d", SPEC)
    for event in ways[state]:
        advance(store, "d", event)
    assert get_deployment(store, "d").state == state


@pytest.mark.parametrize(("state", "event"), sorted(TRANSITIONS))
def test_each_transition_is_made_and_kept(store: Store, state: State, event: Event) -> None:
    bring_to(store, state)
    advance(store, "d", event, "why", observed=7)
    found = get_deployment(store, "d")
    assert (found.state, found.problem, found.observed) == (TRANSITIONS[state, event], "why", 7)


@pytest.mark.parametrize("state", STATES)
def test_an_event_that_a_state_does_not_have_changes_nothing(store: Store, state: State) -> None:
    bring_to(store, state)
    before = get_deployment(store, "d")
    for event in EVENTS:
        if (state, event) not in TRANSITIONS:
            with pytest.raises(TransitionError):
                after(state, event)
            assert advance(store, "d", event, "why") == state
    assert get_deployment(store, "d") == before


def test_every_state_is_reached_and_every_one_but_deleted_can_be_deleted() -> None:
    assert {"CREATING", *TRANSITIONS.values()} == set(STATES)
    assert {state for state, event in TRANSITIONS if event == "delete"} == set(STATES) - {"DELETING", "DELETED"}
    assert {state for state, event in TRANSITIONS if event == "resume"} == set(STATES) - {"DELETED"}


def test_a_deployment_is_created_changed_deleted_and_created_again(store: Store) -> None:
    made = create_deployment(store, ACTOR, "team", "d", SPEC)
    assert (made.state, made.generation, made.observed, made.spec) == ("CREATING", 1, 0, SPEC)
    with pytest.raises(AccountError, match="deployment 'd' exists, in state CREATING"):
        create_deployment(store, ACTOR, "team", "d", SPEC)
    changed = change_deployment(store, ACTOR, "d", "scale", {"max_replicas": 3})
    assert (changed.generation, changed.spec.max_replicas) == (2, 3)
    save_status(store, "d", {"replicas": []})
    with pytest.raises(AccountError, match="is in region local, which is fixed at creation"):
        change_deployment(store, ACTOR, "d", "update", {"region": "eu"})
    delete_deployment(store, ACTOR, "d")
    with pytest.raises(AccountError, match="is in state DELETING"):
        change_deployment(store, ACTOR, "d", "scale", {"max_replicas": 2})
    advance(store, "d", "gone")
    assert list_deployments(store) == []
    assert create_deployment(store, ACTOR, "team", "d", SPEC).generation == 1
    actions = [entry.action for entry in audit.entries(store)]
    assert actions == ["account.create", "deploy.create", "deploy.scale", "deploy.delete", "deploy.create"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_replicas": 2}, "replicas 2 to 1"),
        ({"max_replicas": 0}, "a maximum of 1"),
        ({"scale_down": 9}, "scale-down at 9 must be below scale-up at 8"),
        ({"scale_to_zero_s": 0}, "must be positive"),
    ],
)
def test_a_specification_that_contradicts_itself_is_refused(
    store: Store, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(AccountError, match=message):
        create_deployment(store, ACTOR, "team", "d", Spec(**{**vars(SPEC), **changes}))
    create_deployment(store, ACTOR, "team", "d", SPEC)
    with pytest.raises(AccountError, match=message):
        change_deployment(store, ACTOR, "d", "scale", changes)


def test_the_quota_of_replicas_counts_all_deployments_of_an_account(store: Store) -> None:
    set_quota(store, ACTOR, "team", {"replicas": "3"})
    create_deployment(store, ACTOR, "team", "a", Spec(model="m", shape="cpu", max_replicas=2))
    with pytest.raises(AccountError, match="the deployments of team could have 4, its quota is 3"):
        create_deployment(store, ACTOR, "team", "b", Spec(model="m", shape="cpu", max_replicas=2))
    create_deployment(store, ACTOR, "team", "b", SPEC)
    with pytest.raises(AccountError, match="could have 4"):
        change_deployment(store, ACTOR, "b", "scale", {"max_replicas": 2})
    delete_deployment(store, ACTOR, "a")
    advance(store, "a", "gone")
    change_deployment(store, ACTOR, "b", "scale", {"max_replicas": 3})


def test_one_process_carries_deployments_out(store: Store) -> None:
    assert leader(store) is None
    assert lead(store) is None
    assert lead(store) is None  # again: stays
    assert leader(store) is not None
    resign(store)
    assert leader(store) is None


def test_shapes_say_what_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_deployment_shape("cpu").engine == "embedded"
    with pytest.raises(UserError, match="precision fp8 and takes no addons"):
        shape_for(Spec(model="m", shape="h100x1_fp8", is_addons_enabled=True))
    with pytest.raises(UserError, match="it does not start vllm on cuda"):
        shape_for(Spec(model="m", shape="h100x1"))
    with pytest.raises(ShapeError, match="no deployment shape `cpuu`; did you mean `cpu`"):
        find_deployment_shape("cpuu")
    (tmp_path / "configs" / "deployments").mkdir(parents=True)
    mine = tmp_path / "configs" / "deployments" / "mine.yaml"
    limits = "limits: {kv_cache_tokens: 1, max_rows: 1, max_queue: 1}\n"
    mine.write_text(f"name: mine\ndevice: cpu\ndevice_name: CPU\nprecision: fp8\n{limits}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="precision fp8 cannot have addons"):
        find_deployment_shape("mine")
    mine.write_text(f"name: mine\ndevice: tpu\ndevice_name: CPU\n{limits}")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: device"):
        find_deployment_shape("mine")
