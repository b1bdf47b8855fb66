"""A run under a real Slurm: whatever preempts it, it ends with the bits of a run that nobody disturbs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import pytest
import slurm_lab
from project import BIN, LONG, Done, Project, Run, is_at_step, paused, wait_for
from slurm_lab import Lab

pytestmark = pytest.mark.skipif(slurm_lab.missing() is not None, reason=str(slurm_lab.missing()))
RECIPE: Final = LONG | {"recovery__grace_period_s": 20}
PAIR: Final = LONG | {
    "name": "pair",
    "steps": 150,
    "eval_interval": 50,
    "rows_per_step": 3,
    "shape": "cpu2n.yaml",
    "recovery__grace_period_s": 20,
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with slurm_lab.booted() as lab:
        yield lab


@pytest.fixture(scope="module")
def project(shared: Project, lab: Lab) -> Iterator[Project]:
    shape = {
        "name": "cpu2n", "device": "cpu", "device_name": "CPU", "nodes": 2, "gpus": 2, "gpu_memory_gib": 16,
        "micro_batch_tokens": 256, "accelerate": "cpu",
        "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
    }  # fmt: skip
    (shared.root / "cpu2n.yaml").write_text(json.dumps(shape))
    shared.recipe("long.yaml", **RECIPE)
    shared.recipe("pair.yaml", **PAIR)
    yield shared
    lab.stop_jobs()


def trainer(project: Project, lab: Lab, *arguments: str) -> Done:
    done = project.start([str(BIN / "trainer"), *arguments], lab.environment).wait()
    assert done.code == 0, done.said
    return done


def state(project: Project, lab: Lab, name: str) -> str:
    jobs: list[dict[str, Any]] = json.loads(trainer(project, lab, "jobs", "--json").stdout)
    return next(str(job["state"]) for job in jobs if job["job"] == f"runs/{name}")


def slurm_id(run: Run) -> str:
    return str(json.loads((run.root / "job.json").read_text())["slurm_id"])


def wait_for_attempt(run: Run, number: int, steps: int) -> None:
    """Wait until an attempt has made some steps."""
    heartbeat = run.root / "heartbeat.json"
    wait_for(heartbeat.exists)

    def has_made_a_step() -> bool:
        beat = json.loads(heartbeat.read_text())
        return beat["attempt"] == number and beat["step"] > 0

    wait_for(has_made_a_step)
    wait_for(is_at_step(run, run.steps()[-1] + steps))


def urge(lab: Lab) -> str:
    """A job that takes both nodes from everybody else."""
    wants = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    return lab.command("sbatch", "--parsable", *wants)


def test_three_preemptions_leave_no_trace(project: Project, lab: Lab) -> None:
    undisturbed = project.start_worker("long.yaml", "--name", "whole")
    whole, run = project.run("whole"), project.run("preempted")
    submitted = trainer(project, lab, "submit", "long.yaml", "--name", "preempted", "--launcher", "slurm", "--time=30")
    assert submitted.stdout == "runs/preempted\n"
    job = slurm_id(run)

    wait_for_attempt(run, 1, 8)
    with paused(run):  # Slurm itself lets it go on, to hear the signal
        lab.command("scontrol", "requeue", job)
    wait_for((run.root / "outcome.json").exists)
    assert run.outcome()["state"] == "preempted"
    assert run.checkpoints()[-1] == run.steps()[-1], "saved before it went"
    wait_for(lambda: lab.field(job, "JobState") == "PENDING")

    wait_for_attempt(run, 2, 8)
    with paused(run):  # until Slurm looks at its clock
        assert state(project, lab, "preempted") == "RUNNING"
        minutes, seconds = map(int, lab.field(job, "RunTime").split(":")[-2:])
        lab.command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + (seconds + 20) // 60 + 1}")
        wait_for(lambda: "asked to stop by SIGUSR1" in run.log())
    wait_for(lambda: "preempted: requesting a requeue" in run.log())
    wait_for(lambda: lab.field(job, "JobState") == "PENDING")
    lab.command("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    wait_for_attempt(run, 3, 8)
    with paused(run):
        urgent = urge(lab)
        wait_for(lambda: run.log().count("preempted: requesting a requeue") == 2)
    wait_for(lambda: lab.field(urgent, "JobState") == "COMPLETED")

    waiting = "import sys; from trainer.jobs import *; print(find_job(sys.argv[1]).wait(200, 0.5).state)"
    waited = project.start([sys.executable, "-c", waiting, "preempted"], lab.environment).wait()
    assert waited.stdout == "finished\n", waited.said
    assert state(project, lab, "preempted") == "COMPLETED"
    assert [attempt["attempt"] for attempt in run.attempts()] == [1, 2, 3, 4]
    done = undisturbed.wait()
    assert done.code == 0, done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()


STEP: Final = """\
run=runs/$1
say() { echo "{\\"state\\": \\"$1\\", \\"step\\": 3}" >"$run/outcome.json"; }
save() { mkdir -p "$run/checkpoints/step-000003"; }
stop_by() { trap "$1" TERM; touch "$run/up"; while :; do sleep 0.1; done; }
if [ -n "$SLURM_RESTART_COUNT" ]; then say finished; exit 0; fi
case $1 in
  dead) exit 1;;  # without a word, though nobody asked it to stop
  failed) say failed; exit 1;;
  preempted_step) say preempted; exit 75;;
  cancelled_step) touch "$run/cancelled"; say preempted; exit 75;;
  saved) stop_by "save; exit 75";;
  unsaved) stop_by "exit 75";;  # another such start would end alike
  scancelled) stop_by "say preempted; exit 75";;
  taken) stop_by "exit 143";;
  bare) stop_by "say preempted; exit 75";;
