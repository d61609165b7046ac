"""The ranks of one run, and the few things they say to each other.

With one rank every call returns its input, so nobody writes `if distributed`. All methods except the attributes are
collective: every rank must reach them, equally often and in the same order.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from gengap_dist.compat.torchrun_store import store_of_this_start
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.errors import UsageError


@dataclass(frozen=True)
class World:
    """One process's place among all: `rank` of `size`, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    timer: PhaseTimer = field(default_factory=PhaseTimer, compare=False, repr=False)

    def __deepcopy__(self, memo: object) -> "World":
        """There is one: a copy of a network that talks to other ranks talks to the same."""
        return self

    def all_reduce(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """Sum over ranks, in place, on every rank. Shape and dtype stay. `what` it is, for whoever waits too long.

        On a GPU the sum is only begun when this returns: `read` waits for its numbers.
        """
        if self.size > 1:
            with self.timer.phase("communication", what, meeting=True):
                dense = tensor.contiguous()  # NCCL refuses any other; gloo takes them
                dist.all_reduce(dense)
                if dense is not tensor:
                    tensor.copy_(dense)
        return tensor

    def all_reduce_to_cpu(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """Sum over ranks, in place, and the sum in the CPU's memory.

        Waiting for it counts as waiting for the other ranks, on a GPU, too: a watchdog sees it.
        """
        self.all_reduce(tensor, what)
        if tensor.is_cpu:
            return tensor
        with self.timer.phase("communication", what, meeting=self.size > 1):
            return tensor.cpu()

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to sum `tensor`, in place; the function returned waits for the sum."""
        if self.size == 1:
            return lambda: tensor
        dense = tensor.contiguous()
        work = dist.all_reduce(dense, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            with self.timer.phase("communication", "agreement on whether to leave", meeting=True):
                work.wait()
            return tensor if dense is tensor else tensor.copy_(dense)

        return wait

    def all_to_all(self, chunks: Sequence[Tensor], heights: Sequence[int], width: int | None = None) -> list[Tensor]:
        """Chunk r of the result is what rank r sent to this rank.

        Args:
            chunks: one matrix per receiving rank; empty ones are welcome.
            heights: rows of the matrix that comes from each rank.
            width: their columns, if not those of `chunks`.
        """
        if self.size == 1:
            return list(chunks)
        columns = chunks[0].shape[1] if width is None else width
        sizes = [height * columns for height in heights]
        received = chunks[0].new_empty(sum(sizes))
        # one flat buffer: gloo's list form wants chunks of one size
        sent = torch.cat([chunk.flatten() for chunk in chunks])
        with self.timer.phase("communication", "all-to-all of activations", meeting=True):
            dist.all_to_all_single(received, sent, sizes, [chunk.numel() for chunk in chunks])
        return [part.view(-1, columns) for part in received.split(sizes)] if columns else [chunks[0][:0]] * self.size

    def broadcast_int(self, value: int) -> int:
        """What rank 0 says."""
        told = torch.tensor([int(value) if self.rank == 0 else 0])
        return int(self.all_reduce(told, "word from rank 0"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(1), "barrier")


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher set them; (0, 0, 1) without a launcher."""
    read = os.environ.get
    return int(read("RANK", "0")), int(read("LOCAL_RANK", "0")), int(read("WORLD_SIZE", "1"))


def local_size() -> int:
    """Ranks on this machine; all of them, where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or environment()[2])


def init_process_group(device: str, timeout_seconds: float) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    On GPUs there are two: NCCL for what lies there, gloo for a few numbers on the CPU.

    Args:
        device: `cpu`, `cuda`, or `auto`: a GPU for each rank of this machine if it has as many, else the CPU.
        timeout_seconds: how long a rank waits for another.

    Raises:
        UsageError: on every rank of a machine with fewer GPUs than ranks, if `device` is cuda; if rank 0 does not come.
    """
    rank, local_rank, size = environment()
    num_gpus = torch.cuda.device_count()
    if device == "cuda":
        _check_gpus(local_rank, num_gpus)
    on_gpu = device == "cuda" or (device == "auto" and local_size() <= num_gpus)
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        # A group that is bound to its GPU connects at once, and no collective has to guess where it takes place.
        options: dict[str, Any] = {"timeout": timeout, "device_id": place if on_gpu else None}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, *_ = next(rendezvous("env://", timeout=timeout))
            try:
                own = store_of_this_start(store, rank, size, timeout)
            except TimeoutError:
                raise UsageError(
                    f"rank {rank} met no rank 0 within launch.timeout_seconds ({timeout_seconds:.0f}): "
                    "see what became of it, or raise the limit"
                ) from None
            options |= {"store": own, "rank": rank, "world_size": size}
        dist.init_process_group(_backend(place), **options)
    return World(rank, size, place, PhaseTimer(on_gpu=on_gpu))


def _check_gpus(local_rank: int, num_gpus: int) -> None:
    """Refuse launch.device=cuda without a GPU for each rank of this machine.

    On all of its ranks, because under torchrun the first speaks for the others. A launcher that does not say how many
    there are leaves each rank to look for its own GPU.
    """
    needed = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))
    if needed > num_gpus:
        remedy = "start fewer ranks" if num_gpus else "check nvidia-smi and torch's build"
        raise UsageError(
            f"launch.device (cuda) needs a GPU for each of {needed} local rank(s), and torch finds {num_gpus} on this "
            f"machine: {remedy}, or choose launch.device=cpu"
        )


def _backend(device: torch.device) -> str:
    """The backends of a process group of ranks on such a device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def ensure_process_group(world: World, timeout_seconds: float) -> None:
    """A process group also for a single rank, which some engines ask for; it talks to nobody.

    It is not bound to its GPU: torch has NCCL split every further group from one that is, which one rank does not need.
    """
    if not dist.is_initialized():
        store, timeout = dist.HashStore(), timedelta(seconds=timeout_seconds)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1, timeout=timeout)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
