"""`trainer deploy`: ask for deployments; `trainer serve --deployments` carries them out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from trainer.commands.tables import table_lines
from trainer.config.deployment_shape import find_deployment_shape
from trainer.control.durations import seconds_of
from trainer.errors import UserError
from trainer.run.console import tell

if TYPE_CHECKING:
    from trainer.control.deployments import Deployment, Spec
    from trainer.control.store import Store

TIMES: Final = {
    "scale_to_zero_window": "scale_to_zero_s",
    "scale_down_window": "scale_down_s",
    "max_wait": "max_wait_s",
}
VALUES: Final = {
    "model": "model",
    "deployment_shape": "shape",
    "min_replica_count": "min_replicas",
    "max_replica_count": "max_replicas",
    "scale_up_threshold": "scale_up",
    "scale_down_threshold": "scale_down",
    "region": "region",
    "enable_addons": "is_addons_enabled",
}


def deploy(arguments: argparse.Namespace) -> int:
    """Run `trainer deploy`."""
    missing = [name for name in ("sqlalchemy", "alembic") if find_spec(name) is None]
    if missing:
        raise UserError(f"deployments need {' and '.join(missing)}: pip install 'tunesmith[serve,accounts]'")
    from trainer.control import deployments as asked
    from trainer.control.state import local_actor
    from trainer.control.store import Store, store_url

    if getattr(arguments, "print", None) is not None:
        return _print(arguments, asked.Spec(**_changes(arguments)))
    store = Store(store_url(arguments.store)).open()
    match arguments.action:
        case "list":
            found = asked.list_deployments(store)
            rows = [_row(each) for each in found]
            head = ("name", "state", "replicas", "model", "shape", "region", "problem")
            _show(arguments, [asdict(each) for each in found], [head, *rows])
            return 0
        case "get":
            deployment = asked.get_deployment(store, arguments.name)
        case "create":
            spec = asked.Spec(**_changes(arguments))
            _check_shape(spec.shape, is_addons_enabled=spec.is_addons_enabled)
            deployment = asked.create_deployment(store, local_actor(), arguments.account, arguments.name, spec)
        case "delete":
            deployment = asked.delete_deployment(store, local_actor(), arguments.name)
        case action:
            changes = _changes(arguments)
            if not changes:
                raise UserError(f"trainer deploy {action} {arguments.name}: say what to change; --help lists it")
            spec = asked.get_deployment(store, arguments.name).spec
            enabled = bool(changes.get("is_addons_enabled", spec.is_addons_enabled))
            _check_shape(changes.get("shape", spec.shape), is_addons_enabled=enabled)
            deployment = asked.change_deployment(store, local_actor(), arguments.name, action, changes)
    _tell_without_controller(store)
    _show(arguments, asdict(deployment), [("", value) for value in _lines(deployment)])
    return 0


def _print(arguments: argparse.Namespace, spec: Spec) -> int:
    """Write what another system would carry out; nothing is asked for."""
    from trainer.commands.deploy_manifests import kubernetes_manifests, sky_service

    shape, problem = find_deployment_shape(spec.shape), spec.problem()
    if problem is not None:
        raise UserError(problem)
    if spec.is_addons_enabled:
        shape.need_addons()
    needed = {"k8s": "image", "sky": "setup"}[arguments.print]
    value = getattr(arguments, needed)
    if value is None:
        raise UserError(f"--print {arguments.print} needs --{needed}; --help says what it is")
    write = kubernetes_manifests if arguments.print == "k8s" else sky_service
    sys.stdout.write(write(arguments.name, spec, shape, value))
    return 0


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of a specification that the arguments give."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    changes = {field: given[name] for name, field in VALUES.items() if name in given}
    times = {
        field: seconds_of(given[name], f"--{name.replace('_', '-')}") for name, field in TIMES.items() if name in given
    }
    return changes | times


def _check_shape(name: str, *, is_addons_enabled: bool) -> None:
    shape = find_deployment_shape(name)
    if is_addons_enabled:
        shape.need_addons()
    shape.need_local()


def _tell_without_controller(store: Store) -> None:
    from trainer.control.deployments import leader

    if leader(store) is None:
        tell("recorded; no process carries deployments out: start `trainer serve --deployments`")


def _row(deployment: Deployment) -> tuple[str, ...]:
    replicas = deployment.status.get("replicas", [])
    ready, spec = sum(each["is_ready"] for each in replicas), deployment.spec
    count = f"{ready} ({spec.min_replicas} to {spec.max_replicas})"
    problem = deployment.problem or deployment.status.get("problem", "")  # of replicas that have no place yet
    return (deployment.name, deployment.state, count, spec.model, spec.shape, spec.region, problem)


def _lines(deployment: Deployment) -> list[str]:
    names = ("name", "state", "replicas", "model", "shape", "region", "problem")
    lines = [f"{name}: {value}" for name, value in zip(names, _row(deployment), strict=True) if value]
    cold = deployment.status.get("cold_start_s")
    if cold:
        lines.append("cold start: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in cold.items()))
    if deployment.observed < deployment.generation:
        lines.append(f"change {deployment.generation} is not carried out yet")
    return lines


def _show(arguments: argparse.Namespace, document: Any, rows: list[tuple[str, ...]]) -> None:
    if arguments.json:
        sys.stdout.write(json.dumps(document) + "\n")
    elif len(rows[0]) == 2:
        sys.stdout.write("".join(f"{value}\n" for _, value in rows))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in table_lines(rows)))
