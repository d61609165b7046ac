"""Follows a forward pass: which modules run, which non-linear functions are called, and what dimension holds the units.

A non-linearity is an activation function (`ACTIVATIONS`), or an element-wise function of one tensor that people write
by hand, such as `x * (x > 0)` or `0.5 * x * (1 + erf(x / 2**0.5))`. If a module returns its result, it belongs to the
module; otherwise it is a layer of its own, named after the innermost module that called it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "softplus", "hardswish", "hardtanh", "hardsigmoid", "logsigmoid", "log_sigmoid", "glu", "softsign", "tanhshrink",
    "hardshrink", "softshrink", "threshold", "softmax", "expit",
}  # fmt: skip
"""Names of torch functions; each result is a layer."""
CURVED = {
    "abs", "absolute", "arctan", "asinh", "atan", "ceil", "clamp", "clamp_max", "clamp_min", "clip", "cos", "cosh",
    "erf", "erfc", "exp", "exp2", "expm1", "floor", "fmax", "fmin", "frac", "ge", "gt", "heaviside", "le",
    "logaddexp", "lt", "max", "maximum", "min", "minimum", "ndtr", "pow", "round", "rpow", "sign", "sin", "sinc",
    "sinh", "square", "tan", "trunc",
}  # fmt: skip
"""Element-wise functions that are not linear: an activation function may consist of several."""
STRAIGHT = {
    "add", "addcmul", "bfloat16", "clone", "contiguous", "detach", "div", "divide", "double", "dropout", "float",
    "half", "iadd", "idiv", "imul", "isub", "itruediv", "lerp", "log", "log1p", "masked_fill", "mul", "multiply",
    "neg", "negative", "rdiv", "reciprocal", "rsqrt", "rsub", "sqrt", "sub", "subtract", "to", "true_divide",
    "truediv", "type", "type_as", "where",
}  # fmt: skip
"""Other element-wise functions: their result is no activation by itself, but may be the end of one."""
IN_NORMS = {"abs", "exp", "mul", "pow", "square"}
"""Parts of a norm or a softmax by hand, if a sum over them follows."""
PRODUCTS = {"addcmul", "imul", "lerp", "masked_fill", "mul", "multiply", "where"}
ELEMENTWISE = CURVED | STRAIGHT | {"get", "setitem"}
"""`get` is `x.data`, and `setitem` is `x[mask] = value`."""
MAXIMA = {"max", "maximum", "min", "minimum", "fmax", "fmin"}
SUMS = {"sum", "mean", "norm", "vector_norm", "var", "std", "logsumexp"}
MATRIX_PRODUCTS = {"matmul", "rmatmul", "bmm", "baddbmm", "einsum", "mm"}
CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool")
CHANNELS_LAST = ("linear", "layer_norm", "rms_norm")
RESHAPES = {"reshape", "view", "flatten", "unflatten"}
REORDERS = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"}
STACKS = RESHAPES | {"stack"}
KEEP_UNITS = {
    "cat", "chunk", "concat", "concatenate", "getitem", "glu", "hstack", "interpolate", "narrow", "pad", "split",
    "tensor_split", "index_select", "repeat_interleave", "roll", "flip", "upsample",
}  # fmt: skip
"""Functions that change the length of dimensions, and not their order."""


RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Layer(NamedTuple):
    """One call of one module, or of one function inside a module, in a forward pass."""

    name: str
    """As reported, see `reported_names`; `<module>.<function>` for a function. Later calls of the same module or
    function have the suffix `#2`, `#3`, ..."""
    module: nn.Module
    """Of a function: the innermost module that was running."""
    call: int
    """1 for the first call in a forward pass, counted over all calls of the module, or of `function` inside it."""
    output: Any
    """Shape of the output for two samples, or the name of its type if it is not a floating-point tensor."""
    dtype: torch.dtype
    channels_last: bool
    """True if units are the last dimension, [N, ..., D]; False if they are the second, [N, D, ...]."""
    kind: str
    """`non-linear`, `residual` (a sum of two activations), `linear` (a unit whose `act` is nn.Identity, or a module
    with `is_measured`), `constant` (a non-linearity of a bias or a position, the same for all samples), or empty."""
    function: str = ""
    """Name of the torch function that puts out the activation, or empty for a module."""
    num_calls: int = 1
    """Calls of the module, or of the function inside it, in the traced pass."""
    is_asked: bool = False
    """Whether the user named the layer; `auto` alone did not."""


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
    """All modules inside a network by name, without the wrappers of torch.compile, and without TorchScript.

    >>> uncompiled_modules(nn.Sequential(torch.compile(nn.ReLU())))
    {'0': ReLU()}
    """
    # the wrapped module follows its torch.compile wrapper and replaces it in the dict
    return {
        name.replace("._orig_mod", ""): module
        for name, module in model.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)
    }


def scripted_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules in TorchScript, which call no hooks."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def activation_of(module: nn.Module, output: Any) -> Any:
    """The activation in a module's output: of a recurrent network its outputs at all times, samples first.

    Of a module with `is_measured` it is the first of several outputs.

    >>> activation_of(nn.LSTM(3, 5), nn.LSTM(3, 5)(torch.zeros(7, 2, 3))).shape
    torch.Size([2, 7, 5])
    """
    if not isinstance(module, RECURRENT):
        return output[0] if isinstance(output, tuple) and output and is_marked(module) else output
    steps = output[0] if isinstance(output, tuple) else output  # a cell of one step may have no other state
    if isinstance(module, nn.RNNCellBase):
        return steps
    return steps.transpose(0, 1) if isinstance(steps, Tensor) and steps.ndim == 3 and not module.batch_first else steps


def is_marked(module: nn.Module) -> bool:
    """Whether who built the network wants the module's output to be measured, by its attribute `is_measured`."""
    return getattr(module, "is_measured", False) is True


