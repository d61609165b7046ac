"""Gram matrices B B^T of a matrix B that comes piece by piece, in float64, summed over ranks.

Shapes: B is [k, n]; k is fixed, the n columns come in pieces and are never kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self, final

import torch
from torch import Tensor

from gengap_dist.distributed.process_group import World

PANEL = 256  # rows of one product: only blocks on and above the diagonal are computed
BUCKET_BYTES = 16 * 2**20  # of packed triangles in one all-reduce


class SpectrumAccumulator(ABC):
    """What is known of B: enough for its singular values, in k x k numbers."""

    relative_floor: float
    """Singular values below this times the largest are rounding noise."""

    @abstractmethod
    def add(self, piece_kn: Tensor) -> None:
        """More columns of B, float64; they may be overwritten."""

    @abstractmethod
    def fold(self, weight: float) -> Self:
        """Of the k - 1 rows that remain when the last one, times `weight`, is added to each of the others.

        In place: with a weight other than 0 this one is used up.
        """

    @abstractmethod
    def squared_row_norms(self) -> Tensor:
        """[k] sums of squares of B's rows."""

    @abstractmethod
    def singular_values(self) -> Tensor:
        """[k] of B, float64, descending; NaN if B holds anything that is not finite."""


@final
class GramAccumulator(SpectrumAccumulator):
    """The upper triangle of B B^T. Squaring costs half the digits: what is below sqrt(eps) s_1 is lost."""

    relative_floor = 4 * 2.0**-26  # 4 sqrt(eps); 2.4 sqrt(eps) is what noise reaches, see benchmarks/gram_floor.py

    def __init__(self, size: int, device: torch.device) -> None:
        """Of no columns yet."""
        self.matrix_kk = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def _of(cls, matrix_kk: Tensor) -> "GramAccumulator":
        new = cls(0, matrix_kk.device)
        new.matrix_kk = matrix_kk
        return new

    def add(self, piece_kn: Tensor) -> None:
        """See `SpectrumAccumulator.add`."""
        for at in range(0, len(piece_kn), PANEL):
            self.matrix_kk[at : at + PANEL, at:].addmm_(piece_kn[at : at + PANEL], piece_kn[at:].T)

    def fold(self, weight: float) -> "GramAccumulator":
        """See `SpectrumAccumulator.fold`."""
        rest, last = self.matrix_kk[:-1, :-1], weight * self.matrix_kk[:-1, -1]
        if weight:
            rest += last + weight**2 * self.matrix_kk[-1, -1]
            rest += last[:, None]
        return self._of(rest)

    def squared_row_norms(self) -> Tensor:
        """See `SpectrumAccumulator.squared_row_norms`."""
        return self.matrix_kk.diagonal()

    def singular_values(self) -> Tensor:
        """See `SpectrumAccumulator.singular_values`: roots of the eigenvalues; rounding leaves tiny negative ones.

        >>> gram = GramAccumulator(2, torch.device("cpu"))
        >>> gram.add(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double())
        >>> gram.singular_values()
        tensor([4., 3.], dtype=torch.float64)
        """
        if not torch.isfinite(self.matrix_kk).all():
            return torch.full_like(self.matrix_kk[0], torch.nan)
        return torch.linalg.eigvalsh(self.matrix_kk, UPLO="U").flip(0).clamp_min(0).sqrt()

    def rows(self) -> Iterator[Tensor]:
        """The upper triangle, as views."""
        return (self.matrix_kk[at, at:] for at in range(len(self.matrix_kk)))


def all_reduce(grams: Sequence[GramAccumulator], world: World) -> None:
    """Sum Gram matrices over ranks, in place: k (k + 1) / 2 numbers each. Collective."""
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    num_bytes = 0
    rows = [row for gram in grams for row in gram.rows()]
    for number, row in enumerate(rows, 1):
        bucket.append(row)
        num_bytes += 8 * len(row)
        if num_bytes >= BUCKET_BYTES or number == len(rows):
            total = world.all_reduce(torch.cat(bucket))
            for mine, summed in zip(bucket, total.split([len(row) for row in bucket]), strict=True):
                mine.copy_(summed)
            bucket, num_bytes = [], 0
