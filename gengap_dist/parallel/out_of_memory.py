"""Detects out-of-memory errors of libraries, and reports them to the user in one sentence.

torch has its own exception. cuDNN, cuBLAS and similar libraries allocate from the driver themselves and have messages
of their own. Some of these messages have other causes, too, so our sentence always quotes the library.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from gengap_dist.compat.default_store import default_store
from gengap_dist.compat.memory_history import record_allocations, stop_recording, write_recording
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import OutOfMemory

GPU_MESSAGES = (
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS, cuSOLVER, cuFFT
    "ALLOCATION_FAILED",  # of cuDNN
)
AMBIGUOUS_MESSAGES = (  # raised without memory, but also for an operation or a GPU that is not supported
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",
    "no valid convolution algorithms available in CuDNN",
)
LOW_MEMORY_BYTES = 512 * 2**20  # with less free on the GPU, AMBIGUOUS_MESSAGES are caused by memory
CPU_MESSAGES = ("can't allocate memory", "bad_alloc", "could not create a memory")
MAX_MESSAGE_LENGTH = 200  # characters quoted of a library's message
MAX_ALLOCATIONS = 100_000  # in a snapshot, each with its stack
REMEDY = (
    "choose a smaller batch.micro_size (or auto), train.activation_checkpointing=true, launch.strategy=fsdp or zero3, "
    "or data.device=cpu"
)


def is_out_of_memory(error: BaseException, messages: tuple[str, ...] = GPU_MESSAGES + CPU_MESSAGES) -> bool:
    """Whether an error means out of memory, by its message; for ambiguous messages, the GPU's state also decides.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))  # without a GPU
    False
    """
    if isinstance(error, MemoryError) or any(text in str(error) for text in messages):
        return True
    return any(text in str(error) for text in AMBIGUOUS_MESSAGES) and _gpu_memory_was_short()


def _gpu_memory_was_short() -> bool:
    """Whether this process's GPU has little free memory, or torch has failed to allocate.

    A convolution skips kernels whose workspace cannot be allocated, and reports in the end that no kernel was found.
    """
    if not torch.cuda.is_available():
        return False
    if torch.cuda.memory_stats().get("num_ooms", 0):  # since the run last reset these statistics
        return True
    with suppress(RuntimeError):  # after some errors a GPU answers no query
        return torch.cuda.mem_get_info()[0] < LOW_MEMORY_BYTES
    return False


def library_message(error: BaseException) -> str:
    r"""The library's message in one line; of a long one, the first sentences.

    >>> library_message(RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB."))
    'CUDA out of memory. Tried to allocate 2.00 GiB'
    """
    text = " ".join(str(error).split())
    if len(text) > MAX_MESSAGE_LENGTH:
        sentences, stop, _ = text[:MAX_MESSAGE_LENGTH].rpartition(". ")
        text = sentences if stop else text[:MAX_MESSAGE_LENGTH]
    return text.rstrip(".") or type(error).__name__


@contextmanager
def explaining_out_of_memory(world: World) -> Iterator[None]:
    """Context in which an out-of-memory error of a GPU becomes one sentence, reported by one rank.

    Raises:
        OutOfMemory: instead of the error of torch or a library; also on ranks that failed because another rank did.
    """
    world.timer.failed_phase = None  # may be set by an earlier run
    try:
        yield
    except RuntimeError as error:
        if world.device.type != "cuda":
            raise
        failed_here = is_out_of_memory(error, GPU_MESSAGES)
        count = _count_failed_ranks(world, failed_here)
        if count == 0:
            raise
        if not failed_here:
            raise OutOfMemory(f"another rank ran out of its GPU's memory: {REMEDY}", reported_elsewhere=True) from error
        phase = world.timer.failed_phase or world.timer.current
        total = torch.cuda.get_device_properties(world.device).total_memory
        raise OutOfMemory(
            f"rank {world.rank} ran out of the memory of its GPU ({torch.cuda.get_device_name(world.device)}, "
            f"{total / 2**30:.3g} GiB) in {phase.activity} (step {phase.step}; {library_message(error)}): {REMEDY}",
            reported_elsewhere=count > 1,
        ) from error


@contextmanager
def memory_snapshot(world: World, folder: Path | None) -> Iterator[None]:
    """Context in which allocations on this rank's GPU are recorded; when memory runs out, `folder`/rank<R>.pickle is
    written. Enter it inside `explaining_out_of_memory`.

    Args:
        world: the ranks; on CPUs nothing is recorded.
        folder: created when needed; None: nothing is recorded.
    """
    if folder is None or world.device.type != "cuda":
        yield
        return
    record_allocations(MAX_ALLOCATIONS)
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error, GPU_MESSAGES):
            _write_snapshot(folder / f"rank{world.rank}.pickle")
        raise
    finally:
        stop_recording()


def _write_snapshot(path: Path) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(exist_ok=True)
        write_recording(part)
        part.replace(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error.strerror or error}): free disk space there", stacklevel=2)


def _count_failed_ranks(world: World, failed: bool) -> int:
    """How many ranks ran out of memory so far, including this one; only this one if the store is down."""
    if world.size > 1:
        with suppress(RuntimeError):
            return default_store().add("gengap/out_of_memory", int(failed))
    return int(failed)
