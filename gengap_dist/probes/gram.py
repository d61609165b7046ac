"""Gram matrices of activations, summed in float64 over batches and ranks; no rows ever leave their rank.

Shapes: N rows, D units, A [N, D] the activation matrix of one layer in one view.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gengap_dist.config import UsageError
from gengap_dist.probes.spectrum import FLOORS, LayerSpectrum
from gengap_dist.world import World


@dataclass
class Gram:
    """Running sums over rows: their number, their sum and A^T A."""

    count: int
    sum_D: Tensor  # [D] float64
    gram_DD: Tensor  # [D, D] float64
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
        a = columns_DN.double()
        self.count += a.shape[1]
        self.sum_D += a.sum(1)
        self.gram_DD.addmm_(a, a.T)


def all_reduce(grams: list[Gram], world: World) -> None:
    """Sum all Gram matrices over ranks, in place, in one all-reduce of their upper triangles. Collective."""
    if world.size == 1 or not grams:
        return
    triangles = [torch.triu_indices(len(g.sum_D), len(g.sum_D), device=g.sum_D.device) for g in grams]
    parts = [
        part
        for g, (i, j) in zip(grams, triangles, strict=True)
        for part in (g.sum_D.new_tensor([g.count]), g.sum_D, g.gram_DD[i, j])
    ]
    flat = world.sum(torch.cat(parts))
    pieces = iter(flat.split([len(part) for part in parts]))
    for g, (i, j) in zip(grams, triangles, strict=True):
        g.count = int(next(pieces))
        g.sum_D = next(pieces)
        g.gram_DD[i, j] = g.gram_DD[j, i] = next(pieces)


def spectrum(gram: Gram, layer: str, view: str, *, centred: bool) -> LayerSpectrum:
    """Singular values of A / sqrt(N), or of A with its column means taken out: G_c = G - N m m^T.

    The floor is relative to the largest singular value of the *raw* matrix in both cases: the centred Gram matrix is a
    difference, and inherits the rounding errors of what it was taken from.
    """
    n, units = gram.count, len(gram.sum_D)
    raw_DD = gram.gram_DD / n
    mean_D = gram.sum_D / n
    gram_DD = raw_DD - torch.outer(mean_D, mean_D) if centred else raw_DD
    eigenvalues = torch.linalg.eigvalsh(gram_DD).flip(0)[: min(n, units)].clamp_min(0)  # rounding leaves tiny negatives
    top = eigenvalues[0] if not centred else torch.linalg.eigvalsh(raw_DD)[-1].clamp_min(0)
    return LayerSpectrum(
        layer=layer,
        view=view,
        centred=centred,
        num_samples=n,
        num_units=units,
        singular_values=eigenvalues.sqrt().cpu(),
        floor=FLOORS[gram.dtype] * float(top.sqrt()),
        dead_units=int((gram.gram_DD.diagonal() == 0).sum()),
    )
