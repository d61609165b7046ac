"""Near-rank loss of a network's layers on a fixed set of inputs, exact across ranks."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gengap_dist.probes.capture import VIEWS, capturing, find_layers, observing
from gengap_dist.probes.gram import Gram, all_reduce, spectra
from gengap_dist.probes.spectrum import LayerSpectrum
from gengap_dist.world import World

CHUNK_BYTES = 64 * 2**20  # float64 copy of an activation that is held at a time


def measure(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    layers: str | Sequence[str] = "auto",
    views: Sequence[str] = ("channel", "pool"),
    centred: Sequence[bool] = (False, True),
    world: World | None = None,
    memory_mib: int = 512,
) -> list[LayerSpectrum]:
    """Activation spectra of a network's layers over the inputs of all ranks. Collective.

    Args:
        model: any network; left as found (modes, hooks, gradients, random numbers).
        batches: this rank's inputs, each [n, ...]; a rank may have none as long as another has some.
        layers: `auto` (outputs of every non-linearity), names or globs.
        views: how a convolution's [N, C, H, W] becomes a matrix; [N, D] has one view and [N, T, D] the view `token`.
        centred: whether to measure the matrix as it is, with column means taken out, or both.
        world: the ranks that take part; None for this process alone.
        memory_mib: largest Gram matrix.

    Returns:
        One spectrum per layer, view and centring, in the model's order, the same on every rank. A layer with a
        non-finite activation is left out, with a warning.

    Raises:
        UsageError: if a name matches no layer, a layer puts out no matrix, or a layer is too wide for `memory_mib`.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = model[0].weight.data.copy_(torch.eye(2))
    >>> raw, _ = measure(model, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    >>> (raw.singular_values * 2**0.5).round(decimals=6).tolist()
    [3.0, 1.0]
    """
    world = world or World()
    grams: dict[tuple[str, str], Gram] = {}
    counting = True

    def take(layer: str, activation: Tensor) -> None:
        for view, columns in VIEWS[activation.ndim].items():
            if activation.ndim == 4 and view not in views:
                continue
            bytes_each = 8 * activation[0].numel()
            for part in activation.split(max(1, CHUNK_BYTES // bytes_each)):
                matrix_DN = columns(part)
                if (layer, view) not in grams:
                    grams[layer, view] = Gram.empty(
                        layer, len(matrix_DN), activation.dtype, activation.device, memory_mib
                    )
                if counting:
                    grams[layer, view].add(matrix_DN)

    modules = find_layers(model, [layers] if isinstance(layers, str) else layers)
    with observing(model), capturing(modules, take) as new_pass:
        shape = None
        for batch in batches:
            shape = batch.shape[1:]
            new_pass()
            model(batch)
        example = _example(shape, model, world)
        if shape is None:  # no inputs here: a pass over zeros tells the shapes, and counts for nothing
            counting = False
            new_pass()
            model(example)
    all_reduce(list(grams.values()), world)
    found: list[LayerSpectrum] = []
    for (layer, view), gram in grams.items():
        if not torch.isfinite(gram.scatter_DD).all():  # the same on every rank: it was summed over them
            warnings.warn(f"layer {layer} has non-finite activations: its spectrum is left out", stacklevel=2)
            continue
        found += spectra(gram, layer, view, centred)
    return found


def _example(shape: torch.Size | None, model: nn.Module, world: World) -> Tensor:
    """One input of zeros, of the shape that the ranks with inputs have. Collective."""
    parameter = next(model.parameters())
    seen = torch.zeros(8, dtype=torch.float64, device=parameter.device)
    if shape is not None:
        seen[: len(shape) + 1] = seen.new_tensor([1, *shape])
    seen = world.sum(seen)
    if not seen[0]:
        raise ValueError("no rank has any inputs: give at least one batch")
    dims = [int(d / seen[0]) for d in seen[1:] if d]
    return torch.zeros(1, *dims, dtype=parameter.dtype, device=parameter.device)


def metrics(found: Iterable[LayerSpectrum]) -> dict[str, float]:
    """Flat metric names, `<measure>/<layer>[/<view>][/centred][/<threshold>]`.

    >>> s = LayerSpectrum("fc2", "", False, 9, 2, torch.tensor([1.0, 1e-3]).double(), 0.0, 0)
    >>> metrics([s])["near_rank_loss/fc2/abs_1e-2"], metrics([s])["sigma_max/fc2"]
    (0.5, 1.0)
    """
    out = {}
    for layer in found:
        for name, value in layer.measures().items():
            measure_name, _, threshold = name.partition("/")
            out["/".join(filter(None, (measure_name, layer.key, threshold)))] = value
    return out
