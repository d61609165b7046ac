"""Layers' activations, batch by batch, as they come out of a forward pass; the model is left exactly as found."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gengap_dist.compat.float32_precision import exact_float32
from gengap_dist.errors import UsageError
from gengap_dist.probes.layers import Layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The network underneath torch.compile, DataParallel, DistributedDataParallel and a DeepSpeed engine.

    Raises:
        UsageError: if each rank holds only a part of the parameters (ZeRO stage 3, FSDP): a pass would have to gather
            them, on all ranks equally often, and ranks may hold unequal numbers of probe batches.

    >>> unwrapped(torch.compile(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        wrapped = isinstance(model, DataParallel | DistributedDataParallel) or _is_engine(model)
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)  # what torch.compile wraps
        if not isinstance(inner, nn.Module):
            break
        model = inner
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):  # a DTensor, whose import takes a second
            raise UsageError(
                f"parameter {name} is sharded over ranks (ZeRO stage 3 or FSDP), and probes need whole ones: "
                "measure under ZeRO stage 0 to 2 or DDP, or load a checkpoint into the plain model"
            )
    return model


def _is_engine(model: nn.Module) -> bool:
    return any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__)


@contextmanager
def eval_context(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, no TF32, uncompiled, forked random numbers; all is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and the import would take two seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(exact_float32())
        stack.enter_context(torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]))
        for kind in {device.type for device in devices} | {"cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def capture_activations(layers: Sequence[Layer], take: Callable[[Layer, Tensor], None]) -> Iterator[Callable[[], None]]:
    """While open, `take(layer, activation)` is called for every layer of a forward pass.

    Yields a function to call before each forward pass: it starts counting the calls of a module anew.
    """
    wanted = {(id(layer.module), layer.call): layer for layer in layers}
    calls: Counter[int] = Counter()

    def fired(module: nn.Module, args: object, output: Tensor) -> None:
        calls[id(module)] += 1
        if layer := wanted.get((id(module), calls[id(module)])):
            take(layer, output)

    handles = [module.register_forward_hook(fired) for module in {id(m.module): m.module for m in layers}.values()]
    try:
        yield calls.clear
    finally:
        for handle in handles:
            handle.remove()
