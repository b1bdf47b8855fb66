"""The GPUs of this machine, read from its driver without torch.

NVML does not apply `CUDA_VISIBLE_DEVICES`; `visible_devices` does, by the rules of the CUDA programming guide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

T = TypeVar("T")

GIB: Final = 2**30
UUID_PREFIXES: Final = ("GPU-", "MIG-")
KERNEL_DRIVER: Final = Path("/proc/driver/nvidia/gpus")
"""Where the kernel driver lists its GPUs, also in a container without NVML."""


@final
@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG instance: index 0, uuid GPU-8f2c..., name NVIDIA H100 80GB HBM3, 79.65 GiB, 0.5 of them used."""

    index: int
    """Number that NVML gives it. Where GPUs differ, CUDA's number is another, unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`."""
    uuid: str
    name: str
    memory_gib: float
    """All of its memory; of the host if they share it."""
    used_gib: float = 0.0
    """Memory that processes use now."""
    is_mig: bool = False
    """An instance of a partitioned GPU."""


@final
@dataclass(frozen=True)
class Machine:
    """What the driver says. Without a driver, and without a sign of one, it is `Machine()`."""

    devices: tuple[Device, ...] = ()
    """GPUs that a process started here would use."""
    hidden: int = 0
    """Number of further GPUs, which `CUDA_VISIBLE_DEVICES` hides."""
    driver: str | None = None
    """Version of the driver."""
    cuda: str | None = None
    """Newest CUDA version that the driver supports, for example 12.8."""
    problem: str | None = None
    """Why GPUs that seem to be here cannot be asked, and the remedy."""


def this_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Ask the driver for GPUs; takes 0.06 s where there is none.

    Args:
        environment: For `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER`.
    """
    import pynvml  # imported here to keep other commands fast

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Machine(problem=_driver_problem(error))
    try:
        devices = list(_devices())
        visible = visible_devices(devices, environment)
        return Machine(
            devices=visible,
            hidden=len(devices) - len(visible),
            driver=_supported(pynvml.nvmlSystemGetDriverVersion),
            cuda=_cuda_version(_supported(pynvml.nvmlSystemGetCudaDriverVersion)),
        )
    except pynvml.NVMLError as error:
        return Machine(problem=f"the GPU driver does not answer: {error}. Run `nvidia-smi`.")
    finally:
        pynvml.nvmlShutdown()


def _driver_problem(error: Exception) -> str | None:
    """Return why the driver cannot be asked; None if there is no sign of a GPU."""
    import pynvml

    if isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded):
        if not KERNEL_DRIVER.is_dir():
            return None
        return (
            f"the kernel lists GPUs ({KERNEL_DRIVER}), and NVML cannot be used ({str(error).rstrip('.')}). "
            "In a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility."
        )
    reason = str(error).rstrip(".")
    return f"the GPU driver does not answer: {reason}. Run `nvidia-smi`; after an update of the driver, reboot."


def _devices() -> Iterator[Device]:
    """Yield every GPU; of a partitioned one its instances."""
    import pynvml

    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        mode = _supported(pynvml.nvmlDeviceGetMigMode, handle)
        if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            yield _device(index, handle)
            continue
        for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            instance = _supported(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
            if instance is not None:
                yield _device(index, instance, is_mig=True)


def _device(index: int, handle: Any, *, is_mig: bool = False) -> Device:
    import pynvml

    memory = _supported(pynvml.nvmlDeviceGetMemoryInfo, handle)
    return Device(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        memory_gib=memory.total / GIB if memory is not None else host_memory_gib(),
        used_gib=memory.used / GIB if memory is not None else 0.0,
        is_mig=is_mig,
    )


def _supported(ask: Callable[..., T], *arguments: object) -> T | None:
    """Return the answer; None if this device or driver does not support the question."""
    import pynvml

    try:
        return ask(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotFound):
        return None


def _cuda_version(number: int | None) -> str | None:
    """Return 12.8 for 12080."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def host_memory_gib() -> float:
    """Return the memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def visible_devices(devices: Sequence[Device], environment: Mapping[str, str]) -> tuple[Device, ...]:
    """Return the devices that a CUDA program sees, in its order.

    The list of `CUDA_VISIBLE_DEVICES` ends before its first invalid entry, and a device that is named twice makes CUDA
    see none. Of MIG instances a program uses one; without the variable it is the first.

    If GPUs differ, CUDA puts the fastest first unless `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set, so an index does not say
    which GPU is meant: then the ones with least memory are assumed.

    Args:
        devices: All devices, in the order of NVML.
        environment: Holds the two variables, or not.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        whole = tuple(device for device in devices if not device.is_mig)
        return whole or tuple(devices[:1])
    chosen: list[Device] = []
    is_by_index = False
    for entry in given.split(","):
        device = _named_device(entry.strip(), devices)
        if device is None:
            break
        if device in chosen:
            return ()
        is_by_index = is_by_index or not entry.strip().startswith(UUID_PREFIXES)
        chosen.append(device)
    is_ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if is_by_index and not is_ordered and len({(device.name, device.memory_gib) for device in devices}) > 1:
        return tuple(sorted(devices, key=lambda device: device.memory_gib)[: len(chosen)])
    return tuple(chosen)


def _named_device(entry: str, devices: Sequence[Device]) -> Device | None:
    """Return the device of an index, or of the beginning of a UUID; None if there is none or more than one."""
    if entry.startswith(UUID_PREFIXES):
        matches = [device for device in devices if device.uuid.startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    if not (entry.isascii() and entry.isdigit()):
        return None
    whole = [device for device in devices if not device.is_mig]
    return whole[int(entry)] if int(entry) < len(whole) else None
