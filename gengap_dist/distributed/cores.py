"""How many cores this program may use, and how many threads each of its ranks starts: the one place that decides it.

The cores are the least of the process's affinity mask, the limits of its control groups (a container's share of its
host), and SLURM_CPUS_PER_TASK. The ranks of a machine share them. A rank on a Ray cluster has the CPUs that Ray
reserves for it, and launch.threads_per_rank is an upper limit. OMP_NUM_THREADS, if the user has set it, is kept.

More threads than cores do not only wait for a core: threads of OpenMP that wait for each other in a loop, as they do by
default, use up the time of those that they wait for. So this module also bounds that wait; see `bounded_wait`.
"""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gengap_dist.compat.torchrun_threads import set_by_torchrun
from gengap_dist.distributed import cgroups

SPIN_COUNT = "1000"


class Cores(NamedTuple):
    """Cores that this program may use."""

    number: float
    """In a container it may be a fraction."""
    source: str
    """What limits it: `machine`, `affinity`, `cgroup`, or SLURM_CPUS_PER_TASK."""

    @property
    def whole(self) -> int:
        """Whole cores, at least one."""
        return max(1, int(self.number))


class Threads(NamedTuple):
    """Threads of a rank."""

    number: int
    source: str
    """As in `Cores`, or `Ray`, launch.threads_per_rank or OMP_NUM_THREADS."""


def available_cores() -> Cores:
    """The cores that this process and its children may use."""
    machine = os.cpu_count() or 1
    limits = [Cores(machine, "machine")]
    if hasattr(os, "sched_getaffinity") and (allowed := len(os.sched_getaffinity(0))) < machine:
        limits.append(Cores(allowed, "affinity"))
    limits += [Cores(limit, "cgroup") for limit in cgroups.core_limits()]
    if (of_task := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        limits.append(Cores(int(of_task), "SLURM_CPUS_PER_TASK"))
    return min(limits, key=lambda cores: cores.number)


def threads_by_user() -> int | None:
    """OMP_NUM_THREADS, of the outermost level; None if the user has not set it."""
    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(number) if number.isdigit() and int(number) and not set_by_torchrun() else None


def threads_per_rank(num_local: int, largest: int | None = None, reserved: float | None = None) -> Threads:
    """The threads of each of `num_local` ranks on this machine.

    Args:
        num_local: number of ranks that share the cores.
        largest: launch.threads_per_rank.
        reserved: CPUs that Ray reserves for this rank.
    """
    if largest is None and reserved is None and (number := threads_by_user()):
        return Threads(number, "OMP_NUM_THREADS")
    cores = available_cores()
    shares = [Threads(_share(cores, num_local), cores.source)]
    if reserved is not None:
        shares.append(Threads(max(1, int(reserved)), "Ray"))
    if largest is not None:
        shares.append(Threads(largest, "launch.threads_per_rank"))
    return min(shares, key=lambda threads: threads.number)


def processor_name() -> str:
    """The model name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _share(cores: Cores, num_local: int) -> int:
    """Whole cores of one rank."""
    # where each rank is a task of Slurm, the limit of a task is the rank's own
    is_own = cores.source == "SLURM_CPUS_PER_TASK" and "RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return max(1, int(cores.number if is_own else cores.number / num_local))


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables of a rank with this number of threads, read when torch and numpy are imported."""
    return {"OMP_NUM_THREADS": str(threads)} | bounded_wait()


def bounded_wait() -> dict[str, str]:
    """The environment variable that bounds how long a thread of OpenMP waits in a loop.

    A thread that waits for the others of its team does so in a loop for SPIN_COUNT rounds (microseconds, instead of up
    to seconds), then it sleeps: alone a run is as fast, and side by side runs no longer wait for each other
    (docs/adr/0106). What the user has set is kept.
    """
    by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {} if by_user else {"GOMP_SPINCOUNT": SPIN_COUNT}
