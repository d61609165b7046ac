"""Finds the layers of a network by tracing one forward pass on one example."""

import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gengap_dist.errors import UsageError, did_you_mean

NON_LINEAR = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "softplus", "hardswish", "hardtanh", "hardsigmoid", "logsigmoid", "glu",
}  # fmt: skip
CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool")
CHANNELS_LAST = ("linear", "layer_norm", "rms_norm")
RESHAPES = {"reshape", "view", "flatten", "unflatten"}
REORDERS = RESHAPES | {"permute", "transpose", "movedim", "moveaxis", "swapaxes"}

Pattern = str | type[nn.Module]


class Layer(NamedTuple):
    """One call of one module in a forward pass."""

    name: str
    """As reported, see `reported_names`; later calls of the same module have the suffix `#2`, `#3`, ..."""
    module: nn.Module
    call: int
    """1 for the module's first call in a forward pass."""
    output: Any
    """Shape of the output for one example, or the name of its type if it is not a floating-point tensor."""
    dtype: torch.dtype
    channels_last: bool
    """True if units are the last dimension, [N, ..., D]; False if they are the second, [N, D, ...]."""
    kind: str
    """`non-linear`, `residual` (a sum of two activations), `linear` (a unit whose `act` is nn.Identity), or empty."""


def reported_names(model: nn.Module) -> dict[str, str]:
    """The name of every module in results: its module name, except that `conv1.act` is reported as `conv1`.

    The models of this package consist of nn.Sequential units whose non-linearity is named `act`. Its output is the
    layer's output, before any pooling.

    >>> from collections import OrderedDict
    >>> unit = nn.Sequential(OrderedDict(affine=nn.Linear(1, 1), act=nn.ReLU()))
    >>> reported_names(nn.Sequential(OrderedDict(fc1=unit)))
    {'fc1': 'fc1', 'fc1.affine': 'fc1.affine', 'fc1.act': 'fc1'}
    """
    modules = uncompiled_modules(model)
    names = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        is_unit = last == "act" and type(modules.get(parent)) is nn.Sequential
        names[name] = parent if is_unit else name
    return names


