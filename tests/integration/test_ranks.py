"""Two ranks on gloo make the run of one, and stop as one."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from typing import Final

import pytest
from project import BIN, Project, Run, Running, is_at_step, wait_for

RECIPE: Final = {
    "name": "ranks", "steps": 60, "eval_interval": 0, "optimizer__schedule": "constant",
    "optimizer__learning_rate": 1e-3, "rows_per_step": 3,
}  # fmt: skip
"""Three rows of unequal length on two ranks: unequal tokens, and one rank with fewer rows."""
ONE_ROW: Final = RECIPE | {"rows_per_step": 1, "steps": 6}
"""One rank has no row at all."""


@pytest.fixture(scope="module")
def project(shared: Project) -> Project:
    shape = {
        "name": "cpu2", "device": "cpu", "device_name": "CPU", "gpus": 2, "gpu_memory_gib": 16,
        "micro_batch_tokens": 256, "accelerate": "cpu",
        "limits": {"lora": {"max_params_b": 1, "max_seq_tokens": 4096, "basis": "estimated"}},
    }  # fmt: skip
    (shared.root / "cpu2.yaml").write_text(json.dumps(shape))
    shared.recipe("three.yaml", **RECIPE)
    shared.recipe("one.yaml", **ONE_ROW)
    return shared


@pytest.fixture(scope="module")
def alone(project: Project) -> Run:
    """The run of one rank."""
    done = project.worker("three.yaml", "--name", "alone")
    assert done.code == 0, done.said
    return project.run("alone")


@pytest.fixture(scope="module")
def stopped(project: Project) -> tuple[Run, Running]:
    """A run of two ranks, of which the second alone is asked to stop."""
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "trainer.worker",
    ]
    started = project.start([*argv, "three.yaml", "--shape", "cpu2.yaml", "--name", "stopped"])
    run = project.run("stopped")
    wait_for(is_at_step(run, 8), started)
    (second,) = [process for process in project.processes() if process.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGTERM)
    started.process.wait(120)
    return run, started


def assert_close(ours: Run, theirs: Run, steps: range) -> None:
    """Equal to rounding in float32."""
    by_step = {record["step"]: record for record in theirs.values()}
    for record in ours.values():
        if record["step"] in steps:
            assert record == pytest.approx(by_step[record["step"]], rel=1e-5, abs=1e-5)


def test_signal_to_one_rank_stops_both_at_one_step(stopped: tuple[Run, Running]) -> None:
    run, started = stopped
    said = started.wait().said
    step = run.steps()[-1]
    assert run.outcome() == {
        "state": "preempted",
        "step": step,
        "message": f"stopped after step {step} of 60; the state is saved",
        "exit_code": 75,
        "is_transient": False,
    }, said
    assert 8 <= step < 60
    assert run.checkpoints()[-1] == step
    assert json.loads((run.newest_checkpoint() / "manifest.json").read_text())["world_size"] == 2


def test_two_ranks_equal_one_with_unequal_rows_and_tokens(alone: Run, stopped: tuple[Run, Running]) -> None:
    run, _ = stopped
    assert run.attempts()[0]["ranks"] == 2
    assert_close(run, alone, range(run.steps()[-1] + 1))


def test_checkpoint_of_two_ranks_goes_on_with_one(project: Project, alone: Run, stopped: tuple[Run, Running]) -> None:
    run, _ = stopped
    step = run.steps()[-1]
    done = project.worker("three.yaml", "--name", "stopped")
    assert done.code == 0, done.said
    assert f"resumed runs/stopped at step {step} of 60" in done.stderr
    assert run.steps() == list(range(61))
    assert [attempt["ranks"] for attempt in run.attempts()] == [2, 1]
    assert_close(run, alone, range(61))


def test_checkpoint_of_one_rank_goes_on_with_two(project: Project, alone: Run) -> None:
    """`trainer train` starts both; the run is the other's, two steps before its end."""
    run = project.run("grown")
    shutil.copytree(alone.root, run.root)
    shutil.rmtree(run.newest_checkpoint())
    (run.root / "outcome.json").unlink()
    done = project.trainer("train", "three.yaml", "--shape", "cpu2.yaml", "--name", "grown")
    assert done.code == 0, done.said
    assert [attempt["ranks"] for attempt in run.attempts()] == [1, 2]
    assert "at step 58 of 60" in run.log()
    assert run.steps() == list(range(61))
    assert_close(run, alone, range(59, 61))


