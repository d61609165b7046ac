"""Which layers a network has, found by running it once on one example and watching what its modules put out."""

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
    """As reported, see `reported_names`; `#2`, `#3` follow for later calls of the same module."""
    module: nn.Module
    call: int
    """1 for the module's first call in a forward pass."""
    output: Any
    """What it put out for one example: a shape, or the type where that was no tensor of floating point."""
    dtype: torch.dtype
    channels_last: bool
    """Whether units are the last dimension, [N, ..., D], rather than the second, [N, D, ...]."""
    kind: str
    """`non-linear`, `residual` (a sum of two activations), `linear` (where a unit's `act` is nn.Identity), or empty."""


def reported_names(model: nn.Module) -> dict[str, str]:
    """What every module is called in results: its name, but `conv1` for `conv1.act`.

    This package's models are made of nn.Sequential units whose non-linearity is named `act`: that is the layer's
    output, whatever pooling follows.

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
    """All modules inside a network by name, as if torch.compile had wrapped none of them.

    >>> uncompiled(nn.Sequential(torch.compile(nn.ReLU())))
    {'0': ReLU()}
    """
    # what torch.compile wrapped comes right after the wrapper, and takes its place
    return {name.replace("._orig_mod", ""): module for name, module in model.named_modules() if name}


def trace_calls(model: nn.Module, example: Tensor) -> tuple[list[Layer], list[str]]:
    """Every call of every module in a forward pass of `example`, in the order in which they end.

    Returns:
        The calls, and the non-linear functions that were called where no module puts out their result.
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
            kind = "linear"  # a network without non-linearities is measured where its twin is
        shown = f"{reported}#{call}" if call > 1 else reported
        if isinstance(output, Tensor) and output.is_floating_point():
            last = tracker.channels_last(output)
            calls.append(Layer(shown, module, call, output.shape, output.dtype, last, kind))
        else:
            calls.append(Layer(shown, module, call, type(output).__name__, torch.float32, False, ""))

    return ended


class _TensorTracker(TorchFunctionMode):
    """Follows tensors through a forward pass: what made them, and which of their dimensions holds the units."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []  # an id is a tensor's own only while the tensor lives
        self.made_by: dict[int, str] = {}  # tensors that no module has put out yet
        self.units_are_last: dict[int, bool] = {}  # whether units are the last dimension, where that is known
        self.entered: list[int] = []  # for each module now running, how many non-linear functions ran before it
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
        """The same activation, and the same dimension of units unless that was split or merged with another."""
        if self.made_by.get(id(tensor)) == "residual" and name in ("reshape", "view"):
            self.made_by[id(out)] = "residual"
        last = self.units_are_last.get(id(tensor))
        if last is not None and (out.shape[-1:] == tensor.shape[-1:] if last else out.shape[:2] == tensor.shape[:2]):
            self.units_are_last[id(out)] = last

    def channels_last(self, out: Tensor) -> bool:
        """As followed; where that is not known, [N, T, D] and [N, D, H, W] are assumed."""
        return self.units_are_last.get(id(out), out.ndim <= 3)

    def enter_module(self, module: nn.Module, args: object) -> None:
        self.entered.append(len(self.non_linear))

    def exit_module(self, module: nn.Module, output: object) -> str:
        """The kind of what a module puts out; only the innermost module that puts out a tensor has it."""
        before = self.entered.pop()
        kind = self.made_by.pop(id(output), "")
        if not kind and not [*module.children(), *module.parameters()] and len(self.non_linear) > before:
            kind = "non-linear"  # a formula of its own, such as x * sigmoid(x)
            for tensor, _ in self.non_linear[before:]:
                self.made_by.pop(tensor, None)
        return kind

    def functions_outside_modules(self) -> list[str]:
        return [name for tensor, name in self.non_linear if self.made_by.get(tensor) == "non-linear"]


def _activation(tensor: Tensor) -> torch.Size | None:
    """The shape of an activation; a parameter, such as a position embedding, is none."""
    return None if isinstance(tensor, nn.Parameter) else tensor.shape


def select_layers(model: nn.Module, example: Tensor, patterns: Sequence[Pattern]) -> list[Layer]:
    """The layers asked for, in the order in which they run.

    Args:
        model: any network, uncompiled and unwrapped.
        example: one input, [1, ...].
        patterns: `auto` (the output of every non-linearity and every unit's `act`, and of every residual block after
            its addition), names as reported, module names, globs, or classes of modules.

    Raises:
        UsageError: if a pattern matches nothing, or a layer puts out no tensor.
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
                        f"layer {call.name} puts out "
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
    """The names, or of many the nearest."""
    import difflib

    if len(names) <= max_names:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, n=max_names, cutoff=0.0)
    return f"{', '.join(near)} and {len(names) - max_names} more"


def _matches(name: str, pattern: str) -> bool:
    """Like a shell's globs: `*` stays within one part of a dotted name.

    >>> _matches("layer1.0", "layer*.0"), _matches("layer1.0.conv", "layer*")
    (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
