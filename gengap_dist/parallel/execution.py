"""How passes are computed, which is the same for all strategies: precision, memory format, compilation, recomputation.

Nothing here changes what a run computes, except by rounding.
"""

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gengap_dist.compat.float32_precision import training_float32
from gengap_dist.compat.sgd_first_step import init_momentum
from gengap_dist.config.sections import TrainConfig
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import frozen_running_stats
from gengap_dist.models.dropout import SampleDraws
from gengap_dist.models.sample_position import SamplePosition, position_of
from gengap_dist.runs.own_files import check_own

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CODE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # names the folder where torch.compile keeps what it has compiled


@final
class Execution:
    """The settings of `train` for precision and speed, applied to one network and its optimizer."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """For a network on `device`."""
        self.config, self.device = config, device
        self.compiled_sizes: set[int] = set()
        """Micro-batch sizes of full steps. With train.compile, other sizes, such as those of an epoch's last step, run
        without compilation: compiling them takes longer, and code compiled for any size is slower."""
        # Disabled, the default, it changes nothing. Gradients are summed before they are unscaled, so a gradient that
        # is infinite on one rank is infinite or NaN on all: all ranks skip the step and halve the scale.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.autocast == "float16")
        """Scales the loss, so that gradients in float16 do not underflow; its state is part of a checkpoint."""

    def prepare(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Change the model in place; returns what to call in training: the model, or its compiled form.

        Raises:
            UsageError: if it cannot be compiled.
        """
        if self.config.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.config.activation_checkpointing:
            checkpoint_blocks(model)
        return compiled(model) if self.config.compile else model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare for a first step that the scaler skips."""
        if self.scaler.is_enabled() and isinstance(optimizer, torch.optim.SGD):
            init_momentum(optimizer)

    def run(self, net: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """The output of `net`, in its own dtype also with train.autocast."""
        if self.config.channels_last and inputs.ndim == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        with self.autocast(), self._compile_stance(len(inputs)):
            outputs = net(inputs)
        return outputs.to(getattr(torch, self.config.dtype)) if self.config.autocast else outputs

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the precision of products and convolutions."""
        dtype = self.config.autocast
        return torch.autocast(self.device.type, dtype=getattr(torch, dtype)) if dtype else nullcontext()

    def _compile_stance(self, size: int) -> AbstractContextManager[object]:
        uncompiled = self.config.compile and self.compiled_sizes and size not in self.compiled_sizes
        return torch.compiler.set_stance("force_eager") if uncompiled else nullcontext()

    def unscaled(self, value: Tensor) -> Tensor:
        """Divide a value that is proportional to gradients of the scaled loss by the loss scale."""
        # the same as get_scale, but without waiting for the GPU
        return value / self.scaler.scale(torch.ones((), device=value.device)) if self.scaler.is_enabled() else value


@contextmanager
def torch_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Context with torch's global settings for train.deterministic and train.tf32; see `deterministic`."""
    with deterministic(config.deterministic), training_float32(device, tf32=config.tf32):
        yield


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
    position.restores_calls = True
    try:
        with frozen_running_stats(block):
            yield
    finally:
        position.calls, position.restores_calls = current, False


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model compiled by torch.compile, with the same parameters; hooks that are added later do not run in it.

    Raises:
        UsageError: if it has dropout: masks depend on the step and the sample, which would be compiled as constants.
    """
    for name, module in model.named_modules():
        if isinstance(module, SampleDraws) and module.p:
            raise UsageError(
                f"train.compile (true) does not support {name}, whose dropout ({module.p}) mask changes with every "
                "micro-batch: choose a network without dropout, or train.compile=false"
            )
    return torch.compile(model, dynamic=False)  # rare sizes are not compiled at all: see `Execution.compiled_sizes`


def check_compiler(device_type: str) -> None:
    """Refuse torch.compile if the compiler it needs is missing, or others may have written what it has compiled.

    Raises:
        UsageError: with the compiler's name, or the folder's.
    """
    cpu = ("CXX", "clang++" if sys.platform == "darwin" else "g++", "a C++")
    variable, usual, kind = cpu if device_type == "cpu" else ("CC", "gcc", "a C")
    name = os.environ.get(variable, usual)
    if shutil.which(name) is None:
        raise UsageError(
            f"train.compile (true) needs {kind} compiler, and there is no {name} on the PATH: install one, name it in "
            f"{variable}, or choose train.compile=false"
        )
    # torch executes what it finds there; it does not look who made the folder, whose default name anybody can predict
    cache = Path(os.environ.setdefault(CODE_VARIABLE, f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"))
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own(cache, cache.stat())


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
