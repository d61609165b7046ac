"""System metrics: CPU, memory, disk, network and GPUs, sampled during training into the run folder.

One rank of each node samples, into system.jsonl, or system_<node>.jsonl with several nodes. Names are those of MLflow's
system metrics. Nothing here can delay or fail a run.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEGABYTE = 10**6
GPU, MIG_PREFIX = "GPU-", "MIG-"  # prefixes of UUIDs
JOIN_TIMEOUT_SECONDS = 10.0  # at the end, for the last sample


@contextmanager
def sampling(out: Path, interval_seconds: float | None, *, num_nodes: int) -> Iterator[None]:
    """Context in which a thread appends samples to a file in `out` at a fixed interval, and one at the end.

    Args:
        out: the run folder.
        every: seconds between samples; None: no samples.
        num_nodes: number of nodes of the run; with several, each has its own file.
    """
    if interval_seconds is None:
        yield
        return
    path = out / ("system.jsonl" if num_nodes == 1 else f"system_{socket.gethostname()}.jsonl")
    stop = threading.Event()
    thread = threading.Thread(
        target=_sample_until_stopped, args=(stop, interval_seconds, path), name="system", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_TIMEOUT_SECONDS)


def _sample_until_stopped(stop: threading.Event, interval_seconds: float, path: Path) -> None:
    import psutil

    psutil.cpu_percent()  # it measures since the previous call
    network = psutil.net_io_counters()
    network_start = (network.bytes_recv, network.bytes_sent) if network else (0, 0)
    running = True
    with _gpus() as gpus:
        while running:
            running = not stop.wait(interval_seconds)
            with contextlib.suppress(OSError, ValueError, psutil.Error):  # a failed sample must not affect the run
                line = {"time": round(time.time() * 1000), **_machine_metrics(path.parent, network_start)}
                for index, gpu in gpus.items():
                    line |= _gpu_metrics(index, gpu)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def _machine_metrics(folder: Path, network_start: tuple[int, int]) -> dict[str, float]:
    """Metrics of CPU, memory and network of this machine, and of the disk of `folder`."""
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
        out["network_receive_megabytes"] = (network.bytes_recv - network_start[0]) / MEGABYTE
        out["network_transmit_megabytes"] = (network.bytes_sent - network_start[1]) / MEGABYTE
    return {name: round(value, 3) for name, value in out.items()}


@contextmanager
def _gpus() -> Iterator[dict[int, Any]]:
    """Context with NVML handles of the GPUs that this process may use, by nvidia-smi's index; none without a driver.

    By this index, two runs with one GPU each on one machine have different names. A MIG instance has the index of its
    GPU.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield {}
        return
    handles: dict[int, Any] = {}
    with contextlib.suppress(pynvml.NVMLError):  # GPUs after a UUID unknown to the driver are not visible
        all_handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        for uuid in visible_gpus(
            os.environ.get("CUDA_VISIBLE_DEVICES"), list(map(pynvml.nvmlDeviceGetUUID, all_handles))
        ):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            whole = (
                pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith(MIG_PREFIX) else handle
            )
            handles[pynvml.nvmlDeviceGetIndex(whole)] = handle
    yield handles
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


def _gpu_metrics(index: int, handle: Any) -> dict[str, float]:
    """Metrics of a GPU or MIG instance, without those that the driver does not provide."""
    import pynvml

    def query(function: Callable[[Any], Any]) -> Any:
        try:
            return function(handle)
        except pynvml.NVMLError:  # not supported, mostly
            return None

    utilization, milliwatts = query(pynvml.nvmlDeviceGetUtilizationRates), query(pynvml.nvmlDeviceGetPowerUsage)
    memory = query(lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    metrics = {
        "utilization_percentage": utilization and utilization.gpu,
        "memory_usage_megabytes": memory and round(memory.used / MEGABYTE, 3),
        "memory_usage_percentage": memory and round(100 * memory.used / memory.total, 3),
        "power_usage_watts": milliwatts and milliwatts / 1000,
    }
    return {f"gpu_{index}_{name}": value for name, value in metrics.items() if value is not None}


def visible_gpus(visible_devices: str | None, uuids: Sequence[str]) -> list[str]:
    """UUIDs of the GPUs or MIG instances that a process may use, in the process's order.

    Entries are indices, prefixes of GPU UUIDs, or UUIDs of MIG instances; the first entry defines the kind. An entry
    that is invalid or matches several GPUs hides itself and all later entries; a duplicate hides all. Indices are those
    of the driver (CUDA_DEVICE_ORDER=PCI_BUS_ID): on machines with different GPUs CUDA may list the fastest first.

    Args:
        listed: value of CUDA_VISIBLE_DEVICES; None: not set.
        uuids: UUIDs of all GPUs, by index.

    >>> gpus = ["GPU-5a", "GPU-5b", "GPU-77"]
    >>> [visible_gpus(devices, gpus) for devices in ("2,0", "GPU-5b,GPU-7", "0,3,1", "GPU-5")]
    [['GPU-77', 'GPU-5a'], ['GPU-5b', 'GPU-77'], ['GPU-5a'], []]
    """
    if visible_devices is None:
        return list(uuids)
    entries = [entry.strip() for entry in visible_devices.split(",")]
    kind = entries[0][:4] if entries[0][:4] in (GPU, MIG_PREFIX) else ""
    by_kind: dict[str, Callable[[str], list[str]]] = {
        GPU: lambda entry: [uuid for uuid in uuids if uuid.startswith(entry)],
        MIG_PREFIX: lambda entry: [entry],
        "": lambda entry: list(uuids[int(entry) :][:1]) if entry.isdecimal() else [],
    }
    visible: list[str] = []
    for entry in entries:
        matching = by_kind[kind](entry) if entry.startswith(kind) else []
        if len(matching) != 1:
            break
        visible += matching
    return visible if len(set(visible)) == len(visible) else []
