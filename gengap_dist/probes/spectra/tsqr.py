"""The triangular factor of a matrix that comes piece by piece, and over ranks: exact to eps s_1, where a Gram matrix
leaves sqrt(eps) s_1. Slower; the cross-check, and the choice when the activations themselves are float64.

Tall-skinny QR (Demmel, Grigori, Hoemmen & Langou 2012): the R of two stacked matrices is the R of their stacked Rs.
Shapes as in `gram`: B is [k, n], R is [k, k] with R^T R = B B^T.
"""

from typing import final

import torch
from torch import Tensor

from gengap_dist.distributed.process_group import World
from gengap_dist.probes.spectra.gram import SpectrumAccumulator


@final
class QRAccumulator(SpectrumAccumulator):
    """R of a QR decomposition of B^T."""

    relative_floor = 64 * 2.0**-52  # 64 eps; 6 eps is what noise reaches, see benchmarks/gram_floor.py

    def __init__(self, size: int, device: torch.device) -> None:
        """Of no columns yet."""
        self.root_kk = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def _of(cls, root_kk: Tensor) -> "QRAccumulator":
        new = cls(0, root_kk.device)
        new.root_kk = root_kk
        return new

    def add(self, piece_kn: Tensor) -> None:
        """See `SpectrumAccumulator.add`."""
        self.root_kk = torch.linalg.qr(torch.cat([self.root_kk, piece_kn.T]), mode="r").R

    def fold(self, weight: float) -> "QRAccumulator":
        """See `SpectrumAccumulator.fold`."""
        return self._of(self.root_kk[:, :-1] + weight * self.root_kk[:, -1:])

    def squared_row_norms(self) -> Tensor:
        """See `SpectrumAccumulator.squared_row_norms`."""
        return self.root_kk.square().sum(0)

    def singular_values(self) -> Tensor:
        """See `SpectrumAccumulator.singular_values`.

        >>> triangle = QRAccumulator(2, torch.device("cpu"))
        >>> triangle.add(torch.tensor([[3.0, 0.0], [0.0, 1e-9]]).double())
        >>> [round(value, 12) for value in triangle.singular_values().tolist()]
        [3.0, 1e-09]
        """
        if not torch.isfinite(self.root_kk).all():
            return torch.full_like(self.root_kk[0], torch.nan)
        return torch.linalg.svdvals(self.root_kk)

    def all_reduce(self, world: World) -> None:
        """R of all ranks' matrices stacked, in place: up a binary tree to rank 0, and back to all. Collective."""
        stride, none = 1, self.root_kk[:0]
        while stride < world.size:
            sends = world.rank % (2 * stride) == stride
            receives = world.rank % (2 * stride) == 0 and world.rank + stride < world.size
            chunks = [self.root_kk if sends and to == world.rank - stride else none for to in range(world.size)]
            heights = [len(self.root_kk) if receives and of == world.rank + stride else 0 for of in range(world.size)]
            received = world.all_to_all(chunks, heights)
            if receives:
                self.add(received[world.rank + stride].T)
            stride *= 2
        if world.size > 1:
            self.root_kk = world.all_reduce(self.root_kk if world.rank == 0 else torch.zeros_like(self.root_kk))
