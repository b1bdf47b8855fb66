"""The Kubernetes Job of a run, or the JobSet of several nodes, as YAML for `kubectl create`.

Exit code 2 (the user must change something) fails the Job at once. Exit code 75 (preempted) and a disruption of the
pod (drained, preempted, evicted) start another pod without counting; it resumes from the volume or the mirror. Other
failures count towards `backoffLimit`. (kubernetes.io, Pod failure policy; jobset.sigs.k8s.io, failure policy)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from trainer.errors import EXIT_PREEMPTED, EXIT_USER, LaunchError
from trainer.jobs.remote import RemoteRun, gpus_of_node, refuse_unknown

OPTIONS: Final = ("image", "dir", "pvc", "queue", "namespace", "gpu", "product", "secret")
"""Keys of `--k8s`: image, project directory in it, volume claim mounted there, Kueue's queue, namespace, name of the
GPU resource, value of the node label nvidia.com/gpu.product, secret whose keys become environment variables."""
CONTAINER: Final = "trainer"
NODE: Final = "node"
"""Name of the JobSet's only replicated job."""
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
INDEX: Final = "$JOB_COMPLETION_INDEX"
"""Environment variable of an indexed Job's pods."""
MARGIN_S: Final = 15
"""How much longer than the grace period Kubernetes waits before it kills."""
MAX_NAME: Final = 40
"""Pods of a JobSet are named NAME-node-0-N-xxxxx, in 63 characters."""


def kubernetes_job(remote: RemoteRun, options: Mapping[str, str]) -> str:
    """The text of a Job, or of a JobSet where the shape has several nodes.

    Args:
        remote: what is run.
        options: of `--k8s`.

    Raises:
        LaunchError: the run would be lost with its pod, or an option is missing or unknown.
    """
    refuse_unknown(options, OPTIONS, "--k8s")
    if "image" not in options:
        raise LaunchError("--k8s image=IMAGE is missing: a container image with this package and your project")
    nodes = remote.plan.shape.nodes
    if nodes > 1 and "pvc" not in options:
        raise LaunchError(
            f"{nodes} nodes save into one run directory: name a ReadWriteMany volume with --k8s pvc=CLAIM"
        )
    if "pvc" not in options:
        remote.refuse_loss("Set it to a bucket, or name a volume with --k8s pvc=CLAIM.")
    document = _job(remote, options) if nodes == 1 else _job_set(remote, options)
    return yaml.safe_dump(document, sort_keys=False)


def object_name(run: str) -> str:
    """A run's name as Kubernetes allows it.

    >>> object_name("Sums_v1.2")
    'sums-v1-2'

    Args:
        run: name of the run.
    """
    return re.sub(r"[^a-z0-9]+", "-", run.lower())[:MAX_NAME].strip("-")


def _job(remote: RemoteRun, options: Mapping[str, str]) -> dict[str, Any]:
    spec = {"backoffLimit": remote.plan.recipe.recovery.max_restarts, **_job_spec(remote, options, remote.command())}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(remote, options), "spec": spec}


def _job_set(remote: RemoteRun, options: Mapping[str, str]) -> dict[str, Any]:
    """All nodes start again together where one of them fails, except with exit code 2."""
    name, nodes = object_name(remote.run.name), remote.plan.shape.nodes
    command = remote.command_of_node(INDEX, f"{name}-{NODE}-0-0.{name}", "k8s")
    pods = {"parallelism": nodes, "completions": nodes, "completionMode": "Indexed", "backoffLimit": 0}
    refused = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    spec = {
        "failurePolicy": {"maxRestarts": remote.plan.recipe.recovery.max_restarts, "rules": [refused]},
        "replicatedJobs": [
            {"name": NODE, "replicas": 1, "template": {"spec": pods | _job_spec(remote, options, command)}}
        ],
    }
    metadata = _metadata(remote, options)
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _metadata(remote: RemoteRun, options: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": object_name(remote.run.name)}
    if "namespace" in options:
        found["namespace"] = options["namespace"]
    if "queue" in options:
        found["labels"] = {QUEUE_LABEL: options["queue"]}
    return found


def _job_spec(remote: RemoteRun, options: Mapping[str, str], command: str) -> dict[str, Any]:
    return {"podFailurePolicy": {"rules": _rules()}, "template": {"spec": _pod(remote, options, command)}}


def _rules() -> list[dict[str, Any]]:
    def on_exit(action: str, code: int) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}

    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [on_exit("FailJob", EXIT_USER), on_exit("Ignore", EXIT_PREEMPTED), disrupted]


def _pod(remote: RemoteRun, options: Mapping[str, str], command: str) -> dict[str, Any]:
    shape, directory = remote.plan.shape, options.get("dir", "/work")
    memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # ranks exchange data through /dev/shm
    volumes, mounts = [memory], [{"name": "shm", "mountPath": "/dev/shm"}]
    if "pvc" in options:
        volumes.append({"name": "project", "persistentVolumeClaim": {"claimName": options["pvc"]}})
        mounts.append({"name": "project", "mountPath": directory})
    gpus = {options.get("gpu", "nvidia.com/gpu"): str(gpus_of_node(shape))} if shape.gpus else {}
    host = {"memory": f"{math.ceil(shape.gpu_memory_gib)}Gi"} if not shape.gpus else {}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": options["image"],
        "workingDir": directory,
        "command": ["/bin/sh", "-c", command],
        "resources": {"limits": gpus | host},
        "volumeMounts": mounts,
    }
    if "secret" in options:
        container["envFrom"] = [{"secretRef": {"name": options["secret"]}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(remote.plan.recipe.recovery.grace_period_s) + MARGIN_S,
        "containers": [container],
        "volumes": volumes,
    }
    if "product" in options:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": options["product"]}
    return pod
