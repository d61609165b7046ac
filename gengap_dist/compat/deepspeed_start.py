"""Import and start of DeepSpeed beside an existing process group, without compiling operations (DeepSpeed 0.19).

- On a machine with a GPU, DeepSpeed computes on the GPU also in runs on the CPU, unless an environment variable names
  the accelerator when it is imported.
- On a CPU, `init_distributed` compiles an operation with g++ and ninja for a minute; only inference uses it.
- Its own copy of the world's group has torch's default timeout, not the one of the process group.

Remove when DeepSpeed takes the accelerator as an argument, compiles that operation when it is used, and gives its
group the timeout of the process group.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ACCELERATOR_VARIABLE = "DS_ACCELERATOR"  # read once, when deepspeed is imported


def import_deepspeed(device_type: str) -> Any:
    """The package, set up for `cpu` or `cuda` if this is its first import.

    Raises:
        ImportError: if it is missing or broken.
    """
    before = os.environ.get(ACCELERATOR_VARIABLE)
    if device_type == "cpu":
        os.environ[ACCELERATOR_VARIABLE] = "cpu"
    try:
        import deepspeed
    finally:
        if device_type == "cpu":
            del os.environ[ACCELERATOR_VARIABLE]
        if before is not None:
            os.environ[ACCELERATOR_VARIABLE] = before
    return deepspeed


def join_process_group(deepspeed: Any, device_type: str, timeout_seconds: float) -> None:
    """Make DeepSpeed use torch's process group, with a timeout for its collectives. Collective."""
    from deepspeed.utils import groups

    if deepspeed.comm.is_initialized():
        return
    compatible_ops = deepspeed.ops.__dict__.pop("__compatible_ops__", None)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # no operation can be compiled
    try:
        with errors_only():
            deepspeed.init_distributed(dist_backend="nccl" if device_type == "cuda" else "gloo", verbose=False)
    finally:
        del deepspeed.ops.__compatible_ops__
        if compatible_ops is not None:
            deepspeed.ops.__compatible_ops__ = compatible_ops
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_seconds))


@contextmanager
def errors_only() -> Iterator[None]:
    """Context in which DeepSpeed logs errors only: its warnings are about intended settings."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
