"""Which layers of a network a probe measures: those that the user names, or all non-linearities and residual blocks."""

import fnmatch
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gengap_dist.errors import UsageError, did_you_mean, first_of
from gengap_dist.probes.activations import capture_activations
from gengap_dist.probes.trace import Layer, reported_names, scripted_modules, trace_calls, uncompiled_modules

Pattern = str | type[nn.Module]


def select_layers(model: nn.Module, example: Tensor, patterns: Sequence[Pattern]) -> list[Layer]:
    """The layers that match `patterns`, in the order in which they run.

    Args:
        model: any network, uncompiled and unwrapped.
        example: inputs [n, ...], of which the first two are traced; with n = 1 the same one twice.
        patterns: `auto` (the output of every non-linearity, module or function, of every unit's `act`, and of every
            residual block after its addition), names as reported, module names, globs, or classes of modules. What
            `auto` finds and cannot be measured is left out, with a warning.

    Raises:
        UsageError: if a pattern matches nothing, or the output of a layer that is named is not a tensor of 2 or more
            dimensions.
    """
    two = example[:2] if len(example) > 1 else torch.cat([example, example])
    calls = trace_calls(model, two)
    chosen: set[int] = set()
    asked: set[int] = set()
    for pattern in patterns:
        if pattern == "auto":
            kinds = [call for call in calls if call.kind]
            found = [call for call in kinds if _problem(call) is None]
            left_out = [f"{call.name} ({_problem(call)})" for call in kinds if _problem(call) is not None]
            left_out += [f"{name} (TorchScript)" for name in scripted_modules(model)]
            if left_out:
                warnings.warn(
                    f"{len(left_out)} layer(s) of {type(model).__name__} are not measured, because what they put out "
                    f"is no matrix of samples and units: {first_of(left_out)}",
                    stacklevel=4,
                )
        else:
            wanted = _modules(model, pattern)
            found = [call for call in calls if id(call.module) in wanted and not call.function]
            if isinstance(pattern, str):
                functions = [call for call in calls if call.function]
                found += [call for call in functions if _matches(call.name.partition("#")[0], pattern)]
                if "#" in pattern:
                    found = [call for call in calls if _matches(call.name, pattern)]
            if wanted and not found:
                raise UsageError(
                    f"probe.layers ({pattern}) names a layer that does not run in a forward pass: leave it out"
                )
            for call in found:
                if (problem := _problem(call)) is not None:
                    raise UsageError(
                        f"layer {call.name} outputs {problem}, needs one tensor with the same number of rows for each "
                        "sample: leave it out of probe.layers, or name a layer inside it"
                    )
            asked |= {id(call) for call in found}
        if not found:
            shown = pattern if isinstance(pattern, str) else pattern.__name__
            names = list(dict.fromkeys([*reported_names(model).values(), *(c.name for c in calls if c.function)]))
            raise UsageError(
                f"probe.layers ({shown}) matches no layer of {type(model).__name__}{did_you_mean(shown, names)}: "
                + (f"choose among {_list_names(shown, names)}" if names else "it has none")
            )
        chosen |= {id(call) for call in found}
    layers = [call._replace(is_asked=id(call) in asked) for call in calls if id(call) in chosen]
    times = Counter(layer.name for layer in layers)
    full = {id(module): name for name, module in uncompiled_modules(model).items()}
    return [
        layer._replace(name=full[id(layer.module)] + layer.name[layer.name.find("#") :] * ("#" in layer.name))
        if times[layer.name] > 1 and not layer.function  # a unit and its own non-linearity
        else layer
        for layer in layers
    ]


def last_hidden_layer(model: nn.Module, example: Tensor, layers: Sequence[Layer]) -> str | None:
    """Name of the last of `layers` in a forward pass that is not the output of the network itself; None: there is none.

    In a network that ends in a classifier it is the measured layer nearest to the classifier's input.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(1))
    >>> example = torch.zeros(2, 4)
    >>> last_hidden_layer(net, example, select_layers(net, example, ["auto"]))
    '1'
    """
    found: list[tuple[str, Tensor]] = []
    two = example[:2] if len(example) > 1 else torch.cat([example, example])
    with capture_activations(model, layers, lambda layer, output: found.append((layer.name, output))) as capture:
        capture.begin_pass()
        output = model(two.clone())
    return next((name for name, activation in reversed(found) if not _is_same(activation, output)), None)


def _is_same(activation: Tensor, output: object) -> bool:
    """Whether a tensor is the output of the network, or holds the same numbers in another shape."""
    if not isinstance(output, Tensor):
        return False
    return activation is output or (activation.data_ptr(), activation.numel()) == (output.data_ptr(), output.numel())


def _problem(call: Layer) -> str | None:
    """What a call puts out for two samples, if it is no matrix of samples and units; None: it is one."""
    if isinstance(call.output, str):
        return call.output
    if call.kind == "constant":
        return f"{list(call.output)}, the same for all samples"
    shape = call.output
    if len(shape) < 2 or not shape.numel():
        return str(list(shape))
    num_rows = shape.numel() // shape[-1 if call.channels_last else 1]
    return str(list(shape)) if num_rows % 2 else None


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
