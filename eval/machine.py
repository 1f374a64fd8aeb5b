"""This machine in words: processor, memory, GPUs and releases, from what the system says, so that no torch is needed to name it."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..recipes.memory import GIB


def machine_words() -> str:
    """Name processor, cores, memory and GPUs, as `AMD EPYC, 2 cores, 24 GiB; NVIDIA H100`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    parts = f"{_processor()}, {cores} core{'s' if cores > 1 else ''}, {memory:.0f} GiB"
    return "; ".join([parts, *gpu_names()])


def gpu_names() -> list[str]:
    """Name the NVIDIA GPUs whose driver is loaded, as far as CUDA_VISIBLE_DEVICES lets programs see any."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            names += re.findall(r"Model:\s*(.+)", path.read_text())
    return names


def release_of(package: str) -> str | None:
    """Return the release of an installed package; None where there is none."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _processor() -> str:
    with suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()
