"""`python -m trainer.serve.ray_placer`: the only process that speaks Ray; places, finds and ends replicas.

Ray ends a process that uses it when the cluster's head is away for a minute, so it is not the gateway's. One JSON object
a line on standard input, and one reply each on standard output, in any order:

    {"id": 1, "op": "place", "name": "orders-3f2a", "words": [...], "region": "eu", "cpus": 1, "gpus": 0, ...}
    {"id": 2, "op": "find", "name": "orders-3f2a"}
    {"id": 3, "op": "end", "name": "orders-3f2a"}
    {"id": 4, "op": "find_nodes"}

    {"id": 1, "ok": true, "address": ["10.0.0.7", 41231], "pid": 812, "node": "7c...", ...}
    {"id": 1, "ok": false, "kind": "place", "error": "no node of region eu lives; there are: us"}
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

import trainer
from trainer.serve.ray_actor import ReplicaActor

REGION_LABEL: Final = "region"
"""Of nodes: `ray start --labels region=eu`."""
PLACE_S: Final = 60.0
"""How long Ray may take to start an actor where there is room."""
ANSWER_S: Final = 10.0
"""How long a living actor may take to answer."""
NUM_THREADS: Final = 32


class PlacingError(Exception):
    """A replica that is not placed; `kind` is `place` where it may be placed later, else `wrong`."""

    def __init__(self, kind: str, message: str) -> None:
        """Keep both."""
        super().__init__(message)
        self.kind = kind


def place(request: dict[str, Any]) -> dict[str, Any]:
    """Start a replica; asked again for the same name, it is the one that was started.

    Raises:
        PlacingError: there is no room now, or the engine cannot be started there.
    """
    region, cpus, gpus = request["region"], request["cpus"], request["gpus"]
    _need_room(region, {"CPU": cpus, "GPU": gpus})
    actor = (
        ray.remote(ReplicaActor)
        .options(
            name=request["name"],
            namespace=request["namespace"],
            lifetime="detached",  # it outlives this process
            get_if_exists=True,
            num_cpus=cpus,
            num_gpus=gpus,
            label_selector={REGION_LABEL: region},
            max_concurrency=4,
        )
        .remote(request["words"], request["directory"], request["secret"])
    )
    try:
        found = ray.get(actor.begin.remote(), timeout=PLACE_S)
    except GetTimeoutError:
        ray.kill(actor)
        raise PlacingError("place", f"no node of region {region} had room within {PLACE_S:.0f} s") from None
    except RayActorError as error:
        raise PlacingError("place", f"its node was lost: {_first_line(error)}") from None
    if "problem" in found:
        ray.kill(actor)
        raise PlacingError("wrong", f"node {found['node'][:8]}: {found['problem']}")
    if found["version"] != trainer.__version__:
        ray.kill(actor)
        raise PlacingError(
            "wrong", f"node {found['node'][:8]} has tunesmith {found['version']}, this machine {trainer.__version__}"
        )
    return found


def _need_room(region: str, needs: dict[str, float]) -> None:
    alive = [node for node in ray.nodes() if node["Alive"]]
    regions = sorted({node["Labels"][REGION_LABEL] for node in alive if REGION_LABEL in node["Labels"]})
    inside = [node for node in alive if node["Labels"].get(REGION_LABEL) == region]
    if not inside:
        there = f"there are: {', '.join(regions)}" if regions else "no node has a label `region`"
        raise PlacingError("place", f"no node of region {region} lives; {there}")
    words = " and ".join(f"{value:g} {name}" for name, value in needs.items() if value)
    if not any(all(node["Resources"].get(name, 0) >= value for name, value in needs.items()) for node in inside):
        raise PlacingError("place", f"no node of region {region} has {words}")


def find_nodes(_: dict[str, Any]) -> dict[str, Any]:
    """Whether the cluster answers."""
    return {"num_nodes": sum(node["Alive"] for node in ray.nodes())}


def find(request: dict[str, Any]) -> dict[str, Any]:
    """What a replica says of itself.

    Raises:
        PlacingError: there is none, or it does not answer.
    """
    try:
        actor = ray.get_actor(request["name"], namespace=request["namespace"])
        return dict(ray.get(actor.about.remote(), timeout=ANSWER_S))
    except (ValueError, RayActorError, GetTimeoutError) as error:
        raise PlacingError("wrong", f"there is no replica {request['name']}: {_first_line(error)}") from None


def end(request: dict[str, Any]) -> dict[str, Any]:
    """End a replica; its engine ends with it."""
    try:
        ray.kill(ray.get_actor(request["name"], namespace=request["namespace"]))
    except (ValueError, RayActorError):  # it has ended already
        return {"was_there": False}
    return {"was_there": True}


OPERATIONS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "place": place,
    "find": find,
    "find_nodes": find_nodes,
    "end": end,
}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"id": request["id"], "ok": True, **OPERATIONS[request["op"]](request)}
    except PlacingError as error:
        return {"id": request["id"], "ok": False, "kind": error.kind, "error": str(error)}
    except RayError as error:
        return {"id": request["id"], "ok": False, "kind": "place", "error": _first_line(error)}
    except Exception as error:  # a reply is owed
        text = f"{type(error).__name__}: {_first_line(error)}"
        return {"id": request["id"], "ok": False, "kind": "place", "error": text}


def main(argv: list[str] | None = None) -> int:
    """Answer until standard input is closed."""
    parser = argparse.ArgumentParser(prog="python -m trainer.serve.ray_placer", description=__doc__)
    parser.add_argument("--address", required=True, help="of the cluster, HOST:PORT, or auto")
    arguments = parser.parse_args(argv)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no reply
    try:
        ray.init(address=arguments.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        sys.stderr.write(f"{_first_line(error)}\n")
        return 2
    lock = threading.Lock()

    def reply(request: dict[str, Any]) -> None:
        line = json.dumps(_answer(request)) + "\n"
        with lock:
            replies.write(line)
            replies.flush()

    with lock:
        replies.write(json.dumps({"hello": "ray_placer"}) + "\n")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for received in sys.stdin:
            pool.submit(reply, json.loads(received))
    return 0


if __name__ == "__main__":
    sys.exit(main())
