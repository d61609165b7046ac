"""Memory in bytes that a rank can still allocate, within the limits of the machine, its container and its process."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

MEMBERSHIPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class _CgroupVersion(NamedTuple):
    """File names of one version of Linux control groups."""

    controllers: str
    folder: Path
    limit: str
    used: str
    cache: str
    """The line of memory.stat that counts reclaimable file cache."""


VERSIONS = (
    _CgroupVersion("memory", GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    _CgroupVersion("", GROUPS, "memory.max", "memory.current", "file"),
)


def available_memory(device: torch.device, num_local: int) -> int:
    """Bytes that this rank can still allocate on `device`; on a CPU `num_local` ranks share free memory equally."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory cached by torch counts as free
        return torch.cuda.mem_get_info(device)[0]
    shared = [psutil.virtual_memory().available, *_free_in_cgroups()]
    return max(0, min([*(free // num_local for free in shared), *_free_address_space()]))


def _free_in_cgroups() -> Iterator[int]:
    """Free bytes in each control group, such as a container, of this process."""
    lines = MEMBERSHIPS.read_text().splitlines() if MEMBERSHIPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for version in VERSIONS:
            group_folder = version.folder / path.lstrip("/")
            for folder in (group_folder, *group_folder.parents) if controllers == version.controllers else ():
                yield from _free_in_cgroup(folder, version)


def _free_in_cgroup(folder: Path, version: _CgroupVersion) -> Iterator[int]:
    if not (folder / version.limit).exists():
        return
    limit = (folder / version.limit).read_text().strip()
    if limit.isdigit():  # otherwise "max"
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield int(limit) - int((folder / version.used).read_text()) + int(counts[version.cache])


def _free_address_space() -> Iterator[int]:
    """Free bytes within the process's address space limit (ulimit -v)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms
