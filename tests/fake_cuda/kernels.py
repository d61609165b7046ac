"""What torch would launch as kernels, computed operator by operator by the CPU's kernels on the same memory.

A CUDA tensor's memory is host memory, so a CPU tensor can alias it: every operator under dispatch key CUDA lowers its
arguments to aliases, calls itself on the CPU, and lifts what comes back. Views, allocations and copies between devices
stay torch's own.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .counting import note

aten = torch.ops.aten
CPU = torch.device("cpu")

NATIVE = {  # metadata and memory only: the runtime library serves them
    "as_strided", "view", "view.dtype", "_reshape_alias", "unfold", "empty.memory_format", "empty_strided",
    "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_", "resize_", "is_set_to",
    "_pin_memory", "is_pinned", "record_stream", "_local_scalar_dense", "_has_same_storage_numel",
    "_efficientzerotensor", "_resize_output_", "_conj_copy", "_copy_from", "_copy_from_and_resize", "alias", "detach",
    "_nested_view_from_buffer", "lift", "lift_fresh", "_storage_resize_", "resize_as_sparse_", "copy_",
}  # fmt: skip
COMPOSITE = ["convolution", "convolution_backward", "_convolution", "cudnn_convolution"]  # computed as one
CPU_INDICES = {"index.Tensor", "_index_put_impl_", "index_put_", "index.Tensor_out"}  # may be given some, and wait
WAITING = {  # operators whose kernels ask the GPU for the size of their result
    "nonzero": "nonzero", "nonzero.out": "nonzero", "masked_select": "masked_select", "equal": "equal",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique_consecutive", "bincount": "bincount",
    "repeat_interleave.Tensor": "repeat_interleave",
}  # fmt: skip

Kernel = Callable[..., Any]
_library: Any = None  # torch forgets kernels whose library is gone


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor on the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    if not tensor.numel() and not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    raw = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(raw, tensor.storage_offset(), tensor.shape, tensor.stride())


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on a fake GPU, with the same strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        alias(out).copy_(tensor)
    return out


class _Call:
    """One call of an operator: which tensors were lowered, and where they were."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.pairs: list[tuple[Tensor, Tensor, str]] = []  # alias, original, name of the argument
        self.devices: set[torch.device] = set()
        self.on_host: list[tuple[str, Tensor]] = []
        self.name = name
        self.lowered = {key: self._lower(value, key) for key, value in given.items()}

    def _lower(self, value: Any, argument: str) -> Any:
        if isinstance(value, Tensor):
            if value.device.type == "cuda":
                self.devices.add(value.device)
                self.pairs.append((alias(value), value, argument))
                return self.pairs[-1][0]
            if value.device.type == "cpu":
                self.on_host.append((argument, value))
        elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self._lower(part, argument) for part in value)
        return value

    def check_devices(self, writes: set[str]) -> None:
        """Refuse what torch's kernels refuse: tensors of several devices, but for single numbers of a CPU."""
        for argument, tensor in self.on_host:
            if tensor.dim() == 0 and argument not in writes:
                continue
            if self.name in CPU_INDICES and argument == "indices":
                note("sync: CPU indices of a CUDA tensor are copied")
                continue
            there = next(iter(self.devices), "cuda:0")
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{there} and cpu! (argument {argument} of {self.name})"
            )
        if len(self.devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {self.devices} ({self.name})")

    def device(self, positions: list[str]) -> torch.device:
        """Where the result goes; the arguments that say so are changed to what the CPU is asked."""
        device = next(iter(self.devices), None)
        if self.lowered.get("device") is not None:
            device = torch.device(self.lowered["device"])
            self.lowered["device"] = CPU
        if self.lowered.get("pin_memory"):
            self.lowered["pin_memory"] = False
        if self.lowered.get("generator") is not None:
            self.lowered["generator"] = None
        if device is None or device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def lift(self, value: Any, device: torch.device) -> Any:
        """What the CPU returned, as CUDA tensors: an argument where it is one."""
        if isinstance(value, Tensor):
            for lowered, original, _ in self.pairs:
                if value is lowered:
                    _resized(original, value)
                    return original
            return onto(value, device)
        if isinstance(value, list | tuple):
            return type(value)(self.lift(part, device) for part in value)
        return value


def _resized(original: Tensor, value: Tensor) -> None:
    """Give an argument that the CPU's kernel has resized its new size and numbers."""
    if original.shape != value.shape:
        original.resize_(value.shape)
        alias(original).copy_(value)


def _kernel(name: str, operator: Any, special: Kernel | None) -> Kernel:
    schema = operator._schema
    positions = [argument.name for argument in schema.arguments]
    writes = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positions, args, strict=False)) | kwargs
        call = _Call(name, given)
        call.check_devices(writes)
        device = call.device(positions)
        if name in WAITING:
            note(f"sync: {WAITING[name]}")
        if name.startswith("index") and any(map(_is_mask, given.get("indices") or ())):
            note("sync: boolean mask as index (nonzero)")
        with torch._C._AutoDispatchBelowAutograd():
            out = special(call.lowered) if special else _on_cpu(operator, schema, call.lowered)
        for lowered, original, argument in call.pairs:
            if argument in writes:
                _resized(original, lowered)
        return call.lift(out, device)

    return kernel


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _on_cpu(operator: Any, schema: Any, given: dict[str, Any]) -> Any:
    args = [given[a.name] for a in schema.arguments if a.name in given and not a.kwarg_only]
    kwargs = {a.name: given[a.name] for a in schema.arguments if a.name in given and a.kwarg_only}
    numbers = (
        isinstance(given.get(a.name), int | float | complex) for a in schema.arguments if str(a.type) == "Tensor"
    )
    if any(numbers):  # a number where a tensor may stand: another overload
        return getattr(aten, schema.name.removeprefix("aten::"))(*args, **kwargs)
    return operator(*args, **kwargs)


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_`, which waits as torch's does: not within a device, nor between it and pinned memory if so asked."""
    if self.device.type == "cuda" and source.device.type == "cuda":
        with torch._C._AutoDispatchBelowAutograd():
            alias(self).copy_(alias(source))
        return self
    if self.numel():
        to_gpu = self.device.type == "cuda"
        pinned = (source if to_gpu else self).is_pinned()
        if not (non_blocking and (pinned or to_gpu)):
            note(f"sync: copy {'H2D' if to_gpu else 'D2H'} {'pinned' if pinned else 'pageable'}")
        with torch._C._AutoDispatchBelowAutograd():
            if to_gpu:
                alias(self).copy_(source)
            else:
                self.copy_(alias(source))
    return self


# -- operators that only GPUs have: cuDNN's batch norm, and the parts of torch's SyncBatchNorm -------------------------


def _wide(vector_C: Tensor, like: Tensor) -> Tensor:
    return vector_C.view(1, -1, *[1] * (like.dim() - 2))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _but_channels(tensor: Tensor) -> list[int]:
    return [dim for dim in range(tensor.dim()) if dim != 1]


def _cudnn_batch_norm(a: dict[str, Any]) -> tuple[Tensor, ...]:
    found = aten.native_batch_norm(
        a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["training"],
        a["exponential_average_factor"], a["epsilon"],
    )  # fmt: skip
    return *found, torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return aten.native_batch_norm_backward(
        a["grad_output"], a["input"], a["weight"], a["running_mean"], a["running_var"], a["save_mean"], a["save_var"],
        True, a["epsilon"], [True, True, True],
    )  # fmt: skip


def _batch_norm_stats(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    values = _exact(a["input"])
    var, mean = torch.var_mean(values, _but_channels(values), correction=0)
    return mean, (var + a["eps"]).rsqrt()


def _batch_norm_gather_stats(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    means, counts = a["mean"], a["counts"].to(a["mean"].dtype)[:, None]
    total, variances = counts.sum(), a["invstd"].pow(-2) - a["eps"]
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    if a["running_mean"] is not None:
        share, unbiased = a["momentum"], var * total / (total - 1)
        for running, new in ((a["running_mean"], mean), (a["running_var"], unbiased)):
            running.mul_(1 - share).add_(new.to(running.dtype), alpha=share)
    return mean, (var + a["eps"]).rsqrt()


def _batch_norm_elemt(a: dict[str, Any]) -> Tensor:
    values = _exact(a["input"])
    out = (values - _wide(a["mean"], values)) * _wide(a["invstd"], values)
    out = out if a["weight"] is None else out * _wide(a["weight"], values)
    out = out if a["bias"] is None else out + _wide(a["bias"], values)
    return out.to(a["input"].dtype)


def _batch_norm_backward_reduce(a: dict[str, Any]) -> tuple[Tensor | None, ...]:
    grad, values = _exact(a["grad_out"]), _exact(a["input"])
    inner, weight = values - _wide(a["mean"], values), a["weight"]
    total, along = grad.sum(_but_channels(values)), (grad * inner).sum(_but_channels(values))
    of_weight = None if weight is None else (along * a["invstd"]).to(weight.dtype)
    return total, along, of_weight, None if weight is None else total.to(weight.dtype)


def _batch_norm_backward_elemt(a: dict[str, Any]) -> Tensor:
    grad, values = _exact(a["grad_out"]), _exact(a["input"])
    total, scale = a["count"].sum(), _wide(a["invstd"], values)
    inner = values - _wide(a["mean"], values)
    out = grad - _wide(a["sum_dy"], values) / total - inner * scale * scale * _wide(a["sum_dy_xmu"], values) / total
    out = out * scale if a["weight"] is None else out * scale * _wide(a["weight"], values)
    return out.to(a["input"].dtype)


SPECIAL: dict[str, Kernel] = {
    "_fused_sdp_choice": lambda a: 0,  # attention by plain products
    "cudnn_batch_norm": _cudnn_batch_norm,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    "batch_norm_stats": _batch_norm_stats,
    "batch_norm_gather_stats_with_counts": _batch_norm_gather_stats,
    "batch_norm_elemt": _batch_norm_elemt,
    "batch_norm_backward_reduce": _batch_norm_backward_reduce,
    "batch_norm_backward_elemt": _batch_norm_backward_elemt,
}


def install() -> None:
    """Replace every kernel for CUDA in this process."""
    global _library
    _library = torch.library.Library("aten", "IMPL", "CUDA")
    with silenced():
        for name, operator in _operators():
            try:
                _library.impl(name, _kernel(name, operator, SPECIAL.get(name)), "CUDA", allow_override=True)
            except RuntimeError:  # it has no kernel of its own: what it is made of has
                continue
        _library.impl("copy_", _copy, "CUDA", allow_override=True)
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):  # C++ would choose these
        getattr(torch.backends.cuda, switch)(False)
    _profile_the_cpu_only()


def _profile_the_cpu_only() -> None:
    """The profiler asks CUPTI for a GPU's events, which needs a driver: torch 2.15 ends without one."""
    profiler = torch.autograd.profiler

    def without_gpu(function: Callable[..., None]) -> Callable[..., None]:
        def call(config: Any, activities: set[Any], **options: Any) -> None:
            function(config, activities - {torch.profiler.ProfilerActivity.CUDA}, **options)

        return call

    for name in ("_prepare_profiler", "_enable_profiler"):
        setattr(profiler, name, without_gpu(getattr(profiler, name)))


def _operators() -> Iterable[tuple[str, Any]]:
    """Names and operators that have a CUDA kernel which computes something."""
    for full in torch._C._dispatch_get_all_op_names():
        name = full.removeprefix("aten::")
        has_kernel = name in COMPOSITE or torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA")
        if not full.startswith("aten::") or name in NATIVE or not has_kernel:
            continue
        base, _, overload = name.partition(".")
        operator = getattr(getattr(aten, base), overload or "default", None)
        if operator is None:
            continue
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        if not is_view:
            yield name, operator


@contextmanager
def silenced() -> Any:
    """Torch warns of every kernel that is replaced, from C++ and from Python."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
