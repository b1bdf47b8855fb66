"""`trainer doctor`: whether this machine can train, in a few lines with remedies."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import importlib.metadata
import importlib.util
import json
import netrc
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

from trainer import __version__
from trainer.commands.tables import table_lines
from trainer.config.devices import KnownDevice
from trainer.config.load import known_devices
from trainer.errors import EXIT_FINISHED, EXIT_USER
from trainer.planning.hub import HubState, hub_state
from trainer.planning.machine import GIB, Device, Machine, host_memory_gib, this_machine
from trainer.planning.machine_shapes import machine_shapes
from trainer.run.find import RUNS

LIBRARIES: Final = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "safetensors", "wandb")
OPTIONAL: Final = {"bitsandbytes": "qlora", "math-verify": "math", "s3fs": "s3"}
"""Libraries of the package's extras."""
BUSY_GIB: Final = 1.0
"""A GPU with more memory in use is shared with other processes."""
LOW_DISK_GIB: Final = 20.0
LOW_SHARED_MEMORY_GIB: Final = 1.0
TORCH_CUDA: Final = re.compile(r"^cuda\b.*=\s*'([\d.]+)'", re.MULTILINE)


@final
@dataclass(frozen=True)
class Finding:
    """One line: ("disk", "note", "runs: 12 GiB free", "Free some space, ...")."""

    topic: str
    state: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def doctor(arguments: argparse.Namespace) -> int:
    """Print what was found; returns 2 if something must be changed before training."""
    findings = list(examine(this_machine()))
    if arguments.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(finding) for finding in findings], ensure_ascii=False) + "\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        rows = [(each.topic, each.state, f"{each.text}. {each.remedy}".rstrip(". ") + ".") for each in findings]
        sys.stdout.write("\n".join(table_lines(rows, width=width)) + "\n")
    return EXIT_USER if any(finding.state == "problem" for finding in findings) else EXIT_FINISHED


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield every finding about this machine.

    Args:
        machine: Its GPUs.
    """
    yield from examine_devices(machine)
    yield from examine_libraries(machine, torch_cuda(), installed_version)
    yield from examine_directory(RUNS)
    yield examine_hub(hub_state())
    yield examine_wandb()


def examine_devices(machine: Machine) -> Iterator[Finding]:
    """Yield GPUs and memory of the host."""
    if machine.problem is not None:
        what, _, remedy = machine.problem.partition(". ")
        yield Finding("GPUs", "problem", what, remedy)
    elif machine.devices:
        shapes = ", ".join(shape.name for shape in machine_shapes(machine.devices))
        text = f"{_described(machine.devices)}; driver {machine.driver}, CUDA up to {machine.cuda}; shapes {shapes}"
        yield Finding("GPUs", "ok", text)
    else:
        yield Finding("GPUs", "ok", "none; recipes train on the CPU")
    if machine.hidden:
        yield Finding("GPUs", "note", f"CUDA_VISIBLE_DEVICES hides {machine.hidden} more")
    for device in machine.devices:
        if device.used_gib > BUSY_GIB:
            text = f"{device.used_gib:.1f} of {device.memory_gib:.1f} GiB are in use by other processes"
            yield Finding(
                f"GPU {device.index}", "note", text, "See `nvidia-smi`; choose others by CUDA_VISIBLE_DEVICES"
            )
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = f", {int(available[1]) / 2**20:.0f} available" if available else ""
    yield Finding("host", "ok", f"{host_memory_gib():.0f} GiB of memory{free}; {len(os.sched_getaffinity(0))} CPUs")


def _described(devices: tuple[Device, ...]) -> str:
    names = {device.name: [each for each in devices if each.name == device.name] for device in devices}
    parts = []
    for name, equal in names.items():
        known = _catalog_entry(equal[0])
        rates = f", {known.bf16_tflops:g} TFLOP/s of bf16, {known.bandwidth_gbps:g} GB/s" if known else ""
        parts.append(f"{len(equal)} x {name} ({equal[0].memory_gib:.1f} GiB{rates})")
    return " and ".join(parts)


def _catalog_entry(device: Device) -> KnownDevice | None:
    return next((known for known in known_devices().values() if known.is_named(device.name, device.memory_gib)), None)


def examine_libraries(machine: Machine, cuda: str | None, version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield versions, and what the GPUs need.

    Args:
        machine: Its GPUs.
        cuda: CUDA version that torch is built for; None for a CPU build.
        version_of: Version of an installed distribution; None if it is missing.
    """
    versions = {name: version_of(name) for name in LIBRARIES}
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    yield Finding("versions", "ok", f"tunesmith {__version__}, Python {platform.python_version()}, {text}")
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield Finding("versions", "problem", f"not installed: {', '.join(missing)}", "Run `pip install tunesmith`")
    absent = {name: extra for name, extra in OPTIONAL.items() if version_of(name) is None}
    if absent:
        extras = ", ".join(f"{name} (pip install 'tunesmith[{extra}]')" for name, extra in absent.items())
        yield Finding("extras", "note", f"not installed: {extras}")
    if machine.devices:
        yield _examine_torch(machine, cuda, versions["torch"])
        if len(machine.devices) > 1:
            yield from _examine_nccl(version_of)
        if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
            yield Finding("compiler", "problem", "no C compiler, which attention kernels for GPUs need", "Install gcc")


