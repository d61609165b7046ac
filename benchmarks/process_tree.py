"""Runs a command and measures its whole process tree: seconds, processor time, and peak memory. Linux only.

This process becomes the parent of orphans (PR_SET_CHILD_SUBREAPER), so processes that outlive their parent, such as
those of Ray and of MLflow's uploader, are found, counted and waited for.
"""

import ctypes
import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

SAMPLE_SECONDS = 0.5
GRACE_SECONDS = 60  # for processes that outlive their command
PR_SET_CHILD_SUBREAPER = 36


class Usage(NamedTuple):
    """What a command used."""

    seconds: float
    """Until the command itself returned."""
    cpu_seconds: float
    """User and system time of all its processes, also of those that outlived it."""
    peak_mib: float
    """Largest sum of proportional set sizes over its processes, of samples every SAMPLE_SECONDS."""


class TreeSampler:
    """Samples the processes below this one in a thread."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self.cpu_seconds: dict[psutil.Process, float] = {}
        """Of each process, as last seen; a psutil.Process is equal to another with the same id and start."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_ended, daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._ended.set()
        self._thread.join()

    def _sample_until_ended(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            mib = 0.0
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    self.cpu_seconds[process] = times.user + times.system
                    mib += proportional_set_bytes(process) / 2**20
                except (psutil.Error, OSError):  # it has ended
                    continue
            self.peak_mib = max(self.peak_mib, mib)


def proportional_set_bytes(process: psutil.Process) -> int:
    """PSS: memory of the process, where pages that n processes share count 1/n; 0 for one that has ended."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Usage:
    """Run a command in a folder, with its output in a file.

    Processor time is that of processes that were waited for, as the kernel counts it, or that of the samples, if it is
    larger: the kernel counts nothing of a process whose parent ignores its end, as Ray's raylet does.

    Raises:
        RuntimeError: if the command fails, with the end of its output.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before, sampler = _waited_for(), TreeSampler()
    sampler.start()
    began = time.perf_counter()
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
    seconds = time.perf_counter() - began
    wait_for_orphans()
    sampler.stop()
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    cpu_seconds = max(_waited_for() - before, sum(sampler.cpu_seconds.values()))
    return Usage(seconds, cpu_seconds, sampler.peak_mib)


def _waited_for() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_for_orphans(grace_seconds: float = GRACE_SECONDS) -> None:
    """Wait until no process is left below this one; those left after `grace_seconds` are killed."""
    deadline = time.monotonic() + grace_seconds
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.05)
            if time.monotonic() > deadline:
                for process in psutil.Process().children(recursive=True):
                    process.kill()
