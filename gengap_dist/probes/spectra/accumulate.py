"""One layer's activation matrix in one view, as it comes: rows batch by batch, from all ranks.

Two shapes of A [N, D], raw and with column means taken out; nothing cancels in either:

- `PrimalAccumulator`, D <= N: every rank adds the rows it has. What is summed is centred on the mean so far and merged as in Chan,
  Golub & LeVeque (1983), so the centred spectrum is as exact as the raw one even where the mean is a hundred times
  larger than the deviations.
- `DualAccumulator`, D > N, the paper's own regime: every rank keeps its rows, then all ranks turn them by `all_to_all` in blocks
  of bounded memory: each gets all N rows of a share of the columns, whose means it therefore knows. No rank ever holds
  more than its share.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from gengap_dist.distributed.batch_plan import Span, split
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.spectra.gram import GramAccumulator, SpectrumAccumulator, all_reduce
from gengap_dist.probes.spectra.tsqr import QRAccumulator

METHODS: dict[str, type[GramAccumulator] | type[QRAccumulator]] = {"gram": GramAccumulator, "tsqr": QRAccumulator}


@final
class PrimalAccumulator:
    """D <= N: k = D, B = A^T."""

    def __init__(self, square: SpectrumAccumulator) -> None:
        """No rows yet."""
        self.square, self.count = square, 0
        self.mean_D = torch.zeros_like(square.squared_row_norms())

    def add(self, columns_Dn: Tensor) -> None:
        """Add n rows, given as columns, in any floating dtype."""
        size, n = columns_Dn.shape
        piece = torch.empty(size, n + 1, dtype=torch.float64, device=columns_Dn.device)
        piece[:, :n] = columns_Dn
        mean_D = piece[:, :n].mean(1)
        piece[:, :n] -= mean_D[:, None]
        count, delta_D = self.count + n, mean_D - self.mean_D
        piece[:, n] = delta_D * (self.count * n / count) ** 0.5
        self.square.add(piece)
        self.mean_D += delta_D * (n / count)
        self.count = count

    def merged(self, centred: bool) -> SpectrumAccumulator:
        """All rows, centred or as they are; the latter last, for it is made in place."""
        if not centred:
            self.square.add(self.mean_D[:, None] * self.count**0.5)
        return self.square

    def dead_units(self) -> int:
        """Columns of zeros."""
        return int(((self.square.squared_row_norms() == 0) & (self.mean_D == 0)).sum())


@final
class DualAccumulator:
    """D > N: k = N + 1, B holds the N rows of A, centred, and the column means below them."""

    def __init__(self, square: SpectrumAccumulator) -> None:
        """No columns yet."""
        self.square = square
        self.num_dead = torch.zeros((), dtype=torch.float64, device=square.squared_row_norms().device)

    def add(self, block_Nc: Tensor) -> None:
        """Add c columns of all N rows, in any floating dtype."""
        n, width = block_Nc.shape
        piece = torch.empty(n + 1, width, dtype=torch.float64, device=block_Nc.device)
        piece[:n] = block_Nc
        piece[n] = piece[:n].mean(0)
        piece[:n] -= piece[n]
        self.square.add(piece)
        self.num_dead += (block_Nc == 0).all(0).sum()

    def redistribute_columns(self, held_nw: Tensor, counts: Sequence[int], world: World, block_bytes: int) -> None:
        """Add w columns, of which this rank holds `counts[rank]` rows. Collective.

        Args:
            held_nw: this rank's rows of the columns.
            counts: rows that each rank holds, in all N.
            world: the ranks.
            block_bytes: most bytes of a rank's block of columns in float64.
        """
        for block in num_redistributions(held_nw.shape[1], sum(counts), world.size, block_bytes):
            part = held_nw[:, block.start : block.stop]
            shares = split(block.size, world.size)
            received = world.all_to_all(
                [part[:, share.start : share.stop] for share in shares], counts, shares[world.rank].size
            )
            if shares[world.rank].size:
                self.add(torch.cat(received))

    def merged(self, centred: bool) -> SpectrumAccumulator:
        """All columns, centred or as they are; the latter last, for it is made in place."""
        return self.square.fold(0.0 if centred else 1.0)

    def dead_units(self) -> int:
        """Columns of zeros."""
        return int(self.num_dead)


def num_redistributions(num_columns: int, num_rows: int, world_size: int, block_bytes: int) -> list[Span]:
    """The blocks in which columns are turned: each leaves a rank at most `block_bytes` of whole columns in float64.

    >>> num_redistributions(5, num_rows=7, world_size=2, block_bytes=64)
    [Span(start=0, stop=2), Span(start=2, stop=4), Span(start=4, stop=5)]
    """
    width = max(1, block_bytes // (8 * (num_rows + 1))) * world_size
    return [Span(at, min(at + width, num_columns)) for at in range(0, num_columns, width)]


def merge(matrices: Sequence[PrimalAccumulator | DualAccumulator], world: World) -> None:
    """Bring all ranks' parts together, in place, for all matrices at once. Collective.

    Counts, means and numbers of dead units take one all-reduce, the packed triangles one per 16 MiB; with `tsqr`,
    triangles climb a tree instead.
    """
    if world.size == 1 or not matrices:
        return
    facts = [
        torch.cat([m.mean_D.new_tensor([m.count]), m.mean_D * m.count])
        if isinstance(m, PrimalAccumulator)
        else m.num_dead[None]
        for m in matrices
    ]
    totals = world.all_reduce(torch.cat(facts)).split([len(fact) for fact in facts])
    for matrix, total in zip(matrices, totals, strict=True):
        if isinstance(matrix, DualAccumulator):
            matrix.num_dead = total[0]
            continue
        mean_D = total[1:] / total[0]
        matrix.square.add((matrix.mean_D - mean_D)[:, None] * matrix.count**0.5)
        matrix.count, matrix.mean_D = int(total[0]), mean_D
    squares = [matrix.square for matrix in matrices]
    all_reduce([square for square in squares if isinstance(square, GramAccumulator)], world)
    for square in squares:
        if isinstance(square, QRAccumulator):
            square.all_reduce(world)