esac
"""
"""How a step may end: a shell in the supervisor's place, so that each way takes a second."""


def test_only_what_a_machine_stopped_is_requeued(project: Project, lab: Lab) -> None:
    (project.root / "step.sh").write_text(STEP)
    text = trainer(project, lab, "submit", "long.yaml", "--name", "NAME", "--launcher", "slurm", "--print").stdout

    def submit(name: str, *options: str) -> str:
        (project.root / "runs" / name / "logs").mkdir(parents=True)
        (project.root / "runs" / name / "outcome.json").write_text('{"state": "preempted"}')  # by an earlier start
        script = re.sub(r"(--kill-on-bad-exit=1) \S+ .*", rf"\1 sh step.sh {name} &", text.replace("NAME", name))
        (project.root / f"{name}.sh").write_text(script)
        script = str(project.root / f"{name}.sh")
        return lab.command("sbatch", "--parsable", f"--chdir={project.root}", *options, script)

    def wait_until_up(*names: str) -> None:
        wait_for(lambda: all((project.root / "runs" / name / "up").exists() for name in names))

    def ended(job: str) -> tuple[str, str]:
        return lab.field(job, "JobState"), lab.field(job, "Restarts")

    jobs = {name: submit(name) for name in ("saved", "unsaved", "scancelled")}
    jobs |= {name: submit(name) for name in ("dead", "failed", "preempted_step", "cancelled_step")}
    wait_until_up("saved", "unsaved", "scancelled")
    for name in ("saved", "unsaved"):
        lab.command("scancel", "--signal=USR1", "--batch", jobs[name])  # as the time limit does
    lab.command("scancel", jobs["scancelled"])
    expected = {
        "saved": ("COMPLETED", "1"), "unsaved": ("FAILED", "0"), "scancelled": ("CANCELLED", "0"),
        "dead": ("FAILED", "0"), "failed": ("FAILED", "0"), "preempted_step": ("COMPLETED", "1"),
        "cancelled_step": ("FAILED", "0"),
    }  # fmt: skip
    wait_for(lambda: all(ended(jobs[name])[0] == expected[name][0] for name in jobs), poll_s=0.5)
    assert {name: ended(job) for name, job in jobs.items()} == expected
    assert "nothing was saved within the time limit: not requeued" in project.run("unsaved").log()

    taken = submit("taken")
    bare = submit("bare", "--partition=bare")  # no grace: Slurm itself queues it again
    wait_until_up("taken", "bare")
    urge(lab)
    wait_for(lambda: ended(taken) == ("COMPLETED", "1"), poll_s=0.5)
    wait_for(lambda: ended(bare) == ("COMPLETED", "1"), poll_s=0.5)


