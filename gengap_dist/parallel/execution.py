"""Switches that change how a run is computed, not its result: compilation, activation checkpointing, determinism."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.models.dropout import SampleDropout
from gengap_dist.models.sample_position import SamplePosition, position_of

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def checkpointable_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks for activation checkpointing: only a block's inputs are kept for the backward pass.

    They are the elements of containers (Sequential, ModuleList, ModuleDict) whose elements have children, such as
    residual blocks; outside such containers, modules with children. A container of layers only is one block: split it
    into several to save more memory.

    >>> unit = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> model = nn.Sequential(nn.Sequential(unit(), unit()), nn.Flatten(), unit())
    >>> [len(block) for block in checkpointable_blocks(model)]
    [2, 2, 2]
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if _has_children(child):
            blocks += (
                [child]
                if _is_block_container(model) and not _is_block_container(child)
                else checkpointable_blocks(child) or [child]
            )
    return list(dict.fromkeys(blocks))


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_block_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and any(
        map(_has_children, module.children())
    )


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute every block in the backward pass; in place. Names and state dicts stay, and copies do the same."""
    for block in checkpointable_blocks(model):
        block.forward = partial(_checkpointed_forward, block)


def _checkpointed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)

    position = position_of(block)
    calls = dict(position.calls)

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), _recomputing(block, position, calls)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _recomputing(block: nn.Module, position: SamplePosition, calls: dict[int, int]) -> Iterator[None]:
    """Context of the recomputation: random draws repeat those of the first pass, and running statistics stay."""
    current, position.calls = position.calls, dict(calls)
    try:
        with frozen_running_stats(block):
            yield
    finally:
        position.calls = current


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model compiled by torch.compile, with the same parameters; hooks that are added later do not run in it.

    Raises:
        UsageError: if it has dropout: masks depend on the step and the sample, which would be compiled as constants.
    """
    for name, module in model.named_modules():
        if isinstance(module, SampleDropout) and module.p:
            raise UsageError(
                f"train.compile (true) does not support {name}, whose dropout ({module.p}) mask changes with every "
                "micro-batch: choose a network without dropout, or train.compile=false"
            )
    return torch.compile(
        model, dynamic=False
    )  # rare sizes are not compiled at all: see `Strategy.compiled_batch_sizes`


def check_compiler(device_type: str) -> None:
    """Refuse torch.compile if the compiler it needs is missing.

    Raises:
        UsageError: with the compiler's name.
    """
    cpu = ("CXX", "clang++" if sys.platform == "darwin" else "g++", "a C++")
    variable, usual, kind = cpu if device_type == "cpu" else ("CC", "gcc", "a C")
    name = os.environ.get(variable, usual)
    if shutil.which(name) is None:
        raise UsageError(
            f"train.compile (true) needs {kind} compiler, and there is no {name} on the PATH: install one, name it in "
            f"{variable}, or choose train.compile=false"
        )


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Context in which, if `enabled`, all operations are deterministic bit by bit; settings are restored at the end.

    Raises:
        UsageError: if the model needs an operation that has no deterministic implementation.
    """
    if not enabled:
        yield
        return
    cudnn = torch.backends.cudnn
    before = (
        torch.get_deterministic_debug_mode(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get(WORKSPACE_VARIABLE),
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    os.environ.setdefault(WORKSPACE_VARIABLE, ":4096:8")  # torch requires one of two values for matrix products on GPUs
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split()[0]
        raise UsageError(
            f"train.deterministic (true) is not possible: {operation} has no deterministic form on this device; "
            "choose another network, launch.device=cpu, or train.deterministic=false"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:3]
        if before[3] is None:
            del os.environ[WORKSPACE_VARIABLE]


MALLOPT_SETTINGS = {-4: 0, -1: -1, -2: 64 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3)
ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory, for the rest of this process. Returns whether the settings were applied.

    By default glibc maps large blocks anew each time and returns free memory at the heap's end to the kernel, so every
    pass waits for new zeroed pages. Free blocks of unsuitable sizes are kept, too, so peak memory grows. If the
    environment configures the allocator (mallopt(3), ld.so(8)), nothing is changed; glibc's default is
    MALLOC_TRIM_THRESHOLD_=131072.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing on other systems and C libraries
    if mallopt is None or any(name.startswith(ALLOCATOR_VARIABLES) for name in os.environ):
        return False
    return sum(bool(mallopt(name, value)) for name, value in MALLOPT_SETTINGS.items()) == len(MALLOPT_SETTINGS)
