"""A library with the functions of NVML that says what a test wants, for machines without a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

H100: Final = ("NVIDIA H100 80GB HBM3", 81559)
H200: Final = ("NVIDIA H200", 143771)
RTX_3090: Final = ("NVIDIA GeForce RTX 3090", 24576)
RTX_4090: Final = ("NVIDIA GeForce RTX 4090", 24564)
RTX_4070: Final = ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376)
"""Name and memory in MiB, as `nvidia-smi` prints them."""

SOURCE: Final = """\
#include <string.h>
#include <stdio.h>
struct memory {{ unsigned long long total, free, used; }};
static const char *names[] = {{ {names} "" }};
static const unsigned long long mib[] = {{ {mib} 0 }};
static const int mig[] = {{ {mig} 0 }};
#define COUNT {count}
int nvmlInit_v2(void) {{ return {init}; }}
int nvmlInitWithFlags(unsigned flags) {{ return {init}; }}
int nvmlShutdown(void) {{ return 0; }}
const char *nvmlErrorString(int code) {{ return code == 18 ? "Driver/library version mismatch" : "Unknown Error"; }}
int nvmlSystemGetDriverVersion(char *text, unsigned length) {{ strcpy(text, "570.86.15"); return 0; }}
int nvmlSystemGetCudaDriverVersion(int *version) {{ *version = 12080; return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = COUNT; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {{ *handle = (void *)(long)(index + 1); return 0; }}
static int of(void *handle) {{ return (int)((long)handle % 100) - 1; }}
int nvmlDeviceGetName(void *handle, char *text, unsigned length) {{ strcpy(text, names[of(handle)]); return 0; }}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) {{
    if ((long)handle >= 100) sprintf(text, "MIG-%ld-of-%d", (long)handle / 100, of(handle));
    else sprintf(text, "GPU-%d000-uuid", of(handle));
    return 0;
}}
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {{
    if (!mib[of(handle)]) return 3;
    memory->total = mib[of(handle)] << 20;
    if ((long)handle >= 100) memory->total /= 4;
    memory->used = 512ULL << 20;
    memory->free = memory->total - memory->used;
    return 0;
}}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {{
    if (!mig[of(handle)]) return 3;
    *now = *pending = 1;
    return 0;
}}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {{ *count = 7; return 0; }}
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {{
    if ((int)index >= mig[of(handle)]) return 6;
    *instance = (void *)((long)handle + 100 * (index + 1));
    return 0;
}}
"""


def fake_nvml(directory: Path, *gpus: tuple[str, int], instances: int = 0, init: int = 0) -> dict[str, str]:
    """Compile the library; returns the environment that makes a process load it.

    Args:
        directory: Where the library goes.
        gpus: Name and memory in MiB of each GPU; 0 MiB answers NotSupported, as for memory shared with the host.
        instances: MIG instances of each GPU, with a quarter of its memory; 0 disables MIG.
        init: What `nvmlInit` returns, for example 18 for a driver that does not match the library.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    names, mib = "".join(f'"{name}", ' for name, _ in gpus), "".join(f"{size}, " for _, size in gpus)
    text = SOURCE.format(names=names, mib=mib, mig=f"{instances}, " * len(gpus), count=len(gpus), init=init)
    source = directory / "nvml.c"
    source.write_text(text)
    library = directory / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(source)], check=True, timeout=60)
    return {"LD_LIBRARY_PATH": str(directory)}