PAIR_STEP: Final = """\
run=runs/$1
words() { echo "\\"state\\": \\"$1\\", \\"step\\": 3, \\"message\\": \\"$1\\", \\"exit_code\\": $2"; }
say() { echo "{$(words $1 $2), $transient}" >"$run/outcome.json"; }
transient='"is_transient": true'
[ "$SLURM_PROCID" = 1 ] && case $1-$SLURM_STEP_ID in
  killed-0) kill -9 $$;;  # without a word
  *) sleep 60;;  # until the other node's end takes it along
esac
case $1-$SLURM_STEP_ID in
  killed-0) sleep 60;;
  crashing-*) say failed 1; exit 1;;
  mistaken-*) transient='"is_transient": false'; say failed 2; exit 1;;
  told-*) trap 'say preempted 75; exit 75' TERM; touch "$run/up"; while :; do sleep 0.1; done;;
esac
say finished 0; exit 1  # 1, so that srun ends the other node's step at once
"""
"""How a step of two nodes may end: a shell in the place of each torchrun."""


def test_a_job_of_two_nodes_starts_again_what_may_end_otherwise(project: Project, lab: Lab) -> None:
    (project.root / "pair_step.sh").write_text(PAIR_STEP)
    options = ("--name", "NAME", "--set", "recovery.max_restarts=2", "--set", "recovery.restart_backoff_s=0.1")
    text = trainer(project, lab, "submit", "pair.yaml", *options, "--launcher", "slurm", "--print").stdout
    torchrun = re.compile(r"(--kill-on-bad-exit=1) (?:.*\\\n)+ .* &")

    def submit(name: str) -> str:
        trainer(
            project, lab, "submit", "pair.yaml", "--name", name, *options[2:], "--launcher", "slurm", "--slurm", "hold"
        )
        lab.command("scancel", slurm_id(project.run(name)))  # it made the run directory
        script, count = torchrun.subn(rf"\1 sh pair_step.sh {name} &", text.replace("NAME", name))
        assert count == 1
        (project.root / f"{name}.sh").write_text(script)
        return lab.command("sbatch", "--parsable", f"--chdir={project.root}", str(project.root / f"{name}.sh"))

    def has_ended(job: str) -> bool:
        return lab.field(job, "JobState") in {"FAILED", "COMPLETED"}

    def log_of(name: str) -> str:
        return project.run(name).log()

    def restarts(name: str) -> list[str]:
        return re.findall(r"restart (\d) of at most 2 without a new checkpoint", log_of(name))

    expected = {"killed": ["1"], "crashing": ["1", "2"], "mistaken": [], "told": []}
    for name, numbers in expected.items():
        job = submit(name)
        if name == "told":
            wait_for((project.run(name).root / "up").exists)
            (project.run(name).root / "cancelled").touch()
            lab.command("scancel", "--signal=USR1", "--batch", job)
        wait_for(partial(has_ended, job), poll_s=0.5)
        assert restarts(name) == numbers, log_of(name)
        assert lab.field(job, "Restarts") == "0", "never as another start of the job"
    assert "failed: ranks ended without an outcome; see the job's log" in log_of("killed")
    assert project.run("killed").outcome()["state"] == "finished", "the second step of the job"
    assert project.run("crashing").outcome()["state"] == "failed"


def test_killed_rank_of_two_nodes_goes_on_in_the_same_job(project: Project, lab: Lab) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    changes = PAIR | {"name": "killed_rank", "steps": 60, "eval_interval": 0, "recovery__restart_backoff_s": 0.1}
    project.recipe("killed_rank.yaml", **changes)
    alone = project.start([*torchrun, "-m", "trainer.worker", "killed_rank.yaml", "--name", "undisturbed"])
    trainer(project, lab, "submit", "killed_rank.yaml", "--launcher", "slurm", "--time=50")
    run, whole = project.run("killed_rank"), project.run("undisturbed")
    job = slurm_id(run)
    wait_for_attempt(run, 1, 5)
    wait_for(run.checkpoints)
    of_job = [each for each in project.processes() if each.environ().get("SLURM_JOB_ID") == job]
    (on_second,) = [each for each in of_job if "RANK" in (own := each.environ()) and own["SLURM_NODEID"] == "1"]
    on_second.send_signal(signal.SIGKILL)  # whichever rank the rendezvous gave it
    wait_for(lambda: state(project, lab, "killed_rank") == "COMPLETED", poll_s=1)
    assert slurm_id(run) == job
    assert lab.field(job, "Restarts") == "0"
    first, again = run.attempts()
    assert (first["slurm_step"], again["slurm_step"]) == (f"{job}.0", f"{job}.1")
    assert (first["ended"]["state"], again["ended"]["state"]) != ("finished", "finished")
    assert again["ended"]["state"] == "finished"
    assert "resumed runs/killed_rank at step" in run.log()
    done = alone.wait()
    assert done.code == 0, done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()


