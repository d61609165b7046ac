"""Memory in bytes that a rank can still allocate, within the limits of the machine, its container and its process."""

import resource
from collections.abc import Iterator

import psutil
import torch

from gengap_dist.distributed import cgroups


def available_memory(device: torch.device, num_local: int) -> int:
    """Bytes that this rank can still allocate on `device`; on a CPU `num_local` ranks share free memory equally."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory cached by torch counts as free
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([cgroups.free_memory() // num_local, *_free_address_space()]))


def _free_address_space() -> Iterator[int]:
    """Free bytes within the process's address space limit (ulimit -v)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms
