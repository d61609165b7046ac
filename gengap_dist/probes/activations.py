"""Captures the activations of layers during a forward pass, without changing the model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from gengap_dist.compat.compiled_model import uncompiled, without_compiled_code
from gengap_dist.compat.float32_precision import exact_float32
from gengap_dist.compat.module_buffers import ModuleBuffers
from gengap_dist.errors import UsageError
from gengap_dist.probes.trace import (
    Layer,
    ModuleStack,
    activation_of,
    function_name,
    function_output,
    uncompiled_modules,
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain network inside torch.compile, DataParallel, DistributedDataParallel or a DeepSpeed engine.

    Raises:
        UsageError: if it is TorchScript, or if each rank holds only a part of the parameters (ZeRO stage 3, FSDP). A
            forward pass would gather them with collectives, but ranks may hold different numbers of probe batches.

    >>> unwrapped(torch.compile(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        wrapped = isinstance(model, DataParallel | DistributedDataParallel) or _is_engine(model)
        inner: Any = model.module if wrapped else uncompiled(model)
        if inner is model:
            break
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"{model.original_name} is a TorchScript module, in which no layer can be seen: measure the nn.Module from "
            "which it was made"
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):  # importing DTensor takes 1 s
            raise UsageError(
                f"parameter {name} is sharded over ranks (ZeRO stage 3 or FSDP), and probes need unsharded parameters: "
                "measure under ZeRO stage 0 to 2 or DDP, or load a checkpoint into the plain model"
            )
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where the network's parameters are; the CPU, if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _is_engine(model: nn.Module) -> bool:
    return any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__)


@contextmanager
def eval_context(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, autocast, TF32 and compilation, with forked random state; restored on exit.

    Buffers that the network itself changes in eval mode are restored, too.
    """
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError(
            f"{type(model).__name__} has parameters whose shapes are not known yet (torch's lazy modules): pass one "
            "batch through it first"
        )
    modes = [(module, module.training) for module in model.modules()]
    buffers = [ModuleBuffers(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
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
            model.train(modes[0][1])  # a module may do more than to set its flag
            for module, training in modes:
                module.training = training
            for each in buffers:
                each.restore()


class Capture:
    """Calls a function with the activations of layers."""

    def __init__(self, layers: Sequence[Layer], callback: Callable[[Layer, Tensor], None]) -> None:
        """For layers of one network."""
        self.callback = callback
        self.by_call = {(id(layer.module), layer.function, layer.call): layer for layer in layers}
        self.calls: Counter[tuple[int, str]] = Counter()
        """Calls in this pass, by id of the module and name of the function."""
        self.is_busy = False
        """Whether other code runs, whose functions are not the network's."""

    def begin_pass(self) -> None:
        """Begin to count calls anew; before each forward pass."""
        self.calls.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, no function counts as the network's."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False

    def completed(self, module: nn.Module, function: str, output: Any) -> None:
        """A module, or a function inside it, has returned `output`."""
        self.calls[id(module), function] += 1
        if layer := self.by_call.get((id(module), function, self.calls[id(module), function])):
            with self.paused():
                self.callback(layer, output)


def leaf_names(model: nn.Module) -> list[str]:
    """The names of the modules without children."""
    return [name for name, module in uncompiled_modules(model).items() if not [*module.children()]]


@contextmanager
def leaves_that_run(model: nn.Module) -> Iterator[set[str]]:
    """While open, the names of the modules without children that have run."""
    ran: set[str] = set()
    modules = uncompiled_modules(model)
    with ExitStack() as stack:
        for name in leaf_names(model):
            stack.callback(modules[name].register_forward_hook(lambda *_, name=name: ran.add(name)).remove)
        yield ran


@contextmanager
def capture_activations(
    model: nn.Module, layers: Sequence[Layer], callback: Callable[[Layer, Tensor], None]
) -> Iterator[Capture]:
    """While open, call `callback(layer, activation)` for every layer of a forward pass of `model`.

    `begin_pass` of what it yields is to be called before each forward pass.
    """
    capture = Capture(layers, callback)

    def hook(module: nn.Module, args: object, output: Any) -> None:
        capture.completed(module, "", activation_of(module, output))

    modules = {id(layer.module): layer.module for layer in layers if not layer.function}
    functions = {layer.function for layer in layers if layer.function}
    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_hook(hook).remove)
        if functions:
            stack.enter_context(_FunctionCapture(model, functions, capture))
        yield capture


class _FunctionCapture(TorchFunctionMode):
    """Reports the results of some torch functions, with the innermost module that called them."""

    def __init__(self, model: nn.Module, functions: set[str], capture: Capture) -> None:
        super().__init__()
        self.functions, self.capture, self.stack, self._exit = functions, capture, ModuleStack(model), ExitStack()

    def __enter__(self) -> Self:
        self._exit.enter_context(self.stack.attached())
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._exit.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.capture.is_busy and (name := function_name(func)) in self.functions:
            self.capture.completed(self.stack.innermost, name, args[0] if name == "setitem" else function_output(out))
        return out