def test_two_nodes_cancelled_reconnected_and_requeued(project: Project, lab: Lab) -> None:
    """Two ranks that torchruns of two nodes bring together, against two ranks of one machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    alone = project.start([*torchrun, "-m", "trainer.worker", "pair.yaml", "--name", "alone"])
    trainer(project, lab, "submit", "pair.yaml", "--launcher", "slurm", "--time=10")
    run, whole = project.run("pair"), project.run("alone")

    wait_for_attempt(run, 1, 5)
    with paused(run):
        trainer(project, lab, "cancel", "pair")
    wait_for(lambda: state(project, lab, "pair") == "CANCELLED")
    assert run.outcome()["state"] == "cancelled"
    step = run.steps()[-1]
    assert run.checkpoints()[-1] == step < 150
    first = slurm_id(run)
    assert lab.field(first, "Restarts") == "0", "nobody starts it again"

    trainer(project, lab, "reconnect", "pair")
    second = slurm_id(run)
    assert second != first
    assert run.steps()[-1] > step
    with paused(run):
        lab.command("scontrol", "requeue", second)
    wait_for(lambda: state(project, lab, "pair") == "COMPLETED", poll_s=1)
    assert [attempt["ranks"] for attempt in run.attempts()] == [2, 2, 2]
    assert lab.field(second, "Restarts") == "1"
    done = alone.wait()
    assert done.code == 0, done.said
    assert run.values() == whole.values()
    assert run.adapter() == whole.adapter()


def test_waiting_job_is_joined_cancelled_and_submitted_again(project: Project, lab: Lab) -> None:
    run = project.run("held")
    trainer(project, lab, "submit", "long.yaml", "--name", "held", "--launcher", "slurm", "--slurm", "hold")
    assert state(project, lab, "held") == "PENDING"
    status = trainer(project, lab, "status", "held").stdout.splitlines()
    assert status[0] == "runs/held: pending, step 0 of 60"
    assert status[1] == f"  in Slurm's queue: held; `scontrol release {slurm_id(run)}` releases it"
    second = project.start([str(BIN / "trainer"), "submit", "long.yaml", "--name", "held"], lab.environment).wait()
    assert second.code == 2, second.said
    assert "runs/held is pending already; `trainer reconnect runs/held` joins it" in second.stderr
    for jobs in (1, 2):  # joined where it waits, and submitted again where it was cancelled
        argv = [str(BIN / "trainer"), "reconnect", "held", "--timeout", "1"]
        reconnected = project.start(argv, lab.environment).wait()
        assert reconnected.code == 1, reconnected.said
        assert "runs/held: still pending (in Slurm's queue: held; `scontrol release " in reconnected.stderr
        assert len(list((run.root / "logs").iterdir())) == 0, "nothing was started"
        trainer(project, lab, "cancel", "held")
        wait_for(lambda: state(project, lab, "held") == "CANCELLED")
        assert int(slurm_id(run)) >= jobs


def test_jobs_that_are_not_the_runs_own(project: Project, lab: Lab) -> None:
    """A time limit over the partition's, a held job, a copied run, and an id that another job has now."""
    argv = ("submit", "long.yaml", "--launcher", "slurm", "--name", "own")
    refused = project.start([str(BIN / "trainer"), *argv, "--time", "2:00:00"], lab.environment).wait()
    assert refused.code == 2
    assert "--time 2:00:00: over the limit of low (01:00:00)" in refused.stderr

    trainer(project, lab, *argv, "--slurm", "hold")
    held = slurm_id(project.run("own"))
    assert f"held; `scontrol release {held}` releases it" in trainer(project, lab, "status", "own").stdout

    shutil.copytree(project.run("own").root, project.run("copy").root)
    cancelled = project.start([str(BIN / "trainer"), "cancel", "copy"], lab.environment).wait()
    assert "runs/copy is not running" in cancelled.stderr
    assert lab.field(held, "JobState") == "PENDING"

    other = lab.command("sbatch", "--parsable", "--hold", "--job-name=own", f"--chdir={project.root}", "--wrap=sleep 9")
    file = project.run("own").root / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"slurm_id": other}))
    cancelled = project.start([str(BIN / "trainer"), "cancel", "own"], lab.environment).wait()
    assert "runs/own is not running" in cancelled.stderr
    assert lab.field(other, "JobState") == "PENDING"
    for job in (held, other):
        lab.command("scancel", job)