def uncompiled_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules inside a network by name, without the wrappers of torch.compile.

    >>> uncompiled_modules(nn.Sequential(torch.compile(nn.ReLU())))
    {'0': ReLU()}
    """
    # the wrapped module follows its torch.compile wrapper and replaces it in the dict
    return {name.replace("._orig_mod", ""): module for name, module in model.named_modules() if name}


def trace_calls(model: nn.Module, example: Tensor) -> tuple[list[Layer], list[str]]:
    """Every call of every module in a forward pass of `example`, in order of completion.

    Returns:
        The calls, and the names of non-linear functions whose result is not the output of a module.
    """
    watch = _TensorTracker()
    calls: list[Layer] = []
    counts: Counter[int] = Counter()
    handles = []
    modules = uncompiled_modules(model)
    for name, given in reported_names(model).items():
        handles.append(modules[name].register_forward_pre_hook(watch.enter_module))
        handles.append(modules[name].register_forward_hook(_make_forward_hook(name, given, watch, calls, counts)))
    try:
        with watch:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls, watch.functions_outside_modules()


def _make_forward_hook(
    name: str, reported: str, tracker: "_TensorTracker", calls: list[Layer], counts: Counter[int]
) -> Callable[..., None]:
    def ended(module: nn.Module, args: object, output: object) -> None:
        counts[id(module)] += 1
        call = counts[id(module)]
        kind = tracker.exit_module(module, output)
        if reported != name and isinstance(module, nn.Identity):
            kind = "linear"  # so a linear network is measured at the same layers as the non-linear one
        shown = f"{reported}#{call}" if call > 1 else reported
        if isinstance(output, Tensor) and output.is_floating_point():
            last = tracker.channels_last(output)
            calls.append(Layer(shown, module, call, output.shape, output.dtype, last, kind))
        else:
            calls.append(Layer(shown, module, call, type(output).__name__, torch.float32, False, ""))

    return ended


class _TensorTracker(TorchFunctionMode):
    """Tracks tensors through a forward pass: which operation made them, and which dimension holds the units."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []  # an id is unique only while the tensor is alive
        self.made_by: dict[int, str] = {}  # tensors that are not yet the output of a module
        self.units_are_last: dict[int, bool] = {}  # whether units are the last dimension, if known
        self.entered: list[int] = []  # per running module: number of non-linear functions called before it
        self.non_linear: list[tuple[int, str]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.record_operation(getattr(func, "__name__", "").strip("_"), args, out)
        return out

    def record_operation(self, name: str, args: Sequence[Any], out: Tensor) -> None:
        self.alive.append(out)
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        if name in NON_LINEAR:
            self.made_by[id(out)] = "non-linear"
            self.non_linear.append((id(out), name))
        elif name in ("add", "iadd") and out.ndim > 1 and [_activation(arg) for arg in inputs] == [out.shape] * 2:
            self.made_by[id(out)] = "residual"
        if any(word in name for word in CHANNELS_LAST):
            self.units_are_last[id(out)] = True
        elif any(word in name for word in CHANNELS_FIRST):
            self.units_are_last[id(out)] = False
        elif name in REORDERS:
            if name in RESHAPES and inputs:
                self.record_reshape(name, inputs[0], out)
        else:
            known = [
                self.units_are_last[id(arg)]
                for arg in inputs
                if id(arg) in self.units_are_last and arg.shape == out.shape
            ]
            if known:
                self.units_are_last[id(out)] = known[0]

    def record_reshape(self, name: str, tensor: Tensor, out: Tensor) -> None:
        """Keep the kind of the activation, and its unit dimension unless that was split or merged with another."""
        if self.made_by.get(id(tensor)) == "residual" and name in ("reshape", "view"):
            self.made_by[id(out)] = "residual"
        last = self.units_are_last.get(id(tensor))
        if last is not None and (out.shape[-1:] == tensor.shape[-1:] if last else out.shape[:2] == tensor.shape[:2]):
            self.units_are_last[id(out)] = last

    def channels_last(self, out: Tensor) -> bool:
        """As tracked; if not known, [N, T, D] or [N, D, H, W] is assumed."""
        return self.units_are_last.get(id(out), out.ndim <= 3)

    def enter_module(self, module: nn.Module, args: object) -> None:
        self.entered.append(len(self.non_linear))

    def exit_module(self, module: nn.Module, output: object) -> str:
        """The kind of a module's output; only the innermost module that outputs a tensor gets it."""
        before = self.entered.pop()
        kind = self.made_by.pop(id(output), "")
        if not kind and not [*module.children(), *module.parameters()] and len(self.non_linear) > before:
            kind = "non-linear"  # a composed function, such as x * sigmoid(x)
            for tensor, _ in self.non_linear[before:]:
                self.made_by.pop(tensor, None)
        return kind

    def functions_outside_modules(self) -> list[str]:
        return [name for tensor, name in self.non_linear if self.made_by.get(tensor) == "non-linear"]


def _activation(tensor: Tensor) -> torch.Size | None:
    """The shape of an activation; None for a parameter, such as a position embedding."""
    return None if isinstance(tensor, nn.Parameter) else tensor.shape


def select_layers(model: nn.Module, example: Tensor, patterns: Sequence[Pattern]) -> list[Layer]:
    """The layers that match `patterns`, in the order in which they run.

    Args:
        model: any network, uncompiled and unwrapped.
        example: one input, [1, ...].
        patterns: `auto` (the output of every non-linearity and every unit's `act`, and of every residual block after
            its addition), names as reported, module names, globs, or classes of modules.

    Raises:
        UsageError: if a pattern matches nothing, or the output of a layer is not a tensor of 2 or more dimensions.
    """
    calls, unclaimed = trace_calls(model, example)
    chosen: set[int] = set()
    for pattern in patterns:
        if pattern == "auto":
            found = [call for call in calls if call.kind and not isinstance(call.output, str)]
            if unclaimed:
                warnings.warn(
                    f"{type(model).__name__} calls {', '.join(sorted(set(unclaimed)))} as functions {len(unclaimed)} "
                    "time(s) inside larger modules: their outputs are not measured; use modules such as nn.ReLU",
                    stacklevel=4,
                )
        else:
            wanted = _modules(model, pattern)
            found = [call for call in calls if id(call.module) in wanted]
            if isinstance(pattern, str) and "#" in pattern:
                found = [call for call in calls if _matches(call.name, pattern)]
            if wanted and not found:
                raise UsageError(
                    f"probe.layers ({pattern}) names a layer that does not run in a forward pass: leave it out"
                )
            for call in found:
                if isinstance(call.output, str) or len(call.output) < 2:
                    raise UsageError(
                        f"layer {call.name} outputs "
                        f"{call.output if isinstance(call.output, str) else list(call.output)}, needs one tensor of 2 "
                        "or more dimensions: leave it out of probe.layers, or name a layer inside it"
                    )
        if not found:
            shown = pattern if isinstance(pattern, str) else pattern.__name__
            names = list(dict.fromkeys(reported_names(model).values()))
            raise UsageError(
                f"probe.layers ({shown}) matches no layer of {type(model).__name__}{did_you_mean(shown, names)}: "
                f"choose among {_list_names(shown, names)}"
            )
        chosen |= {id(call) for call in found}
    layers = [call for call in calls if id(call) in chosen]
    times = Counter(layer.name for layer in layers)
    full = {id(module): name for name, module in uncompiled_modules(model).items()}
    return [
        layer._replace(name=full[id(layer.module)] + layer.name[layer.name.find("#") :] * ("#" in layer.name))
        if times[layer.name] > 1  # a unit and its own non-linearity
        else layer
        for layer in layers
    ]


def _modules(model: nn.Module, pattern: Pattern) -> set[int]:
    modules, names = uncompiled_modules(model), reported_names(model)
    if not isinstance(pattern, str):
        return {id(modules[name]) for name in names if isinstance(modules[name], pattern)}
    units = {given for name, given in names.items() if given != name}
    found = {name for name, given in names.items() if _matches(given, pattern) and name not in units}
    return {id(modules[name]) for name in found or names if found or _matches(name, pattern)}


def _list_names(wanted: str, names: list[str], max_names: int = 20) -> str:
    """All names, or the closest matches if there are many."""
    import difflib

    if len(names) <= max_names:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, n=max_names, cutoff=0.0)
    return f"{', '.join(near)} and {len(names) - max_names} more"


def _matches(name: str, pattern: str) -> bool:
    """Match like a shell glob: `*` does not cross a dot.

    >>> _matches("layer1.0", "layer*.0"), _matches("layer1.0.conv", "layer*")
    (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
