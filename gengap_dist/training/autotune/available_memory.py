"""How much more memory a rank may take where it runs, in bytes: the machine's, its container's, its process's limit."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

MEMBERSHIPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """What a version of Linux's control groups calls things."""

    controllers: str
    folder: Path
    limit: str
    used: str
    cache: str
    """The line of memory.stat that counts what can be read from files again."""


VERSIONS = (
    _Names("memory", GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    _Names("", GROUPS, "memory.max", "memory.current", "file"),
)


def available_memory(device: torch.device, num_local: int) -> int:
    """Bytes that this rank may still take on `device`; on a CPU `num_local` ranks share alike what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        return torch.cuda.mem_get_info(device)[0]
    shared = [psutil.virtual_memory().available, *_of_groups()]
    return max(0, min([*(free // num_local for free in shared), *_of_process()]))


def _of_groups() -> Iterator[int]:
    """What is free in each control group, such as a container, that this process belongs to."""
    lines = MEMBERSHIPS.read_text().splitlines() if MEMBERSHIPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for names in VERSIONS:
            inside = names.folder / path.lstrip("/")
            for folder in (inside, *inside.parents) if controllers == names.controllers else ():
                yield from _of_group(folder, names)


def _of_group(folder: Path, names: _Names) -> Iterator[int]:
    if not (folder / names.limit).exists():
        return
    limit = (folder / names.limit).read_text().strip()
    if limit.isdigit():  # or "max"
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield int(limit) - int((folder / names.used).read_text()) + int(counts[names.cache])


def _of_process() -> Iterator[int]:
    """What is left of the process's own limits on addresses (ulimit -v)."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        yield most - psutil.Process().memory_info().vms
