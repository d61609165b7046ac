"""Captures the activations of layers during a forward pass, without changing the model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gengap_dist.compat.compiled_model import uncompiled, without_compiled_code
from gengap_dist.compat.float32_precision import exact_float32
from gengap_dist.errors import UsageError
from gengap_dist.probes.layers import Layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain network inside torch.compile, DataParallel, DistributedDataParallel or a DeepSpeed engine.

    Raises:
        UsageError: if each rank holds only a part of the parameters (ZeRO stage 3, FSDP). A forward pass would gather
            them with collectives, but ranks may hold different numbers of probe batches.

    >>> unwrapped(torch.compile(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        wrapped = isinstance(model, DataParallel | DistributedDataParallel) or _is_engine(model)
        inner: Any = model.module if wrapped else uncompiled(model)
        if inner is model:
            break
        model = inner
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):  # importing DTensor takes 1 s
            raise UsageError(
                f"parameter {name} is sharded over ranks (ZeRO stage 3 or FSDP), and probes need unsharded parameters: "
                "measure under ZeRO stage 0 to 2 or DDP, or load a checkpoint into the plain model"
            )
    return model


def _is_engine(model: nn.Module) -> bool:
    return any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__)


@contextmanager
def eval_context(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, autocast, TF32 and compilation, with forked random state; restored on exit."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_compiled_code())
        stack.enter_context(exact_float32())
        stack.enter_context(torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]))
        for device_type in {device.type for device in devices} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def capture_activations(
    layers: Sequence[Layer], callback: Callable[[Layer, Tensor], None]
) -> Iterator[Callable[[], None]]:
    """While open, call `callback(layer, activation)` for every layer of a forward pass.

    Yields a function to call before each forward pass: it resets the counts of module calls.
    """
    layer_by_call = {(id(layer.module), layer.call): layer for layer in layers}
    calls: Counter[int] = Counter()

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        calls[id(module)] += 1
        if layer := layer_by_call.get((id(module), calls[id(module)])):
            callback(layer, output)

    handles = [module.register_forward_hook(hook) for module in {id(m.module): m.module for m in layers}.values()]
    try:
        yield calls.clear
    finally:
        for handle in handles:
            handle.remove()
