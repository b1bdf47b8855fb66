"""`trainer deploy create --print`: a deployment as Kubernetes manifests or a SkyServe task. Untested on a cluster.

Each pod or machine serves the model by itself; nothing carries deployments out there, so that scaling is the cluster's:
an autoscaler that keeps at least one replica.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any, Final

import yaml

from trainer.config.deployment_shape import DeploymentShape
from trainer.jobs.kubernetes_job import object_name
from trainer.jobs.sky_task import ACCELERATORS

if TYPE_CHECKING:
    from trainer.control.deployments import Spec

UNTESTED: Final = "# Untested: written from the documentation of {target}, never applied to a cluster.\n"
PORT: Final = 8000
SECRET: Final = "trainer-store"
"""Has the key TRAINER_STORE, the URL of a PostgreSQL."""


def kubernetes_manifests(name: str, spec: Spec, shape: DeploymentShape, image: str) -> str:
    """A Deployment, its Service and its autoscaler.

    Args:
        name: of the deployment.
        spec: what is asked for.
        shape: of a replica.
        image: container image with this package and the model.
    """
    label, metadata = {"app": object_name(name)}, {"name": object_name(name)}
    limits = {"nvidia.com/gpu": str(shape.devices)} if shape.device == "cuda" else {"cpu": str(shape.devices)}
    container: dict[str, Any] = {
        "name": "trainer",
        "image": image,
        "command": ["trainer", *_serve(name, spec, shape)],
        "ports": [{"containerPort": PORT}],
        "envFrom": [{"secretRef": {"name": SECRET}}],
        "resources": {"limits": limits, "requests": limits},
        "startupProbe": {"httpGet": {"path": "/health", "port": PORT}, "failureThreshold": 120, "periodSeconds": 5},
        "livenessProbe": {"httpGet": {"path": "/health", "port": PORT}},
    }
    pod: dict[str, Any] = {"containers": [container], "terminationGracePeriodSeconds": 75}
    if spec.region != "local":
        pod["nodeSelector"] = {"topology.kubernetes.io/region": spec.region}
    least = max(1, spec.min_replicas)
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": least,
            "selector": {"matchLabels": label},
            "template": {"metadata": {"labels": label}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": label, "ports": [{"port": 80, "targetPort": PORT}]},
    }
    resource = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
    }
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": object_name(name)},
            "minReplicas": least,
            "maxReplicas": spec.max_replicas,
            "metrics": [resource],
        },
    }
    return UNTESTED.format(target="Kubernetes") + yaml.safe_dump_all([deployment, service, scaler], sort_keys=False)


def sky_service(name: str, spec: Spec, shape: DeploymentShape, setup: str) -> str:
    """A task for `sky serve up`.

    Args:
        name: of the deployment.
        spec: what is asked for.
        shape: of a replica.
        setup: command that installs this package and fetches the model on a bare machine.
    """
    resources: dict[str, Any] = {"ports": PORT}
    if shape.device == "cuda":
        resources["accelerators"] = f"{ACCELERATORS.get(shape.device_name, shape.device_name)}:{shape.devices}"
    if spec.region != "local":
        resources["region"] = spec.region
    document = {
        "name": object_name(name),
        "service": {
            "readiness_probe": "/health",
            "replica_policy": {
                "min_replicas": spec.min_replicas,
                "max_replicas": spec.max_replicas,
                "target_qps_per_replica": spec.scale_up,
                "downscale_delay_seconds": int(spec.scale_down_s),
            },
        },
        "resources": resources,
        "envs": {"TRAINER_STORE": ""},
        "setup": setup,
        "run": shlex.join(["trainer", *_serve(name, spec, shape)]),
    }
    return UNTESTED.format(target="SkyPilot") + yaml.safe_dump(document, sort_keys=False)


def _serve(name: str, spec: Spec, shape: DeploymentShape) -> list[str]:
    """The command of one replica."""
    words = ["serve", spec.model, "--served-name", name, "--host", "0.0.0.0", "--port", str(PORT), "--with-accounts"]
    words += ["--engine", shape.engine, "--max-rows", str(shape.limits.max_rows)]
    words += ["--kv-cache-tokens", str(shape.limits.kv_cache_tokens), "--max-queue", str(shape.limits.max_queue)]
    for addon, target in spec.addons.items():
        words += ["--adapter", f"{addon}={target}"]
    return words
