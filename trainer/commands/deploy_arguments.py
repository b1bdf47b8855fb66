"""The command-line arguments of `trainer deploy`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trainer.commands import dispatch

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_deploy_command(commands: _Commands) -> None:
    """Add `trainer deploy` with its actions."""
    deploy = commands.add_parser("deploy", help="deployments: create, get, list, scale, update, delete")
    deploy.set_defaults(run=dispatch.deploy)
    group = deploy.add_subparsers(required=True, dest="action", metavar="ACTION")

    create = _action(group, "create", "ask for a deployment")
    create.add_argument("name", metavar="NAME", help="clients name it as `model`")
    create.add_argument(
        "--model", required=True, metavar="MODEL", help="run, adapter directory, model directory, hub name"
    )
    create.add_argument("--deployment-shape", default="cpu", metavar="S", help="file of configs/deployments")
    create.add_argument("--account", default="admin", metavar="ACCOUNT", help="its owner")
    create.add_argument("--region", default="local", metavar="R", help="where it runs; fixed from then on")
    create.add_argument("--enable-addons", action="store_true", help="let adapters be loaded")
    _scaling(create)
    create.add_argument(
        "--print", choices=("k8s", "sky"), help="write manifests or a task for a cluster; untested there"
    )
    create.add_argument("--image", metavar="IMAGE", help="--print k8s: container image with this package and the model")
    create.add_argument("--setup", metavar="COMMAND", help="--print sky: installs this package, fetches the model")
    _json(create)

    for name, text in (("get", "state, replicas, last cold start"), ("delete", "end it, after its requests in flight")):
        one = _action(group, name, text)
        one.add_argument("name", metavar="NAME")
        _json(one)
    _json(_action(group, "list", "all deployments"))

    scale = _action(group, "scale", "change replicas, windows and thresholds")
    scale.add_argument("name", metavar="NAME")
    _scaling(scale)
    _json(scale)

    update = _action(group, "update", "roll over to another model or shape, without a failed request")
    update.add_argument("name", metavar="NAME")
    update.add_argument("--model", metavar="MODEL")
    update.add_argument("--deployment-shape", metavar="S")
    update.add_argument("--enable-addons", action="store_true", default=None, help="let adapters be loaded")
    _json(update)


def _scaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-replica-count", type=int, metavar="N", help="0 (default) costs nothing while nobody calls"
    )
    parser.add_argument("--max-replica-count", type=int, metavar="N", help="1 when left out")
    parser.add_argument("--scale-to-zero-window", metavar="TIME", help="without a request; 5m when left out")
    parser.add_argument("--scale-up-threshold", type=float, metavar="N", help="sequences per replica; 8 when left out")
    parser.add_argument(
        "--scale-down-threshold", type=float, metavar="N", help="per remaining replica; 2 when left out"
    )
    parser.add_argument("--scale-down-window", metavar="TIME", help="for how long; 30s when left out")
    parser.add_argument("--max-wait", metavar="TIME", help="of a request for a replica; 2m when left out")


def _action(group: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--store", metavar="URL", help="sqlite:///FILE or postgresql://...; TRAINER_STORE; runs/.control"
    )
    return parser


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
