"""Out of memory: how libraries say it, and the one sentence that a user gets for it.

torch has an error of its own for it. cuDNN, cuBLAS and the like, which ask the driver for memory themselves, say it
each in its own way; some of their words have other causes, too, so whoever passes them on lets the library speak.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import OutOfMemory

OF_A_GPU = (
    "out of memory",
    "ALLOC_FAILED",  # of cuBLAS, cuSOLVER, cuFFT
    "ALLOCATION_FAILED",  # of cuDNN
)
OR_ELSE = (  # what libraries say without memory, and also of an operation or a GPU that they do not have
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",
    "no valid convolution algorithms available in CuDNN",
)
LITTLE = 512 * 2**20  # bytes free on a GPU, with which OR_ELSE is put down to memory: what handles and workspaces take
OF_A_CPU = ("can't allocate memory", "bad_alloc", "could not create a memory")
MOST_WORDS = 200  # characters of a library's own that a sentence repeats
MOST_ALLOCATIONS = 100_000  # that a snapshot remembers, each with its stack
REMEDY = (
    "choose a smaller batch.micro_size (or auto), train.activation_checkpointing=true, launch.strategy=fsdp or zero3, "
    "or data.device=cpu"
)


def is_out_of_memory(error: BaseException, words: tuple[str, ...] = OF_A_GPU + OF_A_CPU) -> bool:
    """Whether memory was short, by what the error says; where its words have other causes, too, by the GPU as well.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))  # here is no GPU
    False
    """
    if isinstance(error, MemoryError) or any(part in str(error) for part in words):
        return True
    return any(part in str(error) for part in OR_ELSE) and _was_short()


def _was_short() -> bool:
    """Whether this process's GPU has little memory left, or had too little when torch asked for more.

    A convolution passes over kernels whose workspace it cannot get, and says in the end that it has none.
    """
    if not torch.cuda.is_available():
        return False
    if torch.cuda.memory_stats().get("num_ooms", 0):  # since a run's last reset of these counts
        return True
    with suppress(RuntimeError):  # a GPU after some errors answers nothing
        return torch.cuda.mem_get_info()[0] < LITTLE
    return False


def library_message(error: BaseException) -> str:
    r"""What the library said, in one line; of much, the first sentences.

    >>> library_message(RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB."))
    'CUDA out of memory. Tried to allocate 2.00 GiB'
    """
    text = " ".join(str(error).split())
    if len(text) > MOST_WORDS:
        sentences, stop, _ = text[:MOST_WORDS].rpartition(". ")
        text = sentences if stop else text[:MOST_WORDS]
    return text.rstrip(".") or type(error).__name__


@contextmanager
def explaining_out_of_memory(world: World) -> Iterator[None]:
    """While open, a GPU that has no memory left is told about in one sentence, by one rank.

    Raises:
        OutOfMemory: instead of what torch or a library raised; also on ranks that failed because another had done so.
    """
    world.timer.failed_phase = None  # of an earlier run
    try:
        yield
    except RuntimeError as error:
        if world.device.type != "cuda":
            raise
        mine = is_out_of_memory(error, OF_A_GPU)
        count = _count(world, mine)
        if count == 0:
            raise
        if not mine:
            raise OutOfMemory(f"another rank ran out of its GPU's memory: {REMEDY}", told=True) from error
        place = world.timer.failed_phase or world.timer.current
        total = torch.cuda.get_device_properties(world.device).total_memory
        raise OutOfMemory(
            f"rank {world.rank} ran out of the memory of its GPU ({torch.cuda.get_device_name(world.device)}, "
            f"{total / 2**30:.3g} GiB) in {place.activity} (step {place.step}; {library_message(error)}): {REMEDY}",
            told=count > 1,
        ) from error


@contextmanager
def memory_snapshot(world: World, folder: Path | None) -> Iterator[None]:
    """While open, allocations on this rank's GPU are recorded; where its memory runs out, `folder`/rank<R>.pickle is
    written. It must be inside `explaining_out_of_memory`.

    Args:
        world: the ranks.
        folder: made when it is needed; None: nothing is recorded, and nothing on a CPU.
    """
    if folder is None or world.device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS, stacks="python")
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error, OF_A_GPU):
            _write_snapshot(folder / f"rank{world.rank}.pickle")
        raise
    finally:
        torch.cuda.memory._record_memory_history(None)


def _write_snapshot(path: Path) -> None:
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(part))
        part.replace(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error.strerror or error}): make room there", stacklevel=2)


def _count(world: World, mine: bool) -> int:
    """How many ranks ran out of memory so far, this one included; 0 or 1 if the store went with another rank."""
    if world.size > 1:
        with suppress(RuntimeError):
            return dist.distributed_c10d._get_default_store().add("gengap/out_of_memory", int(mine))
    return int(mine)
