"""The text of the batch script; tests/integration/test_slurm.py runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from small_recipe import SFT, write_small

from trainer.commands.cli import main
from trainer.config.load import load_recipe
from trainer.jobs.slurm_script import SlurmOptions, batch_script
from trainer.planning.plan import Plan, make_plan
from trainer.run.directory import RunDir

GRACE: Final = SFT + "recovery:\n  grace_period_s: 89.5\n"
RUN: Final = RunDir(Path("runs/small"))


@pytest.fixture(autouse=True)
def in_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(directory: Path, recipe: str = SFT, shape: str | None = None) -> Plan:
    return make_plan(load_recipe(write_small(directory, recipe)), shape)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_one_node_runs_the_supervisor_and_is_warned_before_the_time_limit(tmp_path):
    script = batch_script(RUN, plan(tmp_path, GRACE), SlurmOptions(), Path("/home/me/my project"), "/opt/python")
    assert directives(script) == [
        "job-name=small",
        "nodes=1",
        "ntasks-per-node=1",
        "output=runs/small/logs/slurm-%j.log",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@120",  # 89.5 s of grace, rounded up, and 30
    ]
    assert "cd '/home/me/my project' || exit 1" in script
    assert (
        "srun --ntasks-per-node=1 --kill-on-bad-exit=1 /opt/python -m trainer train runs/small --resubmitted &"
        in script
    )
    assert "torch.distributed" not in script


def test_options_of_the_user_come_last_and_win(tmp_path):
    options = SlurmOptions("gpu", "2-00:00:00", {"account": "research", "exclusive": "", "open-mode": "truncate"})
    given = directives(batch_script(RUN, plan(tmp_path), options, tmp_path))
    assert given[-4:] == ["partition=gpu", "time=2-00:00:00", "account=research", "exclusive"]
    assert "open-mode=truncate" in given
    assert "open-mode=append" not in given


def test_two_nodes_meet_under_an_id_of_their_own_start(tmp_path):
    script = batch_script(RUN, plan(tmp_path, GRACE, shape="h100x16"), SlurmOptions(), tmp_path, "/opt/python")
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=8"} <= set(directives(script))
    command = script[script.index("  srun ") : script.index("\n  step=$!")]
    assert command == (
        "  srun --ntasks-per-node=1 --kill-on-bad-exit=1"
        " /opt/python -m torch.distributed.run --nnodes 2 --nproc-per-node 8 \\\n"
        '    --rdzv-backend c10d --rdzv-endpoint "$address:$((10000 + SLURM_JOB_ID % 20000))" \\\n'
        '    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$number" \\\n'
        "    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 90 \\\n"
        "    -m trainer.worker runs/small &"
    )
    begin, after = (
        place for place, line in enumerate(script.splitlines()) if "/opt/python -m trainer.launch.again" in line
    )
    assert begin < script[: script.index("  srun ")].count("\n") < after, "counted before the first step, after each"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script


def test_print_shows_the_script_and_leaves_nothing(tmp_path, capsys):
    write_small(tmp_path)
    argv = ["submit", "recipe.yaml", "--launcher", "slurm", "--partition", "gpu", "--slurm", "qos=high", "--print"]
    assert main(argv) == 0
    assert directives(capsys.readouterr().out)[-2:] == ["partition=gpu", "qos=high"]
    assert not (tmp_path / "runs").exists()


def test_options_of_slurm_need_slurm(tmp_path, capsys):
    write_small(tmp_path)
    assert main(["submit", "recipe.yaml", "--partition", "gpu"]) == 2
    assert capsys.readouterr().err == "--print, --partition, --time and --slurm go with --launcher slurm\n"
