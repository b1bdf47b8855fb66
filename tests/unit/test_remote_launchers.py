"""SkyPilot tasks and Kubernetes jobs: validated by their own schemas, and what makes a run survive there read back."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from small_recipe import RFT, SFT, write_small

from trainer.commands.cli import main

KUBERNETES = "1.37"
MIRRORED = SFT + "checkpoint: {mirror: 's3://bucket/runs'}\nrecovery: {grace_period_s: 44.5}\n"
SKY_PYTHON = Path(__file__).parents[2] / ".venv-sky/bin/python"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], recipe: str, *argv: str) -> dict[str, Any]:
    write_small(Path.cwd(), recipe)
    assert main(["submit", "recipe.yaml", *argv, "--print"]) == 0
    assert not Path("runs").exists()
    document = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def refused(capsys: pytest.CaptureFixture[str], recipe: str, *argv: str) -> str:
    write_small(Path.cwd(), recipe)
    assert main(["submit", "recipe.yaml", *argv]) == 2
    return capsys.readouterr().err


def sky(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    return printed(capsys, MIRRORED, "--launcher", "sky", "--sky", "setup=pip install .", *argv)


def k8s(capsys: pytest.CaptureFixture[str], *argv: str, recipe: str = MIRRORED) -> dict[str, Any]:
    return printed(capsys, recipe, "--launcher", "k8s", "--k8s", "image=registry/me/trainer:1", *argv)


def test_sky_task_recovers_preemptions_and_nothing_else(capsys):
    task = sky(capsys, "--shape", "h100x8", "--set", "steps=20", "--name", "other")
    assert task["resources"] == {
        "use_spot": True,
        "accelerators": "H100:8",
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }
    assert task["run"] == "exec python3 -m trainer train recipe.yaml --set=steps=20 --shape h100x8 --name other"
    assert (task["name"], task["setup"], task["workdir"]) == ("other", "pip install .", ".")


def test_sky_task_brings_inputs_that_git_may_ignore(capsys):
    assert sky(capsys)["file_mounts"] == {
        "~/sky_workdir/model": "./model",
        "~/sky_workdir/train.jsonl": "./train.jsonl",
        "~/sky_workdir/eval.jsonl": "./eval.jsonl",
    }


def test_sky_options_reach_the_resources(capsys):
    options = ["--sky", "infra=aws", "--sky", "use_spot=false", "--sky", "disk_size=200", "--shape", "cpu"]
    resources = sky(capsys, *options)["resources"]
    assert (resources["infra"], resources["use_spot"], resources["disk_size"]) == ("aws", False, 200)
    assert resources["memory"].endswith("+")


@pytest.mark.parametrize(
    ("recipe", "argv", "said"),
    [
        (SFT, [], "checkpoint.mirror is not set: the run would be lost with its machine."),
        (
            MIRRORED.replace("dcp_save_interval: 5", "dcp_save_interval: 0"),
            [],
            "dcp_save_interval is 0: the run would be lost",
        ),
        (MIRRORED, ["--shape", "h100x16"], "shape h100x16 has 2 machines, whose ranks save into one run directory"),
        (MIRRORED, ["--sky", "spot=yes"], "--sky spot: no such option. There are: accelerators, cpus, disk_size,"),
        (MIRRORED, ["--k8s", "image=a"], "--k8s goes with --launcher k8s"),
        (MIRRORED, ["--partition", "gpu"], "--partition, --time and --slurm go with --launcher slurm"),
    ],
)
def test_sky_refuses_what_cannot_work(capsys, recipe, argv, said):
    argv = ["--launcher", "sky", "--sky", "setup=true", *argv, "--print"]
    assert said in refused(capsys, recipe, *argv)


def test_remote_launchers_submit_nothing_themselves(capsys):
    assert refused(capsys, MIRRORED, "--launcher", "k8s", "--k8s", "image=a") == (
        "--launcher k8s submits nothing itself. Add --print > job.yaml, then: kubectl create -f job.yaml\n"
    )


@pytest.mark.parametrize(
    "argv", [["--shape", "cpu"], ["--shape", "h100x8", "--k8s", "queue=team", "--k8s", "pvc=work"]]
)
def test_job_is_valid_and_fails_ignores_or_counts_by_exit_code(capsys, argv):
    job = k8s(capsys, *argv)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    of_container = {"containerName": container["name"], "operator": "In"}
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {**of_container, "values": [2]}},
        {"action": "Ignore", "onExitCodes": {**of_container, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    assert pod["restartPolicy"] == "Never", "needed by podFailurePolicy"
    assert pod["terminationGracePeriodSeconds"] == 60  # 44.5 rounded up, and 15
    assert spec["backoffLimit"] == 3


def test_job_has_gpus_queue_and_volume(capsys):
    options = ("queue=team", "pvc=work", "dir=/mnt/me", "product=NVIDIA-H100-80GB-HBM3", "secret=hub", "namespace=ml")
    argv = [word for option in options for word in ("--k8s", option)]
    job = k8s(capsys, "--shape", "h100x8", *argv)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    assert job["metadata"] == {
        "name": "small", "namespace": "ml", "labels": {"kueue.x-k8s.io/queue-name": "team"}
    }  # fmt: skip
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert container["workingDir"] == "/mnt/me"
    assert {"name": "project", "mountPath": "/mnt/me"} in container["volumeMounts"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]


def test_job_without_volume_needs_a_mirror(capsys):
    argv = ["--launcher", "k8s", "--k8s", "image=a", "--print"]
    assert "Set it to a bucket, or name a volume with --k8s pvc=CLAIM." in refused(capsys, SFT, *argv)
    write_small(Path.cwd(), RFT)
    assert main(["submit", "recipe.yaml", *argv, "--k8s", "pvc=work"]) == 0


def test_several_nodes_are_a_job_set_of_one_indexed_job(capsys):
    job_set = k8s(capsys, "--shape", "h100x16", "--k8s", "pvc=work", "--k8s", "queue=team")
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert job_set["spec"]["failurePolicy"] == {
        "maxRestarts": 3,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (nodes,) = job_set["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, **nodes["template"]}
    kubernetes_validate.validate(inner, KUBERNETES, strict=True)
    spec = inner["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"], spec["backoffLimit"]) == (
        2,
        2,
        "Indexed",
        0,
    )
    command = spec["template"]["spec"]["containers"][0]["command"][2]
    assert "--nnodes 2 --nproc-per-node 8" in command
    assert "--node-rank $JOB_COMPLETION_INDEX --master-addr small-node-0-0.small --master-port 29500" in command


@pytest.mark.parametrize(
    ("code_of_torchrun", "outcome", "code"), [(1, 75, 75), (1, 2, 2), (1, None, 1), (0, 0, 0)], ids=str
)
def test_node_of_several_ends_with_the_exit_code_of_the_run(capsys, directory, code_of_torchrun, outcome, code):
    """Torchrun ends with 1 whatever its workers end with; a stale outcome does not count."""
    command = k8s(capsys, "--shape", "h100x16", "--k8s", "pvc=work")["spec"]["replicatedJobs"][0]
    command = command["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    run = directory / "runs/small"
    run.mkdir(parents=True)
    (run / "outcome.json").write_text(json.dumps({"state": "preempted", "exit_code": 75}))
    writes = "" if outcome is None else f"echo '{json.dumps({'exit_code': outcome})}' > runs/small/outcome.json\n"
    python = directory / "python3"
    python.write_text(f"#!/bin/sh\n{writes}exit {code_of_torchrun}\n")
    python.chmod(0o755)
    done = subprocess.run(command, env={"PATH": f"{directory}:/usr/bin:/bin"}, cwd=directory, check=False)
    assert done.returncode == code


@pytest.mark.heavy
@pytest.mark.skipif(not SKY_PYTHON.is_file(), reason="needs .venv-sky with skypilot (docs/jobs.md)")
def test_skypilot_reads_the_fields_of_the_task(capsys, directory):
    (directory / "task.yaml").write_text(yaml.safe_dump(sky(capsys, "--shape", "h100x8", "--sky", "infra=aws")))
    program = """\
        import json, sky
        task = sky.Task.from_yaml("task.yaml")
        (resources,) = task.resources
        print(json.dumps([task.name, task.run, task.setup, task.num_nodes, task.workdir, task.file_mounts,
                          resources.use_spot, resources.accelerators, str(resources.cloud), resources.job_recovery]))
    """
    done = subprocess.run(
        [SKY_PYTHON, "-c", textwrap.dedent(program)], cwd=directory, capture_output=True, text=True, check=True
    )
    name, run, setup, nodes, workdir, mounts, is_spot, accelerators, cloud, recovery = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert (name, setup, nodes, cloud) == ("small", "pip install .", 1, "AWS")
    assert run == "exec python3 -m trainer train recipe.yaml --shape h100x8 --name small"
    assert Path(workdir) in {directory, Path()}
    assert mounts["~/sky_workdir/model"].endswith("model")
    assert (is_spot, accelerators) == (True, {"H100": 8})
    assert recovery["recover_on_exit_codes"] == [75]
    assert recovery["max_restarts_on_errors"] == 0
