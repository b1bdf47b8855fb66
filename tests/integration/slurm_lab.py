"""A Slurm cluster of two nodes on this machine: real daemons in a temporary directory, without systemd or cgroups."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

PROGRAMS: Final = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
DAEMONS: Final = {"munged", "slurmctld", "slurmscriptd", "slurmd"}
PATH: Final = f"{os.environ['PATH']}:/usr/sbin:/sbin"
BOOT_S: Final = 60
CONFIGURATION: Final = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=3,sched_interval=3,batch_sched_delay=0
ReturnToService=2
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=bare Nodes=n1,n2 MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)}: scripts/setup_slurm installs them" if absent else None


@dataclass(frozen=True)
class Lab:
    """The running cluster."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What commands need to find it."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *argv: str) -> str:
        """Run one of Slurm's commands; returns what it printed."""
        done = subprocess.run(argv, env=os.environ | self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def stop_jobs(self) -> None:
        """End all jobs and their daemons; none is left that could write anything."""
        with suppress(AssertionError):
            self.command("scancel", f"--user={getpass.getuser()}")
        end = time.monotonic() + 20
        while self._left() and time.monotonic() < end:
            time.sleep(0.2)
        for process in self._left():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _left(self) -> list[psutil.Process]:
        """Processes of jobs: those below slurmstepd, which knows the configuration."""
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                is_ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if is_ours and process.info["name"] not in DAEMONS:
                    found.append(process)
        return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def booted() -> Iterator[Lab]:
    """A cluster within the block."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket may have 107 characters
    lab = Lab(root)
    user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
    (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, user=user, host=host, ports=_free_ports(3)))
    (root / "state").mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
    munge += [f"--{name}-file={root}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for argv in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            daemons.append(_start(lab, argv))
            if argv is munge:
                _wait_for_socket(root / "munge.socket")
        _wait_until_idle(lab)
        yield lab
    finally:
        lab.stop_jobs()
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(root, ignore_errors=True)


def _start(lab: Lab, argv: list[str]) -> subprocess.Popen[bytes]:
    with (lab.root / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            argv,
            env=os.environ | lab.environment | {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_for_socket(path: Path) -> None:
    end = time.monotonic() + BOOT_S
    while not path.exists():
        assert time.monotonic() < end, "munged did not start"
        time.sleep(0.05)


def _wait_until_idle(lab: Lab) -> None:
    end = time.monotonic() + BOOT_S
    said = ""
    while said.split() != ["idle", "idle"]:
        assert time.monotonic() < end, f"nodes: {said}\n{(lab.root / 'daemons.log').read_text()}"
        time.sleep(0.1)
        with suppress(AssertionError):
            said = lab.command("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
