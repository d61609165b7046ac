"""Layers' activations, batch by batch, as they come out of a forward pass; the model is left exactly as found."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gengap_dist.config import UsageError, did_you_mean

NON_LINEARITIES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh,
)  # fmt: skip

VIEWS: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {  # by number of dimensions; each gives columns [D, rows]
    2: {"": lambda a: a.T},
    3: {"token": lambda a: a.flatten(0, 1).T},  # [N, T, D]: rows are tokens
    4: {  # [N, C, H, W]
        "channel": lambda a: a.transpose(0, 1).flatten(1),
        "pool": lambda a: a.mean((2, 3), dtype=torch.float64).T,
        "flatten": lambda a: a.flatten(1).T,
    },
}


def layer_name(module_name: str) -> str:
    """The name a module is reported under: this package's models call a layer's non-linearity `<layer>.act`."""
    return module_name.removesuffix(".act") or module_name


def find_layers(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Reported name and module of every layer asked for, in the model's own order.

    Args:
        model: any network.
        layers: names as reported, module names, globs, or `auto` for every non-linearity.

    Raises:
        UsageError: if a pattern matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in layers:
        if pattern == "auto":
            found = {name for name, module in modules.items() if isinstance(module, NON_LINEARITIES)}
        else:
            found = {n for n in modules if _matches(layer_name(n), pattern) and f"{n}.act" not in modules}
            found = found or {n for n in modules if _matches(n, pattern)}
        if not found:
            names = [layer_name(name) for name in modules]
            raise UsageError(
                f"probe.layers ({pattern}) matches no layer of {type(model).__name__}{did_you_mean(pattern, names)}: "
                f"choose among {', '.join(dict.fromkeys(names))}"
            )
        chosen |= found
    return {layer_name(name): modules[name] for name in modules if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    """Like a shell's globs: `*` stays within one part of a dotted name.

    >>> _matches("layer1.0", "layer*.0"), _matches("layer1.0.conv", "layer*")
    (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, no TF32, forked random numbers; everything is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    kinds = {parameter.device.type for parameter in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=True, allow_tf32=False))
        stack.enter_context(torch.random.fork_rng())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            torch.set_float32_matmul_precision("highest")
            model.eval()
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for module, training in modes:
                module.training = training


@contextmanager
def capturing(layers: dict[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[Callable[[], None]]:
    """While open, `take(layer, activation)` is called for every layer of a forward pass.

    Yields a function to call before each forward pass: a layer that runs k times in one pass reports `name`, then
    `name#2` to `name#k`.
    """
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def fired(module: nn.Module, args: object, output: object) -> None:
            calls[name] += 1
            if not isinstance(output, Tensor) or output.ndim not in VIEWS:
                shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise UsageError(
                    f"layer {name} puts out {shape}, needs one tensor of 2 to 4 dimensions: "
                    "leave it out of probe.layers, or name a layer inside it"
                )
            take(name if calls[name] == 1 else f"{name}#{calls[name]}", output)

        return fired

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        yield calls.clear
    finally:
        for handle in handles:
            handle.remove()