class ModuleStack:
    """The modules that are running, innermost last, while it is attached."""

    def __init__(self, model: nn.Module) -> None:
        """For the modules of `model`."""
        self.model = model
        self.running: list[nn.Module] = []

    @property
    def innermost(self) -> nn.Module:
        """The module that is computing; the network itself outside of all others."""
        return self.running[-1] if self.running else self.model

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, hooks follow the modules."""
        handles: list[Any] = []
        for module in dict.fromkeys(uncompiled_modules(self.model).values()):
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            self.running.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: object) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        while self.running and self.running.pop() is not module:
            pass


def function_name(function: Callable[..., Any]) -> str:
    """The name of a torch function, the same for its method and its in-place form.

    >>> function_name(torch.relu_), function_name(torch.Tensor.__iadd__)
    ('relu', 'iadd')
    """
    return getattr(function, "__name__", "").strip("_").removeprefix("special_")


def function_output(output: Any) -> Any:
    """The tensor that a function returns; of torch.max over a dimension the values."""
    return output[0] if isinstance(output, tuple) and output and hasattr(output, "values") else output


def trace_calls(model: nn.Module, example: Tensor) -> list[Layer]:
    """Every call of every module in a forward pass of `example`, and of every non-linear function that belongs to none.

    They are in the order in which they completed.
    """
    tracker = _TensorTracker(model, example)
    calls: list[_Call] = []
    counts: Counter[int] = Counter()
    handles = []
    modules = uncompiled_modules(model)
    names = reported_names(model)
    for name, given in names.items():
        handles.append(modules[name].register_forward_pre_hook(tracker.enter_module))
        handles.append(modules[name].register_forward_hook(_make_forward_hook(name, given, tracker, calls, counts)))
    try:
        with tracker.stack.attached(), tracker:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    of_modules: list[tuple[int, Layer]] = []
    for call in calls:
        is_attention = call.claimed is not None and call.claimed.is_attention
        kind = "" if is_attention else call.layer.kind
        of_modules.append((call.time, call.layer._replace(kind=kind, num_calls=counts[id(call.layer.module)])))
    of_functions = _function_layers(tracker, {id(modules[name]): given for name, given in names.items()}, names)
    return [layer for _, layer in sorted([*of_modules, *of_functions], key=lambda pair: pair[0])]


@dataclass
class _Candidate:
    """A result that is the output of an activation function, as far as is known."""

    tensor: Tensor
    label: str
    """Name of the last function that is not linear."""
    module: nn.Module
    function: str
    call: int
    time: int
    is_complete: bool
    """Whether it is an activation function; otherwise what follows may belong to it."""
    is_dropped: bool = False
    """Whether it is part of another one, or belongs to a module."""
    is_attention: bool = False
    """Whether it is a softmax that weights the rows of another tensor."""


@dataclass
class _Call:
    """A call of a module, before all calls of the pass are known."""

    layer: Layer
    time: int
    claimed: _Candidate | None


def _make_forward_hook(
    name: str, reported: str, tracker: "_TensorTracker", calls: list[_Call], counts: Counter[int]
) -> Callable[..., None]:
    def ended(module: nn.Module, args: object, output: object) -> None:
        counts[id(module)] += 1
        call = counts[id(module)]
        output = activation_of(module, output)
        kind, claimed = tracker.exit_module(module, output)
        if (reported != name and isinstance(module, nn.Identity)) or is_marked(module):
            kind = "linear"  # so a linear network is measured at the same layers as the non-linear one
        if isinstance(module, RECURRENT):
            kind = "non-linear"
        shown = f"{reported}#{call}" if call > 1 else reported
        time = tracker.next_time()
        if isinstance(output, Tensor) and output.is_floating_point():
            last = True if isinstance(module, RECURRENT) else tracker.channels_last(output)
            layer = Layer(shown, module, call, output.shape, output.dtype, last, kind)
        else:
            kind = kind if isinstance(module, RECURRENT) else ""
            claimed = None
            layer = Layer(shown, module, call, type(output).__name__, torch.float32, False, kind)
        calls.append(_Call(layer, time, claimed))

    return ended


def _function_layers(
    tracker: "_TensorTracker", given: dict[int, str], names: dict[str, str]
) -> list[tuple[int, Layer]]:
    """The candidates that no module returned, each with its time."""
    taken = {*names, *names.values()}
    times_named: Counter[str] = Counter()
    out = []
    for found in tracker.candidates:
        tensor = found.tensor
        if found.is_dropped or found.is_attention or not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and tensor.shape[-1 if tracker.channels_last(tensor) else 1] == 1:  # as the norm of a row
            continue
        owner = given.get(id(found.module), "")
        name = f"{owner}.{found.label}" if owner else found.label
        if name in taken:  # a module of this name
            name += "()"
        times_named[name] += 1
        shown = f"{name}#{times_named[name]}" if times_named[name] > 1 else name
        layer = Layer(
            shown, found.module, found.call, tensor.shape, tensor.dtype, tracker.channels_last(tensor), "non-linear",
            found.function, tracker.counts[id(found.module), found.function],
        )  # fmt: skip
        out.append((found.time, layer))
    return out


@dataclass
class _Origin:
    """What is known of a tensor that comes from the example."""

    source: int
    """Id of the tensor of which it is an element-wise function; its own if it is none."""
    is_activation: bool = True
    """Whether the values are computed from real numbers; not so token numbers and masks."""
    is_curved: bool = False
    """Whether that function is not linear."""
    inside: list[_Candidate] = field(default_factory=list)
    """Candidates of which the function consists."""


class _TensorTracker(TorchFunctionMode):
    """Tracks tensors through a forward pass: which operation made them, and which dimension holds the units."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.stack = ModuleStack(model)
        self.alive: list[Tensor] = [example]  # an id is unique only while the tensor is alive
        self.residual: set[int] = set()  # sums of two activations that are not yet the output of a module
        self.units_are_last: dict[int, bool] = {}  # whether units are the last dimension, if known
        self.made_by: dict[int, str] = {}  # the name of the function
        self.entered: list[int] = []  # per running module: number of candidates before it
        self.candidates: list[_Candidate] = []
        self.origins: dict[int, _Origin] = {id(example): _Origin(id(example), example.is_floating_point())}
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        """Ids of tensors that do not depend on the example."""
        self.constant_activations: set[int] = set()
        self.softmaxes: dict[int, list[_Candidate]] = {}  # of which a tensor is computed, without a matrix product
        self.counts: Counter[tuple[int, str]] = Counter()
        self.time = 0

    def next_time(self) -> int:
        """A number for every completed call."""
        self.time += 1
        return self.time

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        raw, name = getattr(func, "__name__", ""), function_name(func)
        given = dict(kwargs or {})
        target = given.pop("out", None)
        self.counts[id(self.stack.innermost), name] += 1
        result = args[0] if name == "setitem" else function_output(out)
        tensors = _tensors([args, given])
        if isinstance(result, Tensor):
            in_place = name == "setitem" or raw.startswith("__i") or (raw.endswith("_") and not raw.endswith("__"))
            changes = in_place or name in ACTIVATIONS or result is target
            if changes or not any(result is tensor for tensor in tensors):  # not dropout in eval mode, for example
                self.record_origin(name, tensors, result, is_sum=_is_sum(name, args, given))
                self.record_units(name, args, given, tensors, result)
                self.made_by[id(result)] = name
        elif isinstance(out, tuple | list):  # chunk, split, unbind
            for part in _tensors(out):
                if not any(part is tensor for tensor in tensors):
                    self.record_origin(name, tensors, part, is_sum=False)
                    self.record_units(name, args, given, tensors, part)
        return out

    def record_origin(self, name: str, tensors: list[Tensor], out: Tensor, *, is_sum: bool) -> None:
        """Record of which tensor `out` is an element-wise function, and whether it is a candidate."""
        self.alive.append(out)
        for tensor in tensors:
            known = id(tensor) in self.origins or id(tensor) in self.constants
            if not known and tensor.is_floating_point() and tensor.numel() > 1 and not isinstance(tensor, nn.Parameter):
                self.alive.append(tensor)  # from code that calls no torch function, such as TorchScript
                self.origins[id(tensor)] = _Origin(id(tensor))
        operands = [(tensor, self.origins[id(tensor)]) for tensor in tensors if id(tensor) in self.origins]
        if not operands or name.endswith("_like") or name.startswith("new_"):
            self.constants.add(id(out))
            if name in ACTIVATIONS:
                self.constant_activations.add(id(out))
            return
        self.constants.discard(id(out))
        if name == "get" and not _is_same_view(operands[0][0], out):
            name = "transpose"  # x.T and its like, not x.data
        of_weights = name in MATRIX_PRODUCTS or any(word in name for word in ("linear", "conv", "embedding"))
        weights = any(
            isinstance(tensor, nn.Parameter) or (of_weights and tensor.is_floating_point() and tensor.ndim > 1)
            for tensor in tensors
            if id(tensor) not in self.origins
        )
        if not weights and not any(origin.is_activation for _, origin in operands):
            self.origins[id(out)] = _Origin(id(out), is_activation=False)
            return
        softmaxes = [found for tensor, _ in operands for found in self.softmaxes.get(id(tensor), [])]
        if name in MATRIX_PRODUCTS:
            for found in softmaxes:
                found.is_attention = True
        elif softmaxes:
            self.softmaxes[id(out)] = softmaxes
        inside = list({id(found): found for _, origin in operands for found in origin.inside}.values())
        sources = {origin.source for _, origin in operands}
        of_one = len(sources) == 1 and all(tensor.shape == out.shape for tensor, _ in operands)
        made_from = self.made_by.get(id(operands[0][0]), "")
        if name in ACTIVATIONS:
            self._absorb(found for found in inside if not found.is_complete)
            found = self._new_candidate(name, name, out, is_complete=True)
            self.origins[id(out)] = _Origin(sources.pop() if of_one else id(out), True, True, [found])
            if name == "softmax":
                self.softmaxes[id(out)] = [found]
        elif name in ELEMENTWISE and not (name in MAXIMA and out.shape != operands[0][0].shape):
            self._record_elementwise(name, operands, inside, out, of_one=of_one)
        else:
            self.origins[id(out)] = _Origin(id(out), out.is_floating_point())
            if is_sum:  # of a norm, or of a softmax by hand
                self._absorb(found for found in inside if found.label in IN_NORMS and not found.is_complete)
            if name in ("max", "amax") and made_from in STACKS:  # maxout
                self.origins[id(out)].inside = [self._new_candidate(name, name, out, is_complete=True)]
        if id(out) in self.softmaxes:
            self.softmaxes[id(out)] = [*self.softmaxes[id(out)], *self.origins[id(out)].inside]

    def _record_elementwise(
        self, name: str, operands: list[tuple[Tensor, _Origin]], inside: list[_Candidate], out: Tensor, *, of_one: bool
    ) -> None:
        several, bends = len(operands) > 1, name in CURVED
        parts = [found for found in inside if not found.is_complete]
        if not of_one:  # a gate, a residual, a mask
            self.origins[id(out)] = _Origin(id(out))
            if name in MAXIMA and several:
                self.origins[id(out)].inside = [self._new_candidate(name, name, out, is_complete=True)]
            return
        curved = bends or any(origin.is_curved for _, origin in operands) or (several and name in PRODUCTS)
        self.origins[id(out)] = _Origin(operands[0][1].source, True, curved, inside)
        if not curved or not (bends or parts or several):
            return  # linear, or an activation function times a number
        label = name if bends or not inside else inside[-1].label
        self._absorb(inside if several else parts)
        self.origins[id(out)].inside = [self._new_candidate(label, name, out, is_complete=False)]

    def _new_candidate(self, label: str, name: str, out: Tensor, *, is_complete: bool) -> _Candidate:
        module = self.stack.innermost
        found = _Candidate(out, label, module, name, self.counts[id(module), name], self.next_time(), is_complete)
        self.candidates.append(found)
        return found

    @staticmethod
    def _absorb(parts: Iterator[_Candidate] | Sequence[_Candidate]) -> None:
        for found in parts:
            found.is_dropped = True

    def record_units(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor], out: Tensor
    ) -> None:
        """Record which dimension of `out` holds the units, and whether it is the sum of two activations."""
        if (
            name in ("add", "iadd")
            and out.ndim > 1
            and [tensor.shape for tensor in tensors if id(tensor) in self.origins] == [out.shape] * 2
        ):
            self.residual.add(id(out))
        if any(word in name for word in CHANNELS_LAST):
            self.units_are_last[id(out)] = True
        elif any(word in name for word in CHANNELS_FIRST):
            self.units_are_last[id(out)] = False
        elif name in RESHAPES:
            if tensors:
                self.record_reshape(name, tensors[0], out)
        elif name in REORDERS:
            self.record_reorder(name, args, kwargs, out)
        else:
            same_shape = [t for t in tensors if t.shape == out.shape]
            same_ndim = [t for t in tensors if t.ndim == out.ndim and name in KEEP_UNITS]
            known = [self.units_are_last[id(t)] for t in same_shape + same_ndim if id(t) in self.units_are_last]
            if known:
                self.units_are_last[id(out)] = known[0]

    def record_reorder(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        """Follow the unit dimension through a permutation of dimensions, if its arguments are plain."""
        tensor, rest = args[0], [*args[1:], *kwargs.values()]
        last, ndim = self.units_are_last.get(id(tensor)), out.ndim
        if last is None or ndim < 3:
            return
        try:
            dims = [int(dim) for dim in (rest[0] if isinstance(rest[0], tuple | list) else rest)]
        except (TypeError, IndexError, ValueError):
            return
        order = [*range(ndim)]
        if name == "permute":
            order = [dim % ndim for dim in dims]
        elif name in ("transpose", "swapaxes", "swapdims") and len(dims) == 2:
            a, b = dims[0] % ndim, dims[1] % ndim
            order[a], order[b] = order[b], order[a]
        elif name in ("movedim", "moveaxis") and len(dims) == 2:
            order.insert(dims[1] % ndim, order.pop(dims[0] % ndim))
        else:
            return
        at = order.index(ndim - 1 if last else 1)
        if at in (1, ndim - 1):
            self.units_are_last[id(out)] = at == ndim - 1

    def record_reshape(self, name: str, tensor: Tensor, out: Tensor) -> None:
        """Keep the kind of the activation, and its unit dimension unless that was split or merged with another."""
        if id(tensor) in self.residual and name in ("reshape", "view"):
            self.residual.add(id(out))
        last = self.units_are_last.get(id(tensor))
        if last is not None and (out.shape[-1:] == tensor.shape[-1:] if last else out.shape[:2] == tensor.shape[:2]):
            self.units_are_last[id(out)] = last

    def channels_last(self, out: Tensor) -> bool:
        """As tracked; if not known, [N, T, D] or [N, D, H, W] is assumed."""
        return self.units_are_last.get(id(out), out.ndim <= 3)

    def enter_module(self, module: nn.Module, args: object) -> None:
        """Note that the module begins."""
        self.entered.append(len(self.candidates))

    def exit_module(self, module: nn.Module, output: object) -> tuple[str, _Candidate | None]:
        """The kind of a module's output, and its candidate; only the innermost module that returns a tensor gets it."""
        before = self.entered.pop()
        live = [found for found in self.candidates if not found.is_dropped]
        claimed = next((found for found in reversed(live) if found.tensor is output), None)
        kind = "non-linear" if claimed else "residual" if id(output) in self.residual else ""
        self.residual.discard(id(output))
        if isinstance(module, RECURRENT):
            self._absorb(self.candidates[before:])
        if not kind and not [*module.children(), *module.parameters()]:
            composed = [found for found in self.candidates[before:] if not (found.is_dropped or found.is_attention)]
            if composed:  # a function of several tensors
                self._absorb(composed)
                kind = "non-linear"
        if claimed:
            claimed.is_dropped = True
        if not kind and id(output) in self.constant_activations:
            self.constant_activations.discard(id(output))
            return "constant", None
        if kind and isinstance(output, Tensor):
            self.origins[id(output)] = _Origin(id(output), inside=[claimed] if claimed else [])
        return kind, claimed


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def _is_sum(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function sums over one dimension, or keeps what it sums over: as norms do, and pooling does not."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    keeps = bool(kwargs.get("keepdim")) or any(value is True for value in args)
    one = isinstance(dims, int) or (isinstance(dims, tuple | list) and len(dims) == 1)
    return name in SUMS and (keeps or one)


def _is_same_view(tensor: Tensor, out: Tensor) -> bool:
    return (tensor.shape, tensor.stride(), tensor.data_ptr()) == (out.shape, out.stride(), out.data_ptr())
