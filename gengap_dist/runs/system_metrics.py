"""What a run's machines are doing: CPU, memory, disk, network and GPUs, sampled beside training into the run folder.

One rank of each node samples, into system.jsonl, or system_<node>.jsonl where there are several nodes. Names are those
of MLflow's own system metrics. Nothing here can hold up or fail a run.
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
GPU, MIG_PREFIX = "GPU-", "MIG-"  # what UUIDs begin with
JOIN_TIMEOUT_SECONDS = 10.0  # for the last sample


@contextmanager
def sampling(out: Path, interval_seconds: float | None, *, num_nodes: int) -> Iterator[None]:
    """While open, a thread appends a sample to the file in `out` every so many seconds, and one at the end.

    Args:
        out: the run folder.
        every: seconds between samples; None: no samples at all.
        num_nodes: machines that take part; with several, each has its own file.
    """
    if interval_seconds is None:
        yield
        return
    path = out / ("system.jsonl" if num_nodes == 1 else f"system_{socket.gethostname()}.jsonl")
    over = threading.Event()
    thread = threading.Thread(
        target=_sample_until_stopped, args=(over, interval_seconds, path), name="system", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(JOIN_TIMEOUT_SECONDS)


def _sample_until_stopped(stop: threading.Event, interval_seconds: float, path: Path) -> None:
    import psutil

    psutil.cpu_percent()  # it counts from the call before
    network = psutil.net_io_counters()
    began = (network.bytes_recv, network.bytes_sent) if network else (0, 0)
    going_on = True
    with _gpus() as gpus:
        while going_on:
            going_on = not stop.wait(interval_seconds)
            with contextlib.suppress(OSError, ValueError, psutil.Error):  # the run comes first
                line = {"time": round(time.time() * 1000), **_machine_metrics(path.parent, began)}
                for index, gpu in gpus.items():
                    line |= _gpu_metrics(index, gpu)
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def _machine_metrics(folder: Path, network_start: tuple[int, int]) -> dict[str, float]:
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
        out["network_receive_megabytes"] = (network.bytes_recv - network_start[0]) / MEGABYTE
        out["network_transmit_megabytes"] = (network.bytes_sent - network_start[1]) / MEGABYTE
    return {name: round(value, 3) for name, value in out.items()}


@contextmanager
def _gpus() -> Iterator[dict[int, Any]]:
    """The driver's handles of the GPUs that this process may use, by nvidia-smi's number; none without a driver.

    Two runs of one machine that have a GPU each do not both call theirs 0. A MIG instance has the number of its GPU.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield {}
        return
    handles: dict[int, Any] = {}
    with contextlib.suppress(pynvml.NVMLError):  # a UUID that the driver does not know hides what follows it
        every = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        for uuid in visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), list(map(pynvml.nvmlDeviceGetUUID, every))):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            whole = (
                pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith(MIG_PREFIX) else handle
            )
            handles[pynvml.nvmlDeviceGetIndex(whole)] = handle
    yield handles
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


def _gpu_metrics(index: int, handle: Any) -> dict[str, float]:
    """Metrics of one GPU, or MIG instance of one; what the driver does not tell is left out."""
    import pynvml

    def told(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(handle)
        except pynvml.NVMLError:  # not supported, mostly
            return None

    busy, milliwatts = told(pynvml.nvmlDeviceGetUtilizationRates), told(pynvml.nvmlDeviceGetPowerUsage)
    memory = told(lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    found = {
        "utilization_percentage": busy and busy.gpu,
        "memory_usage_megabytes": memory and round(memory.used / MEGABYTE, 3),
        "memory_usage_percentage": memory and round(100 * memory.used / memory.total, 3),
        "power_usage_watts": milliwatts and milliwatts / 1000,
    }
    return {f"gpu_{index}_{name}": value for name, value in found.items() if value is not None}


def visible_gpus(visible_devices: str | None, uuids: Sequence[str]) -> list[str]:
    """UUIDs of the GPUs, or MIG instances, that a process may use, in its order.

    Entries are indices, beginnings of the UUIDs of GPUs, or UUIDs of MIG instances; the first says which. One that is
    no such thing, or is true of several GPUs, hides itself and all that follow; one that comes twice hides all. Indices
    are the driver's (CUDA_DEVICE_ORDER=PCI_BUS_ID): on machines with unlike GPUs CUDA may count the fastest first.

    Args:
        listed: CUDA_VISIBLE_DEVICES; None: it is not set.
        uuids: those of all GPUs, by index.

    >>> gpus = ["GPU-5a", "GPU-5b", "GPU-77"]
    >>> visible_gpus("2,0", gpus), visible_gpus("GPU-5b,GPU-7", gpus), visible_gpus("0,3,1", gpus), visible_gpus("GPU-5", gpus)
    (['GPU-77', 'GPU-5a'], ['GPU-5b', 'GPU-77'], ['GPU-5a'], [])
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
    found: list[str] = []
    for entry in entries:
        matching = by_kind[kind](entry) if entry.startswith(kind) else []
        if len(matching) != 1:
            break
        found += matching
    return found if len(set(found)) == len(found) else []