def _examine_torch(machine: Machine, cuda: str | None, version: str | None) -> Finding:
    if cuda is None:
        remedy = f"Install a build for CUDA {machine.cuda or 'of your driver'} or older"
        return Finding("torch", "problem", f"torch {version} is built without CUDA and cannot use the GPUs", remedy)
    if machine.cuda is not None and int(cuda.split(".")[0]) > int(machine.cuda.split(".")[0]):
        text = f"torch is built for CUDA {cuda}, and the driver supports CUDA up to {machine.cuda}"
        return Finding("torch", "problem", text, "Update the driver, or install torch for an older CUDA")
    return Finding("torch", "ok", f"built for CUDA {cuda}")


def _examine_nccl(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """Yield what collectives between GPUs need."""
    version = next((found for cuda in (13, 12) if (found := version_of(f"nvidia-nccl-cu{cuda}")) is not None), None)
    if version is None:
        yield Finding(
            "NCCL", "note", "no package nvidia-nccl; torch may have its own", "Try a run with 2 devices first"
        )
    else:
        yield Finding("NCCL", "ok", version)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / GIB) < LOW_SHARED_MEMORY_GIB:
        yield Finding(
            "NCCL", "note", f"/dev/shm has {size:.2f} GiB", "In a container use `--shm-size 8g` or `--ipc host`"
        )


def torch_cuda() -> str | None:
    """Return the CUDA version that torch is built for, without importing torch; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = TORCH_CUDA.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_directory(runs: Path) -> Iterator[Finding]:
    """Yield what the file system of the run directories supports."""
    place = next(folder for folder in (runs, *runs.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            yield _examine_lock(place, file.fileno())
    except OSError as error:
        yield Finding("disk", "problem", f"{place.absolute()}: cannot be written ({error.strerror})", "Work elsewhere")
        return
    free = shutil.disk_usage(place).free / GIB
    if free < LOW_DISK_GIB:
        remedy = "Checkpoints need space: lower `keep_last`, or work elsewhere"
        yield Finding("disk", "note", f"{place.absolute()}: {free:.1f} GiB free", remedy)
    else:
        yield Finding("disk", "ok", f"{place.absolute()}: {free:.0f} GiB free")


def _examine_lock(place: Path, handle: int) -> Finding:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        text = f"{place.absolute()}: file locks (flock) do not work here ({code})"
        return Finding("flock", "note", text, "Do not start the same run twice at the same time")
    return Finding("flock", "ok", "works")


def examine_hub(state: HubState) -> Finding:
    """Return whether models can be downloaded; local ones need no hub.

    Args:
        state: What the hub answered.
    """
    cache = f"{state.num_cached} models in {state.cache}"
    if state.problem is not None:
        return Finding(
            "hub", "note", f"{state.problem}; {cache}", "Use models and data of this machine, or these models"
        )
    login = "logged in" if state.has_token else "not logged in (`hf auth login`, for models that ask for it)"
    return Finding("hub", "ok", f"{state.endpoint} answers; {login}; {cache}")


def examine_wandb() -> Finding:
    """Return whether `logging.wandb: online` would work; asks no server."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("W&B", "ok", f"WANDB_MODE={mode}")
    if os.environ.get("WANDB_API_KEY"):
        return Finding("W&B", "ok", "key in WANDB_API_KEY")
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = re.sub(r"^\w+://", "", address).partition("/")[0].partition(":")[0]
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        has_login = file.is_file() and netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError) as error:
        return Finding("W&B", "note", f"{file}: cannot be read ({error})")
    if has_login:
        return Finding("W&B", "ok", f"key for {host} in {file}")
    return Finding("W&B", "note", "no key", "Only `logging.wandb: online` needs one: `wandb login`")
