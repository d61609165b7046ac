"""Linux control groups of this process: the limits of a container, a batch system or a systemd slice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

MEMBERSHIPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")  # of the machine


class Group(NamedTuple):
    """A control group."""

    folder: Path
    version: Literal[1, 2]

    def read(self, name: str) -> str:
        """The content of one of its files; "" if it does not exist or cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="utf-8").strip()
        except OSError:
            return ""


def groups(controller: str) -> Iterator[Group]:
    """This process's groups of a controller such as `cpu` or `memory`, and all groups above them, of both versions.

    The path in a container may be that of its host, which the container does not see; its root is found in any case.
    """
    lines = MEMBERSHIPS.read_text(encoding="utf-8").splitlines() if MEMBERSHIPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, version = GROUPS, 2
        elif controller in controllers.split(","):
            root, version = GROUPS / controller, 1
        else:
            continue
        at = root / path.lstrip("/")
        for folder in (at, *at.parents):
            if folder.is_dir():
                yield Group(folder, version)
            if folder == root:
                break


def core_limits() -> Iterator[float]:
    """The limit of each group that has one, in cores: processor time over the time of its period."""
    for group in groups("cpu"):
        if group.version == 2:
            quota, _, period = group.read("cpu.max").partition(" ")
        else:
            quota, period = group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # otherwise "max" or -1
            yield int(quota) / int(period)


def free_memory() -> int:
    """Bytes that this process and others of its groups can still allocate together on this machine."""
    import psutil  # every command imports this module

    return min([psutil.virtual_memory().available, *(free for _, free in memory_limits())])


def num_oom_kills() -> int:
    """How many processes the kernel has killed so far for lack of memory: here, and in each of this process's groups.

    Only its growth says something: the same process may be counted several times, and the machine may have other users.
    """
    counters = {1: "memory.oom_control", 2: "memory.events"}
    texts = [group.read(counters[group.version]) for group in groups("memory")]
    texts += [VMSTAT.read_text(encoding="utf-8")] if VMSTAT.exists() else []
    counts = (line.split() for text in texts for line in text.splitlines())
    return sum(int(count) for name, count in counts if name == "oom_kill")


def memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, free) of each group that has a memory limit, in bytes; file cache that can be dropped counts as free."""
    for group in groups("memory"):
        limit, used, cache = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
            2: ("memory.max", "memory.current", "file"),
        }[group.version]
        if group.read(limit).isdigit():  # otherwise "max"
            counts = dict(line.split() for line in group.read("memory.stat").splitlines())
            size = int(group.read(limit))
            yield size, size - int(group.read(used)) + int(counts[cache])
