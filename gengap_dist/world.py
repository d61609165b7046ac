"""The ranks of one run, and the few things they say to each other.

With one rank every call returns its input, so nobody writes `if distributed`. All methods except the attributes are
collective: every rank must reach them, equally often and in the same order.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gengap_dist.config import LaunchConfig, UsageError
from gengap_dist.whereabouts import Whereabouts


@dataclass(frozen=True)
class World:
    """One process's place among all: `rank` of `size`, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    where: Whereabouts = field(default_factory=Whereabouts, compare=False, repr=False)

    def sum(self, tensor: Tensor, what: str = "sum") -> Tensor:
        """Sum over ranks, in place, on every rank. Shape and dtype stay. `what` it is, for whoever waits too long."""
        if self.size > 1:
            with self.where.during("communication", what, meeting=True):
                dist.all_reduce(tensor)
        return tensor

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to sum `tensor`, in place; the function returned waits for the sum."""
        if self.size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            with self.where.during("communication", "agreement on whether to leave", meeting=True):
                work.wait()
            return tensor

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
        with self.where.during("communication", "all-to-all of activations", meeting=True):
            dist.all_to_all_single(received, sent, sizes, [chunk.numel() for chunk in chunks])
        return [part.view(-1, columns) for part in received.split(sizes)] if columns else [chunks[0][:0]] * self.size

    def agree(self, value: int) -> int:
        """What rank 0 says."""
        told = torch.tensor([value if self.rank == 0 else 0])
        return int(self.sum(told, "word from rank 0"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros(1), "barrier")


def environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher set them; (0, 0, 1) without a launcher."""
    read = os.environ.get
    return int(read("RANK", "0")), int(read("LOCAL_RANK", "0")), int(read("WORLD_SIZE", "1"))


def connect(config: LaunchConfig) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    On GPUs there are two: NCCL for what lies there, gloo for a few numbers on the CPU.

    Raises:
        UsageError: if launch.device=cuda and this machine has no GPU for this rank.
    """
    rank, local_rank, size = environment()
    num_gpus = torch.cuda.device_count()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)  # torchrun, deepspeed
    if config.device == "cuda" and local_rank >= num_gpus:
        raise UsageError(
            f"launch.device (cuda) needs a GPU for local rank {local_rank}, and this machine shows {num_gpus}: "
            "start fewer ranks, or choose launch.device=cpu"
        )
    on_gpu = config.device == "cuda" or (config.device == "auto" and local_size <= num_gpus)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_seconds))
    return World(rank, size, device, Whereabouts(on_gpu=on_gpu))


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
