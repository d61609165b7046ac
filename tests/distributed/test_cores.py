"""How many cores a program may use, and what its ranks make of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gengap_dist.distributed import cgroups, cores
from gengap_dist.distributed.cores import available_cores, thread_variables, threads_per_rank

VARIABLES = (
    "OMP_NUM_THREADS",
    "SLURM_CPUS_PER_TASK",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "RANK",
    "TORCHELASTIC_RUN_ID",
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """64 cores, all allowed, without groups and without variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cgroups, "MEMBERSHIPS", tmp_path / "membership")
    monkeypatch.setattr(cgroups, "GROUPS", tmp_path)


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_least_limit_counts(monkeypatch, tmp_path):
    assert available_cores() == (64, "machine")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(48)))
    assert available_cores() == (48, "affinity")
    (tmp_path / "membership").write_text("0::/pod/container\n")
    group(tmp_path, "pod/container", cpu__max="max 100000")
    assert available_cores() == (48, "affinity")
    group(tmp_path, "pod", cpu__max="350000 100000")  # of a group above
    assert available_cores() == (3.5, "cgroup")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert available_cores() == (2, "SLURM_CPUS_PER_TASK")


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_groups_of_version_1(tmp_path, controllers):
    (tmp_path / "membership").write_text(f"5:{controllers}:/docker/abc\n4:memory:/docker/abc\n")
    group(tmp_path, "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert available_cores() == (64, "machine")
    # a container sees its own group as the root, and the path of its host
    group(tmp_path, "cpu", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    assert available_cores() == (1.5, "cgroup")
    group(tmp_path, "cpu/docker/abc", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert available_cores() == (0.5, "cgroup")
    assert threads_per_rank(1) == (1, "cgroup")


def test_ranks_share_the_cores(monkeypatch):
    assert threads_per_rank(4) == (16, "machine")
    assert threads_per_rank(100) == (1, "machine")
    assert threads_per_rank(4, largest=3) == (3, "launch.threads_per_rank")
    assert threads_per_rank(4, largest=30) == (16, "machine")
    assert threads_per_rank(1, reserved=2.5) == (2, "Ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_per_rank(4) == (5, "OMP_NUM_THREADS")
    assert threads_per_rank(4, largest=3) == (3, "launch.threads_per_rank")
    assert threads_per_rank(1, reserved=2) == (2, "Ray")  # Ray itself sets the variable


def test_a_rank_that_is_a_task_of_slurm_does_not_share_its_limit(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert threads_per_rank(2) == (3, "SLURM_CPUS_PER_TASK")
    monkeypatch.setenv("RANK", "1")
    assert threads_per_rank(2) == (6, "SLURM_CPUS_PER_TASK")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")  # here the task is torchrun, with all ranks
    assert threads_per_rank(2) == (3, "SLURM_CPUS_PER_TASK")


def test_what_the_user_says_about_waiting_is_kept(monkeypatch):
    assert thread_variables(3) == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": cores.SPIN_COUNT}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert thread_variables(3) == {"OMP_NUM_THREADS": "3"}


CODE = """
import os
from pathlib import Path
from gengap_dist.distributed.cores import threads_per_rank
Path("threads." + os.environ["RANK"]).write_text(" ".join(map(str, threads_per_rank(2))))
"""


@pytest.mark.processes
@pytest.mark.parametrize(("given", "expected"), [(None, "machine"), ("1", "OMP_NUM_THREADS")])
def test_under_torchrun_the_variable_counts_only_if_the_user_set_it(tmp_path, given, expected):
    """torchrun sets it to 1 for several ranks: that is no wish of the user."""
    (tmp_path / "say.py").write_text(CODE)
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env |= {"OMP_NUM_THREADS": given} if given else {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "say.py"]
    subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120, check=True)
    sources = [(tmp_path / f"threads.{rank}").read_text().split()[1] for rank in (0, 1)]
    assert all(source == expected or (expected == "machine" and source in ("affinity", "cgroup")) for source in sources)
