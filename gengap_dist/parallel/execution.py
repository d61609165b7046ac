"""Switches that change how a run is computed, not what: compilation, activation recomputing, determinism."""

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

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def blocks(model: nn.Module) -> list[nn.Module]:
    """Parts of a network that are worth computing twice: of each, only what goes in is kept for the backward pass.

    They are the elements of rows (Sequential, ModuleList, ModuleDict) of modules with parts of their own, such as
    residual blocks; away from rows, modules with parts. A row of nothing but layers is one part: cut it into several to
    save more.

    >>> unit = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> [len(block) for block in blocks(nn.Sequential(nn.Sequential(unit(), unit()), nn.Flatten(), unit()))]
    [2, 2, 2]
    """
    found: list[nn.Module] = []
    for child in model.children():
        if _has_parts(child):
            found += [child] if _is_row(model) and not _is_row(child) else blocks(child) or [child]
    return list(dict.fromkeys(found))


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and any(map(_has_parts, module.children()))


def checkpoint_blocks(model: nn.Module) -> None:
    """Have every block computed again in the backward pass, in place; names and states stay, and copies do the same."""
    for block in blocks(model):
        block.forward = partial(_twice, block)


def _twice(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)

    position = position_of(block)
    calls = dict(position.calls)

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        return nullcontext(), _again(block, position, calls)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _again(block: nn.Module, position: SamplePosition, calls: dict[int, int]) -> Iterator[None]:
    """Draws are those of the first time, from `calls` on; running statistics take each batch once."""
    now, position.calls = position.calls, dict(calls)
    try:
        with frozen_running_stats(block):
            yield
    finally:
        position.calls = now


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network as torch.compile makes it, on the same parameters; hooks that come later are not heard in it.

    Raises:
        UsageError: if it drops units: a mask belongs to a step and to places in it, which would be compiled in.
    """
    for name, module in model.named_modules():
        if isinstance(module, SampleDropout) and module.p:
            raise UsageError(
                f"train.compile (true) cannot look into {name}, whose dropout ({module.p}) is another in every "
                "micro-batch: choose a network without dropout, or train.compile=false"
            )
    return torch.compile(
        model, dynamic=False
    )  # sizes that come seldom are not compiled at all: `Strategy.compiled_batch_sizes`


def check_compiler(device_type: str) -> None:
    """Refuse torch.compile where it finds no compiler.

    Raises:
        UsageError: naming it.
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
def deterministic(on: bool) -> Iterator[None]:
    """While open, if `on`, only operations that give the same bits every time; then everything is as it was.

    Raises:
        UsageError: if the network needs an operation that has no such form.
    """
    if not on:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.get_deterministic_debug_mode(), cudnn.deterministic, cudnn.benchmark, os.environ.get(WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    os.environ.setdefault(WORKSPACE, ":4096:8")  # without one of two values, matrix products on GPUs are refused
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split()[0]
        raise UsageError(
            f"train.deterministic (true) cannot be kept: {operation} has no deterministic form on this device; "
            "choose another network, launch.device=cpu, or train.deterministic=false"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:3]
        if before[3] is None:
            del os.environ[WORKSPACE]


SETTINGS = {-4: 0, -1: -1, -2: 64 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3)


OWN_WORDS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tell malloc to keep what is freed, for the rest of this process; whether it was told.

    By default glibc maps large blocks anew each time and gives back what is free at the heap's end, so that every pass
    waits for the kernel to hand out zeroed pages again. Free blocks of the wrong sizes stay, too: the peak grows. Where
    the environment has words of its own for the allocator (mallopt(3), ld.so(8)), those hold; glibc's own default is
    MALLOC_TRIM_THRESHOLD_=131072.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems and C libraries have none
    if mallopt is None or any(name.startswith(OWN_WORDS) for name in os.environ):
        return False
    return sum(bool(mallopt(name, value)) for name, value in SETTINGS.items()) == len(SETTINGS)
