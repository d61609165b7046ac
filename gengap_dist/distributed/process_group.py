"""The ranks of a run as a mesh, and their collectives.

With one rank every call returns its input, so callers need no `if distributed`. All methods are collective: every rank
must call them, equally often and in the same order.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from gengap_dist.compat.torchrun_store import restart_store
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.runtime_context import LOOPBACK, local_size, rank_environment
from gengap_dist.errors import UsageError

BATCH = "batch"  # the dimension of a mesh along which ranks have different samples
REPLICATE, SHARD = "replicate", "shard"  # the dimensions into which `World.hybrid_mesh` divides it


@dataclass(frozen=True)
class World:
    """This process among those that share a batch: `rank` of `size` along that dimension, computing on `device`.

    All collectives are over the dimension `batch` of `mesh`, however a strategy divides it, and whatever dimensions
    stand beside it: `rank`, `size` and `group` are those of this dimension only.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    timer: PhaseTimer = field(default_factory=PhaseTimer, compare=False, repr=False)
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)
    """All processes of the run; None: one rank, without a process group."""

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks along the dimension `batch`; None: without a mesh."""
        return None if self.mesh is None else self.mesh.get_group(BATCH)

    def hybrid_mesh(self, shard_size: int, timeout_seconds: float) -> DeviceMesh:
        """The ranks along `batch` as a mesh `replicate` x `shard` with process groups of its own. Collective.

        `shard_size` consecutive ranks, which launchers place on one node if it has so many, form a row; ranks with the
        same place in their rows form a column.

        Args:
            shard_size: divides the number of ranks.
            timeout_seconds: time limit of collectives in these groups.
        """
        rows, timeout = torch.arange(self.size).view(-1, shard_size), timedelta(seconds=timeout_seconds)
        groups: list[Any] = [
            dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timeout, group_desc=name)[0]
            for name, lines in ((REPLICATE, rows.T), (SHARD, rows))
        ]
        return DeviceMesh.from_group(groups, self.device.type, rows, mesh_dim_names=(REPLICATE, SHARD))

    def __deepcopy__(self, memo: object) -> "World":
        """Returns itself: a copy of a model with collectives uses the same group."""
        return self

    def all_reduce(self, tensor: Tensor, label: str = "sum") -> Tensor:
        """Sum over ranks, in place, on every rank. Shape and dtype are unchanged. `label` is shown in stall reports.

        On a GPU the sum is only enqueued when this returns: `all_reduce_to_cpu` waits for its values.
        """
        if self.size > 1:
            with self.timer.phase("communication", label, collective=True):
                dense = tensor.contiguous()  # NCCL requires it; gloo does not
                dist.all_reduce(dense, group=self.group)
                if dense is not tensor:
                    tensor.copy_(dense)
        return tensor

    def all_reduce_to_cpu(self, tensor: Tensor, label: str = "sum") -> Tensor:
        """Sum over ranks, in place; returns the sum in CPU memory.

        On a GPU, too, the wait is timed as communication, and the stall detector sees it.
        """
        self.all_reduce(tensor, label)
        if tensor.is_cpu:
            return tensor
        with self.timer.phase("communication", label, collective=self.size > 1):
            return tensor.cpu()

    def all_reduce_to_cpu_async(self, tensor: Tensor, label: str = "sum") -> Callable[[], Tensor]:
        """Start to sum `tensor` over ranks, in place; the returned function waits, and returns the sum in CPU memory.

        `tensor` is contiguous, and must not be used until then. On a GPU the sum and its copy to the CPU have a stream
        of their own: work that is enqueued later does not wait for them, and the host waits for the copy only.
        """
        work = dist.all_reduce(tensor, group=self.group, async_op=True) if self.size > 1 else None
        if tensor.is_cpu:
            finish = None if work is None else work.wait
        else:
            on_gpu, copied = tensor, torch.cuda.Event()
            self._copy_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copy_stream):
                if work is not None:
                    work.wait()  # makes this stream wait, not the host
                tensor = torch.empty_like(on_gpu, device="cpu", pin_memory=True).copy_(on_gpu, non_blocking=True)
                copied.record()
            on_gpu.record_stream(self._copy_stream)
            finish = copied.synchronize

        def wait() -> Tensor:
            if finish is not None:
                with self.timer.phase("communication", label, collective=self.size > 1):
                    finish()
            return tensor

        return wait

    @cached_property
    def _copy_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def all_to_all(
        self, chunks: Sequence[Tensor], row_counts: Sequence[int], num_columns: int | None = None
    ) -> list[Tensor]:
        """Exchange matrices between ranks; element r of the result comes from rank r.

        Args:
            chunks: one matrix per receiving rank; it may be empty.
            row_counts: number of rows received from each rank.
            num_columns: number of columns received; None: as many as `chunks` have.
        """
        if self.size == 1:
            return list(chunks)
        columns = chunks[0].shape[1] if num_columns is None else num_columns
        sizes = [height * columns for height in row_counts]
        received = chunks[0].new_empty(sum(sizes))
        # one flat buffer: gloo's list form requires chunks of one size
        flat = torch.cat([chunk.flatten() for chunk in chunks])
        with self.timer.phase("communication", "all-to-all of activations", collective=True):
            dist.all_to_all_single(received, flat, sizes, [chunk.numel() for chunk in chunks], self.group)
        return [part.view(-1, columns) for part in received.split(sizes)] if columns else [chunks[0][:0]] * self.size

    def broadcast_int(self, value: int) -> int:
        """The `value` of rank 0, on every rank."""
        of_rank_0 = torch.tensor([int(value) if self.rank == 0 else 0])
        return int(self.all_reduce(of_rank_0, "broadcast from rank 0"))

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.all_reduce(torch.zeros(1), "barrier")


def init_process_group(device: str, timeout_seconds: float) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    On GPUs it has two backends: NCCL for CUDA tensors, gloo for a few numbers on the CPU.

    Args:
        device: `cpu`, `cuda`, or `auto`: one GPU per rank if this machine has enough, else the CPU.
        timeout_seconds: time limit of a collective.

    Raises:
        UsageError: if `device` is cuda and this machine has fewer GPUs than ranks (on all its ranks), or if rank 0
            does not join in time.
    """
    rank, local_rank, size = rank_environment()
    num_gpus = torch.cuda.device_count()
    if device == "cuda":
        _check_gpus(local_rank, num_gpus)
    on_gpu = device == "cuda" or (device == "auto" and local_size() <= num_gpus)
    torch_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(torch_device)
    if size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        # A group that is bound to its GPU connects at once, and torch need not guess the device of a collective.
        options: dict[str, Any] = {"timeout": timeout, "device_id": torch_device if on_gpu else None}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, *_ = next(rendezvous("env://", timeout=timeout))
            try:
                start_store = restart_store(store, rank, size, timeout)
            except TimeoutError:
                raise UsageError(
                    f"rank {rank} could not reach rank 0 within launch.timeout_seconds ({timeout_seconds:.0f}): "
                    "check the log of rank 0, or raise the limit"
                ) from None
            options |= {"store": start_store, "rank": rank, "world_size": size}
        elif os.environ.get("MASTER_ADDR") == LOOPBACK:
            options |= {"store": _loopback_store(rank, size, timeout), "rank": rank, "world_size": size}
        dist.init_process_group(_backend(torch_device), **options)
    world = World(rank, size, torch_device, PhaseTimer(on_gpu=on_gpu))
    return _with_mesh(world) if dist.is_initialized() else world


