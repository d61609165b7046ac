"""torch.distributed on fake GPUs: what NCCL refuses is refused, the rest goes over the gloo that stands beside it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ReduceOp, _create_work_from_future
from torch.futures import Future

from .counting import note
from .kernels import alias, silenced

DTYPES = {
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bfloat16,
    torch.bool,
}  # fmt: skip

OPERATIONS = [ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]  # by number

_library: Any = None


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cuda":
            raise RuntimeError(f"NCCL: no backend for device type {tensor.device.type}")
        if not tensor.is_contiguous() and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"NCCL: tensors must be contiguous ({tuple(tensor.shape)}, strides {tensor.stride()})")
        if tensor.dtype not in DTYPES:
            raise RuntimeError(f"NCCL: unsupported data type {tensor.dtype}")


def _done(tensors: Any) -> Any:
    """The work of a collective that is over."""
    future: Future[Any] = Future()
    future.set_result(tensors)
    work = _create_work_from_future(future)
    return work.boxed() if hasattr(work, "boxed") else work


def _flat(tensors: Sequence[Any]) -> list[Tensor]:
    return [t for group in tensors for t in (group if isinstance(group, list | tuple) else [group])]


def _group(boxed: Any) -> Any:
    return boxed if hasattr(boxed, "size") else dist.ProcessGroup.unbox(boxed)


def _operation(boxed: Any) -> Any:
    """SUM, MAX, ...: what a dispatched collective is given is a script object."""
    return boxed if isinstance(boxed, ReduceOp) else ReduceOp(OPERATIONS[boxed.op()])


def _gloo(group: Any) -> Any:
    """What carries the data: the group's own gloo, or that of all ranks for a group of all ranks."""
    for one in (group, dist.group.WORLD if group.size() == dist.get_world_size() else group):
        try:
            return one._get_backend(torch.device("cpu"))
        except RuntimeError:
            continue
    raise RuntimeError("fake NCCL: this group has no gloo beside it to carry the data")


def _options(kind: Any, **values: Any) -> Any:
    made = kind()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def _summed(group: Any, tensor: Tensor, operation: Any) -> Tensor:
    """What all ranks' tensors reduce to, on the CPU."""
    whole = alias(tensor).clone().contiguous()
    if group.size() > 1:
        options = _options(dist.AllreduceOptions, reduceOp=_operation(operation))
        _gloo(group).allreduce([whole], options).wait()
    return whole


def _gathered(group: Any, tensor: Tensor) -> list[Tensor]:
    mine = alias(tensor).contiguous()
    if group.size() == 1:
        return [mine]
    found = [torch.empty_like(mine) for _ in range(group.size())]
    _gloo(group).allgather([found], [mine]).wait()
    return found


def allreduce_(tensors: Any, group: Any, operation: Any, sparse: Any = None, async_op: bool = True, timeout: int = -1):
    _check(*tensors)
    note("nccl all_reduce")
    group = _group(group)
    for tensor in tensors if group.size() > 1 else []:
        options = _options(dist.AllreduceOptions, reduceOp=_operation(operation))
        _gloo(group).allreduce([alias(tensor)], options).wait()
    return tensors, _done(tensors)


def broadcast_(tensors: Any, group: Any, root: int, root_tensor: int, async_op: bool = True, timeout: int = -1):
    _check(*tensors)
    group = _group(group)
    for tensor in tensors if group.size() > 1 else []:
        _gloo(group).broadcast([alias(tensor)], _options(dist.BroadcastOptions, rootRank=root)).wait()
    return tensors, _done(tensors)


def allgather_(outputs: Any, inputs: Any, group: Any, async_op: bool = True, timeout: int = -1):
    _check(*_flat(outputs), *inputs)
    for some, tensor in zip(outputs, inputs, strict=True):
        for out, found in zip(some, _gathered(_group(group), tensor), strict=True):
            alias(out).copy_(found)
    return outputs, _done(_flat(outputs))


def _allgather_base_(output: Tensor, input: Tensor, group: Any, async_op: bool = True, timeout: int = -1):
    _check(output, input)
    group = _group(group)
    if output.dtype != input.dtype:
        raise TypeError("NCCL: output tensor must have the same type as input tensor")
    if output.numel() != input.numel() * group.size():
        raise ValueError("NCCL: output tensor size must be equal to world_size times input tensor size")
    alias(output).view(-1).copy_(torch.cat([part.reshape(-1) for part in _gathered(group, input)]))
    return output, _done([output])


def _reduce_scatter_base_(
    output: Tensor, input: Tensor, group: Any, operation: Any, async_op: bool = True, timeout: int = -1
):
    _check(output, input)
    group = _group(group)
    alias(output).view(-1).copy_(_summed(group, input, operation).view(-1).chunk(group.size())[group.rank()])
    return output, _done([output])


def alltoall_base_(
    output: Tensor, input: Tensor, group: Any, received: Any, sent: Any, async_op: bool = True, timeout: int = -1
):
    _check(output, input)
    group = _group(group)
    if sum(sent) not in (0, input.shape[0]) or sum(received) not in (0, output.shape[0]):
        raise RuntimeError("NCCL: split sizes do not match the total dim 0 size")
    if group.size() == 1:
        alias(output).copy_(alias(input))
    else:
        _gloo(group).alltoall_base(alias(output), alias(input), list(received), list(sent)).wait()
    return _done([output])


def barrier(tensor: Tensor, group: Any, devices: Any, async_op: bool = True, timeout: int = -1):
    group = _group(group)
    if group.size() > 1:
        _gloo(group).barrier().wait()
    return _done([tensor])


def allgather_into_tensor_coalesced_(outputs: Any, inputs: Any, group: Any, async_op: bool = True):
    for output, input in zip(outputs, inputs, strict=True):
        _allgather_base_(output, input, group)
    return _done(list(outputs))


def reduce_scatter_tensor_coalesced_(
    outputs: Any, inputs: Any, group: Any, operation: Any, async_op: bool = True, timeout: int = -1
):
    for output, input in zip(outputs, inputs, strict=True):
        _reduce_scatter_base_(output, input, group, operation)
    return _done(list(outputs))


def allreduce_coalesced_(tensors: Any, group: Any, operation: Any, async_op: bool = True, timeout: int = -1):
    for tensor in tensors:
        allreduce_([tensor], group, operation)
    return _done(list(tensors))


COLLECTIVES = (
    allreduce_, broadcast_, allgather_, _allgather_base_, _reduce_scatter_base_, alltoall_base_, barrier,
    allgather_into_tensor_coalesced_, reduce_scatter_tensor_coalesced_, allreduce_coalesced_,
)  # fmt: skip


def _connect(group: Any, device: torch.device) -> None:
    """What a group that is bound to a GPU does first: NCCL's communicator is made on the current one."""
    if device.index != torch.cuda.current_device():
        raise RuntimeError(f"NCCL: the group is bound to {device}, and cuda:{torch.cuda.current_device()} is current")


def install() -> None:
    """Take the place of ProcessGroupNCCL's collectives in this process."""
    global _library
    dist.ProcessGroupNCCL.eager_connect_single_device = _connect
    dist.ProcessGroupNCCL.perform_nocolor_split = _connect
    _library = torch.library.Library("c10d", "IMPL", "CUDA")
    with silenced():
        for collective in COLLECTIVES:
            _library.impl(collective.__name__, collective, "CUDA", allow_override=True)
