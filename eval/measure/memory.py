"""What memory a device has left, and the most that this process holds of it. Loads no model.

`device` is what torch calls one: "cpu", "cuda", "cuda:1". For CUDA all GPUs count together, as an offloaded model is spread over them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...surgery.importance.trim import trim

CLEAR_PEAK = "5"  # what /proc/PID/clear_refs takes to lower VmHWM to VmRSS (Linux: filesystems/proc)
CGROUPS = Path("/sys/fs/cgroup")
LIMIT_FILES = (("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def free_memory(device: str) -> int:
    """Bytes that can still be taken: of one GPU, or of this machine, where a container's limit counts too."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_in_cgroups()])


def held_memory(device: str) -> int:
    """Bytes that this process holds now: resident memory, mapped files among it, or what torch has taken of the GPUs."""
    if device != "cpu":
        import torch

        return sum(torch.cuda.memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    import psutil

    return int(psutil.Process().memory_info().rss)


def start_peak(device: str) -> int:
    """Forget earlier peaks, so that `peak_memory` tells of what comes; return the bytes held now."""
    gc.collect()
    if device != "cpu":
        import torch

        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
        return held_memory(device)
    trim()  # else freed memory of an earlier model serves the next one, which then seems small
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    return held_memory(device)


def peak_memory(device: str) -> int:
    """The most bytes held since `start_peak`; since the process began, where the system cannot forget."""
    if device != "cpu":
        import torch

        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _left_in_cgroups() -> Iterator[int]:
    """What the limit of each control group around this process leaves; pages of files that the kernel would give back are left too."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                yield from _left_below(CGROUPS / controllers, path.strip("/"))


def _left_below(root: Path, path: str) -> Iterator[int]:
    here = root / path
    for folder in (here, *(parent for parent in here.parents if parent.is_relative_to(root))):
        for limit, used, cache in LIMIT_FILES:
            with suppress(OSError, ValueError):
                stated = (folder / limit).read_text().strip()
                if stated != "max":
                    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield int(stated) - int((folder / used).read_text()) + int(facts[cache])