def _loopback_store(rank: int, size: int, timeout: timedelta) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The store of ranks that are all on this machine; torch's own listens on all of its network interfaces."""
    port = int(os.environ["MASTER_PORT"])
    listener = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
    store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    return store(LOOPBACK, port, size, rank == 0, timeout, master_listen_fd=listener)


def _with_mesh(world: World) -> World:
    """The world with the mesh of its process group, whose only dimension is the batch."""
    assert dist.group.WORLD is not None
    # not init_device_mesh, which may create a group of its own, with torch's timeout instead of ours
    mesh = DeviceMesh.from_group(dist.group.WORLD, world.device.type, mesh_dim_names=(BATCH,))
    return replace(world, mesh=mesh)


def initialized_world(device: torch.device) -> World:
    """The ranks of the process group that this program has already; this process alone if it has none."""
    if not dist.is_available() or not dist.is_initialized():
        return World(device=device)
    return _with_mesh(World(dist.get_rank(), dist.get_world_size(), device))


def _check_gpus(local_rank: int, num_gpus: int) -> None:
    """Refuse launch.device=cuda without a GPU for each rank of this machine.

    It is checked on all its ranks, because torchrun reports only the first error. If the launcher does not set the
    number of local ranks, each rank checks only its own GPU.
    """
    needed = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))
    if needed > num_gpus:
        remedy = "start fewer ranks" if num_gpus else "check nvidia-smi and torch's build"
        raise UsageError(
            f"launch.device (cuda) needs a GPU for each of {needed} local rank(s), and torch finds {num_gpus} on this "
            f"machine: {remedy}, or choose launch.device=cpu"
        )


def _backend(device: torch.device) -> str:
    """The backends of a process group on this device type."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def ensure_process_group(world: World, timeout_seconds: float) -> World:
    """Create a process group for a single rank, which some engines require; returns the world with its mesh.

    It is not bound to its GPU: otherwise torch makes NCCL split every further group from it, which one rank does not
    need.
    """
    if not dist.is_initialized():
        store, timeout = dist.HashStore(), timedelta(seconds=timeout_seconds)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1, timeout=timeout)
    return _with_mesh(world) if world.mesh is None else world


def destroy_process_group() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