def test_rank_without_rows_under_accelerate(project: Project) -> None:
    argv = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trainer.worker", "one.yaml"]
    started = project.start([*argv, "--shape", "cpu2.yaml", "--name", "both"], {"ACCELERATE_USE_CPU": "true"})
    alone = project.worker("one.yaml", "--name", "single")
    done = started.wait()
    assert (done.code, alone.code) == (0, 0), done.said + alone.said
    run = project.run("both")
    assert run.attempts()[0]["ranks"] == 2
    assert run.steps() == [0, 1, 2, 3, 4, 5, 6]
    assert_close(run, project.run("single"), range(7))


@pytest.mark.heavy
def test_two_ranks_of_a_base_in_4_bits_equal_one(project: Project) -> None:
    pytest.importorskip("bitsandbytes")
    bits = {"steps": 6, "model__quantization": "nf4", "model__compute_dtype": "float32"}
    project.recipe("bits.yaml", **RECIPE | bits)
    alone = project.worker("bits.yaml", "--name", "bits_alone")
    both = project.trainer("train", "bits.yaml", "--shape", "cpu2.yaml", "--name", "bits_both")
    assert (alone.code, both.code) == (0, 0), alone.said + both.said
    run = project.run("bits_both")
    assert run.attempts()[0]["ranks"] == 2
    assert_close(run, project.run("bits_alone"), range(7))


def test_wrong_number_of_ranks_is_refused_with_both_numbers(project: Project) -> None:
    """With --cpu accelerate silently starts one process, whatever --num_processes says."""
    argv = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "trainer.worker", "one.yaml"]
    done = project.start([*argv, "--shape", "cpu2.yaml", "--name", "wrong"]).wait()
    assert done.code != 0
    assert "the launcher started 1 rank(s) and the shape has 2" in done.stderr
    assert project.run("wrong").outcome()["exit_code"] == 2


def test_second_ctrl_c_leaves_no_rank_behind(project: Project) -> None:
    """torchrun gives every rank a session of its own, so killing the launcher's group reaches none."""
    run = project.run("cut")
    started = project.start_trainer(
        "train", "three.yaml", "--shape", "cpu2.yaml", "--name", "cut", "--set", "steps=9999"
    )
    wait_for(is_at_step(run, 4), started)
    wait_for(run.checkpoints, started)  # written behind the steps
    assert len([process for process in project.processes() if "RANK" in process.environ()]) == 2
    started.signal(signal.SIGINT)
    started.signal(signal.SIGINT)
    done = started.wait()
    assert done.code in (1, 75), done.said  # 75 where the ranks had stopped before the second came
    wait_for(lambda: not project.processes())
    assert run.checkpoints()


def test_two_torchrun_nodes_are_one_run(project: Project, alone: Run) -> None:
    """As `trainer check` prints it for a shape of two machines, both of them this one."""
    shape = json.loads((project.root / "cpu2.yaml").read_text()) | {"name": "two_nodes", "nodes": 2}
    (project.root / "two_nodes.yaml").write_text(json.dumps(shape))
    shown = json.loads(project.trainer("check", "three.yaml", "--shape", "two_nodes.yaml", "--json").stdout)
    command = shown["commands"]["torchrun"].replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = command.replace("$MAIN_IP", "127.0.0.1").replace("29500", port)
    command += " --name two_nodes --set steps=10"
    nodes = [project.start(command.replace("$NODE_RANK", str(number)).split()) for number in range(2)]
    done = [node.wait() for node in nodes]
    assert [each.code for each in done] == [0, 0], done[0].said + done[1].said
    run = project.run("two_nodes")
    assert run.attempts()[0]["ranks"] == 2
    assert_close(run, alone, range(10))
    refused = project.trainer("train", "three.yaml", "--shape", "two_nodes.yaml", "--name", "refused")
    assert refused.code == 2
    assert "has 2 machines, and `trainer train` starts processes on one" in refused.stderr
