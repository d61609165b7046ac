"""What a run's machines are doing: CPU, memory, disk, network and GPUs, sampled beside training into the run folder.

One rank of each node samples, into system.jsonl, or system_<node>.jsonl where there are several nodes. Names are those
of MLflow's own system metrics. Nothing here can hold up or fail a run.
"""

import contextlib
import csv
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEGABYTE = 10**6
GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw")
GPU_SECONDS = 5.0  # for nvidia-smi to answer


@contextmanager
def sampling(out: Path, every: float | None, *, num_nodes: int) -> Iterator[None]:
    """While open, a thread appends a sample to the file in `out` every so many seconds, and one at the end.

    Args:
        out: the run folder.
        every: seconds between samples; None: no samples at all.
        num_nodes: machines that take part; with several, each has its own file.
    """
    if every is None:
        yield
        return
    path = out / ("system.jsonl" if num_nodes == 1 else f"system_{socket.gethostname()}.jsonl")
    over = threading.Event()
    thread = threading.Thread(target=_sample_until, args=(over, every, path), name="system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * GPU_SECONDS)


def _sample_until(over: threading.Event, every: float, path: Path) -> None:
    import psutil

    psutil.cpu_percent()  # it counts from the call before
    network = psutil.net_io_counters()
    began = (network.bytes_recv, network.bytes_sent) if network else (0, 0)
    going_on = True
    while going_on:
        going_on = not over.wait(every)
        with contextlib.suppress(OSError, ValueError, psutil.Error, subprocess.SubprocessError):  # the run comes first
            line = {"time": round(time.time() * 1000), **_machine(path.parent, began), **_gpus()}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _machine(folder: Path, began: tuple[int, int]) -> dict[str, float]:
    """CPU, memory and network of this machine, and the disk that `folder` is on."""
    import psutil

    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(folder)), psutil.net_io_counters()
    out = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_megabytes": disk.used / MEGABYTE,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }
    if network:
        out["network_receive_megabytes"] = (network.bytes_recv - began[0]) / MEGABYTE
        out["network_transmit_megabytes"] = (network.bytes_sent - began[1]) / MEGABYTE
    return {name: round(value, 3) for name, value in out.items()}


def _gpus() -> dict[str, float]:
    """All GPUs of this machine, as the driver's own tool tells them; nothing where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return {}
    command = [tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=True).stdout
    return gpus(told)


def gpus(told: str) -> dict[str, float]:
    r"""Metrics from nvidia-smi's lines; what a card does not tell is left out.

    >>> gpus("0, 97, 20480, 81920, 350.5\n1, [N/A], 0, 81920, [N/A]\n")["gpu_0_memory_usage_percentage"]
    25.0
    """
    mebibyte = 2**20 / MEGABYTE
    out: dict[str, float] = {}
    for row in csv.reader(told.splitlines(), skipinitialspace=True):
        index, *cells = row
        busy, used, total, watts = (float(cell) if cell[:1].isdigit() else None for cell in cells)
        found = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": used and round(used * mebibyte, 3),
            "memory_usage_percentage": 100 * used / total if used is not None and total else None,
            "power_usage_watts": watts,
        }
        out |= {f"gpu_{index}_{name}": value for name, value in found.items() if value is not None}
    return out
