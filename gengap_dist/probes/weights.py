"""The weights themselves: the spectrum of each layer's matrix, and how far all of them are from where they started.

P trainable parameters laid end to end. Only parameters with requires_grad count, everywhere in this file.
"""

import warnings

import torch
from torch import Tensor, nn

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import unwrapped
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum

FLOOR = 64 * 2.0**-52  # of a matrix's own s_1: what a float64 SVD leaves of an exact zero


def weight_spectra(model: nn.Module, *, world: World | None = None) -> list[LayerSpectrum]:
    """Singular values of every trainable weight with 2 or more dimensions. Collective.

    A weight [out, in, ...] is the matrix [out, in * ...] (Galanti et al. 2022; Martin & Mahoney 2021); its singular
    values stand as they are, in float64, divided by nothing. Ranks hold equal weights: each takes the SVD of every
    size-th one, and all get the same bits.

    Args:
        model: any network; nothing runs, nothing is changed.
        world: the ranks that take part; None for this process alone.

    Returns:
        One spectrum per weight, in the model's order, of view `weight`: `num_samples` counts rows, `num_units` columns,
        `dead_units` columns of zeros. A weight with a non-finite entry is left out, with a warning.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
    >>> (found,) = weight_spectra(nn.Sequential(layer))
    >>> found.key, found.singular_values.tolist(), found.measures()["condition_number"]
    ('0/weight', [4.0, 3.0], 1.3333333333333333)
    """
    world = world or World()
    matrices: dict[str, Tensor] = {}
    for name, weight in trainable(model).items():
        if weight.ndim < 2 or not weight.numel():
            continue
        if not weight.isfinite().all():
            warnings.warn(f"weight {name} has non-finite entries: its spectrum is left out", stacklevel=2)
            continue
        matrices[name] = weight.flatten(1)
    values = [matrix.new_zeros(min(matrix.shape), dtype=torch.float64) for matrix in matrices.values()]
    for number, matrix in enumerate(matrices.values()):
        if number % world.size == world.rank:
            values[number] = torch.linalg.svdvals(matrix.double())
    if values:
        values = world.all_reduce_to_cpu(torch.cat(values)).split([len(s) for s in values])
    return [_spectrum(name, matrix, s) for (name, matrix), s in zip(matrices.items(), values, strict=True)]


def _spectrum(name: str, matrix: Tensor, s: Tensor) -> LayerSpectrum:
    floor = FLOOR * float(s[0])
    return LayerSpectrum(
        layer=name.removesuffix(".weight").replace("._orig_mod", ""),  # what torch.compile adds
        view="weight",
        centred=False,
        num_samples=matrix.shape[0],
        num_units=matrix.shape[1],
        singular_values=torch.where(s < floor, 0.0, s),
        floor=floor,
        dead_units=int((matrix == 0).all(0).sum()),
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name and without gradients, tied ones once; they share the model's memory.

    Raises:
        UsageError: if there is none.

    >>> [*trainable(nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)))]
    ['1.weight', '1.bias']
    """
    model = unwrapped(model)
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise UsageError(f"{type(model).__name__} has no parameter with requires_grad: unfreeze the ones to measure")
    return found


def flat(model: nn.Module) -> Tensor:
    """A copy of all trainable parameters, end to end: [P].

    >>> flat(nn.Linear(3, 2)).shape
    torch.Size([8])
    """
    return torch.cat([p.reshape(-1) for p in trainable(model).values()])


def distance(model: nn.Module, initial: Tensor) -> dict[str, float]:
    """How far training has gone; Euclidean norms over all trainable parameters, summed in float64. No communication.

    Args:
        model: any network.
        initial: [P], what `flat(model)` was at initialisation, w_0.

    Returns:
        `weight_norm` |w|, `distance_from_init` |w - w_0| (grows like log t, Hoffer et al. 2017), and
        `relative_distance_from_init` |w - w_0| / |w_0|, which is left out where |w_0| = 0.

    Raises:
        UsageError: if `initial` has not as many numbers as the model has trainable parameters.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> distance(model, torch.tensor([3.0, 0.0]))
    {'weight_norm': 5.0, 'distance_from_init': 4.0, 'relative_distance_from_init': 1.3333333333333333}
    """
    now_P = flat(model).double()
    if initial.shape != now_P.shape:
        raise UsageError(
            f"initial has shape {[*initial.shape]}, the model has {len(now_P)} trainable parameters: "
            "give flat(model) of the same model with the same parameters frozen"
        )
    start_P = initial.to(now_P)
    moved, norm = float((now_P - start_P).norm()), float(start_P.norm())
    out = {"weight_norm": float(now_P.norm()), "distance_from_init": moved}
    return out | ({"relative_distance_from_init": moved / norm} if norm else {})
