"""Measures of the weights: the spectrum of each weight matrix, and the distance of all weights from initialisation.

P: trainable parameters, flattened and concatenated. This file only uses parameters with requires_grad.
"""

import warnings

import torch
from torch import Tensor, nn

from gengap_dist.config.measures import WEIGHT_VIEW
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import unwrapped
from gengap_dist.probes.progress import Progress, no_progress
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum

NORM_BLOCK = 2**18  # weights in float64 at once: about one cache
FLOOR = 64 * 2.0**-52  # relative to s_1 of a matrix: what a float64 SVD returns for an exact zero


def weight_spectra(
    model: nn.Module, *, world: World | None = None, on_progress: Progress = no_progress
) -> list[LayerSpectrum]:
    """Singular values of every trainable weight with 2 or more dimensions. Collective.

    A weight [out, in, ...] is the matrix [out, in * ...] (Galanti et al. 2022; Martin & Mahoney 2021); its singular
    values are float64 and not normalized. Ranks hold equal weights: each computes the SVD of every size-th matrix, and
    all get bitwise equal results.

    Args:
        model: any network; no forward pass is run, and it is not changed.
        world: the participating ranks; None for this process only.
        on_progress: called after each matrix of this rank, small ones first.

    Returns:
        One spectrum per weight, in the model's order, in view `weight`: `num_samples` counts rows, `num_units` columns,
        `dead_units` columns of zeros. A weight with a non-finite entry is skipped, with a warning.

    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
    >>> (spectrum,) = weight_spectra(nn.Sequential(layer))
    >>> spectrum.key, spectrum.singular_values.tolist(), spectrum.measures()["condition_number"]
    ('0/weight', [4.0, 3.0], 1.3333333333333333)
    """
    world = world or World()
    matrices: dict[str, Tensor] = {}
    for name, weight in trainable_parameters(model).items():
        if weight.ndim < 2 or not weight.numel():
            continue
        if not weight.isfinite().all():
            warnings.warn(f"weight {name} has non-finite entries: its spectrum is left out", stacklevel=2)
            continue
        matrices[name] = weight.flatten(1)
    values = [matrix.new_zeros(min(matrix.shape), dtype=torch.float64) for matrix in matrices.values()]
    own = sorted(([*enumerate(matrices.values())])[world.rank :: world.size], key=lambda item: _svd_work(item[1]))
    done, total = 0, sum(_svd_work(matrix) for _, matrix in own)
    for number, matrix in own:
        values[number] = torch.linalg.svdvals(matrix.double())
        done += _svd_work(matrix)
        on_progress(done, total)
    if values:
        values = world.all_reduce_to_cpu(torch.cat(values)).split([len(s) for s in values])
    return [_spectrum(name, matrix, s) for (name, matrix), s in zip(matrices.items(), values, strict=True)]


def _svd_work(matrix: Tensor) -> int:
    return matrix.numel() * min(matrix.shape)


def _spectrum(name: str, matrix: Tensor, s: Tensor) -> LayerSpectrum:
    floor = FLOOR * float(s[0])
    return LayerSpectrum(
        layer=name.removesuffix(".weight").replace("._orig_mod", ""),  # added by torch.compile
        view=WEIGHT_VIEW,
        centred=False,
        num_samples=matrix.shape[0],
        num_units=matrix.shape[1],
        singular_values=torch.where(s < floor, 0.0, s),
        floor=floor,
        dead_units=int((matrix == 0).all(0).sum()),
    )


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, detached, tied ones once; they share memory with the model.

    Raises:
        UsageError: if there are none.

    >>> [*trainable_parameters(nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)))]
    ['1.weight', '1.bias']
    """
    model = unwrapped(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError(f"{type(model).__name__} has no parameter with requires_grad: unfreeze the ones to measure")
    return parameters


def flat_parameters(model: nn.Module) -> Tensor:
    """A copy of all trainable parameters, flattened and concatenated: [P].

    >>> flat_parameters(nn.Linear(3, 2)).shape
    torch.Size([8])
    """
    return torch.cat([p.reshape(-1) for p in trainable_parameters(model).values()])


def distance_from_init(model: nn.Module, initial: Tensor) -> dict[str, float]:
    """Norm of all trainable parameters and distance from initialisation: Euclidean, in float64. Not collective.

    Args:
        model: any network.
        initial: w_0 [P], the value of `flat_parameters(model)` at initialisation.

    Returns:
        `weight_norm` |w|, `distance_from_init` |w - w_0| (grows like log t, Hoffer et al. 2017), and
        `relative_distance_from_init` |w - w_0| / |w_0|, which is omitted if |w_0| = 0.

    Raises:
        UsageError: if `initial` does not have the length of the model's trainable parameters.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> distance_from_init(model, torch.tensor([3.0, 0.0]))
    {'weight_norm': 5.0, 'distance_from_init': 4.0, 'relative_distance_from_init': 1.3333333333333333}
    """
    parameters = [*trainable_parameters(model).values()]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    if initial.shape != (num_parameters,):
        raise UsageError(
            f"initial has shape {[*initial.shape]}, the model has {num_parameters} trainable parameters: "
            "pass flat_parameters(model) of the same model with the same parameters frozen"
        )
    squares = torch.zeros(3, dtype=torch.float64, device=parameters[0].device)
    starts = initial.to(squares.device).split([parameter.numel() for parameter in parameters])
    for parameter, start in zip(parameters, starts, strict=True):
        for part_n, start_n in zip(parameter.reshape(-1).split(NORM_BLOCK), start.split(NORM_BLOCK), strict=True):
            now_n, then_n = part_n.double(), start_n.double()
            squares += torch.stack([now_n @ now_n, (now_n - then_n).square().sum(), then_n @ then_n])
    weight_norm, moved, norm = squares.sqrt().tolist()
    out = {"weight_norm": weight_norm, "distance_from_init": moved}
    return out | ({"relative_distance_from_init": moved / norm} if norm else {})
