"""Gram matrices of activations, summed in float64 over batches and ranks; no rows ever leave their rank.

What is summed is the scatter around the mean, merged as in Chan, Golub & LeVeque (1983): nothing cancels, so the
centred spectrum is as exact as the raw one even where the mean is a hundred times larger than the deviations.

Shapes: N rows, D units, A [N, D] the activation matrix of one layer in one view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gengap_dist.config import UsageError
from gengap_dist.probes.spectrum import ACTIVATION_FLOORS, GRAM_FLOOR, LayerSpectrum
from gengap_dist.world import World


@dataclass
class Gram:
    """Rows seen so far: their number, their mean m and the sum of (a - m)(a - m)^T over rows a."""

    count: int
    mean_D: Tensor  # [D] float64
    scatter_DD: Tensor  # [D, D] float64
    dtype: torch.dtype  # of the activations; decides the floor

    @classmethod
    def empty(cls, layer: str, num_units: int, dtype: torch.dtype, device: torch.device, memory_mib: int) -> "Gram":
        """No rows yet.

        Raises:
            UsageError: if a D x D float64 matrix exceeds `memory_mib`.
        """
        if num_units**2 * 8 > memory_mib * 2**20:
            raise UsageError(
                f"layer {layer} has {num_units} units, whose Gram matrix exceeds the {memory_mib} MiB of memory_mib: "
                "the N x N form for wide layers is not there yet; measure the layer in view channel or pool"
            )
        zeros = torch.zeros(num_units, num_units, dtype=torch.float64, device=device)
        return cls(0, zeros.new_zeros(num_units), zeros, dtype)

    def add(self, columns_DN: Tensor) -> None:
        """Add rows, given as columns [D, n] in any floating dtype."""
        rows = columns_DN.double()
        mean_D = rows.mean(1)
        rows = rows - mean_D[:, None]
        count, delta_D = self.count + rows.shape[1], mean_D - self.mean_D
        self.scatter_DD.addmm_(rows, rows.T)
        self.scatter_DD.addr_(delta_D, delta_D, alpha=self.count * rows.shape[1] / count)
        self.mean_D += delta_D * (rows.shape[1] / count)
        self.count = count


def all_reduce(grams: list[Gram], world: World) -> None:
    """Merge all Gram matrices over ranks, in place. Collective.

    Two all-reduces whatever the number of layers: counts and means, then the upper triangles.
    """
    if world.size == 1 or not grams:
        return
    sizes = [len(g.mean_D) for g in grams]
    totals = world.sum(
        torch.cat([part for g in grams for part in (g.mean_D.new_tensor([g.count]), g.mean_D * g.count)])
    )
    triangles = [torch.triu_indices(size, size, device=totals.device) for size in sizes]
    for g, total in zip(grams, totals.split([size + 1 for size in sizes]), strict=True):
        mean_D = total[1:] / total[0]
        delta_D = g.mean_D - mean_D
        g.scatter_DD.addr_(delta_D, delta_D, alpha=g.count)
        g.count, g.mean_D = int(total[0]), mean_D
    flat = world.sum(torch.cat([g.scatter_DD[i, j] for g, (i, j) in zip(grams, triangles, strict=True)]))
    packed = flat.split([size * (size + 1) // 2 for size in sizes])
    for g, (i, j), triangle in zip(grams, triangles, packed, strict=True):
        g.scatter_DD[i, j] = g.scatter_DD[j, i] = triangle


def spectra(gram: Gram, layer: str, view: str, centred: Sequence[bool] = (False, True)) -> list[LayerSpectrum]:
    """Singular values of A / sqrt(N), and of A with its column means taken out.

    Floor: 4 sqrt(eps) of the matrix's own largest singular value, plus what the rounding of the activations themselves
    leaves, which is relative to the largest singular value of the raw matrix.
    """
    n, units = gram.count, len(gram.mean_D)
    most = min(n, units)
    scatter_DD = gram.scatter_DD / n
    raw_DD = scatter_DD + torch.outer(gram.mean_D, gram.mean_D)
    values = {False: _singular_values(raw_DD, most)}
    rounding = ACTIVATION_FLOORS[gram.dtype] * float(values[False][0])
    if True in centred:
        values[True] = _singular_values(scatter_DD, most)
    found = []
    for c in centred:
        floor = GRAM_FLOOR * float(values[c][0]) + rounding
        found.append(
            LayerSpectrum(
                layer=layer,
                view=view,
                centred=c,
                num_samples=n,
                num_units=units,
                singular_values=torch.where(values[c] > floor, values[c], 0.0),
                floor=floor,
                dead_units=int((raw_DD.diagonal() == 0).sum()),
            )
        )
    return found


def _singular_values(gram_DD: Tensor, most: int) -> Tensor:
    """[most] float64 on the CPU, descending: roots of the largest eigenvalues; rounding leaves tiny negative ones."""
    return torch.linalg.eigvalsh(gram_DD).flip(0)[:most].clamp_min(0).sqrt().cpu()
