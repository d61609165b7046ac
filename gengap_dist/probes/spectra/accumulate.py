"""Accumulates one layer's activation matrix in one view, batch by batch, over all ranks.

Two forms for A [N, D], raw and with column means subtracted; neither suffers from cancellation:

- `PrimalAccumulator`, D <= N: every rank adds its own rows. Sums are centred on the current mean and merged as in
  Chan, Golub & LeVeque (1983), so the centred spectrum is as exact as the raw one even if the mean is a hundred times
  larger than the deviations.
- `DualAccumulator`, D > N, the paper's regime: every rank keeps its rows, then `all_to_all` redistributes them in
  blocks of bounded memory: each rank gets all N rows of its share of the columns, and so their means. No rank holds
  more than its share.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from gengap_dist.config.measures import Method
from gengap_dist.distributed.batch_plan import Span, split
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.spectra.gram import GramAccumulator, SpectrumAccumulator, all_reduce_grams
from gengap_dist.probes.spectra.tsqr import QRAccumulator

METHODS: dict[Method, type[GramAccumulator] | type[QRAccumulator]] = {"gram": GramAccumulator, "tsqr": QRAccumulator}


@final
class PrimalAccumulator:
    """D <= N: k = D, B = A^T."""

    def __init__(self, spectrum: SpectrumAccumulator, eps: float = torch.finfo(torch.float64).eps) -> None:
        """No rows yet; `eps` is the relative rounding error of the values."""
        self.spectrum, self.count, self.eps = spectrum, 0, eps
        self.mean_D = torch.zeros_like(spectrum.squared_row_norms())

    def add(self, columns_Dn: Tensor) -> None:
        """Add n rows, given as columns, in any floating dtype."""
        size, n = columns_Dn.shape
        block_kn = torch.empty(size, n + 1, dtype=torch.float64, device=columns_Dn.device)
        block_kn[:, :n] = columns_Dn
        mean_D = block_kn[:, :n].mean(1)
        block_kn[:, :n] -= mean_D[:, None]
        count, delta_D = self.count + n, mean_D - self.mean_D
        block_kn[:, n] = delta_D * (self.count * n / count) ** 0.5
        self.spectrum.add(block_kn)
        self.mean_D += delta_D * (n / count)
        self.count = count

    def finalized(self, centred: bool) -> SpectrumAccumulator:
        """The accumulator of all rows, centred or raw. Call the raw case last: it is computed in place."""
        if not centred:
            self.spectrum.add(self.mean_D[:, None] * self.count**0.5)
        return self.spectrum

    def dead_units(self) -> int:
        """Number of columns of zeros."""
        return int(((self.spectrum.squared_row_norms() == 0) & (self.mean_D == 0)).sum())

    def constant_units(self) -> int:
        """Number of columns with one value, up to rounding; before the raw case of `finalized`."""
        return int(_are_constant(self.spectrum.squared_row_norms(), self.count, self.mean_D, self.eps).sum())


@final
class DualAccumulator:
    """D > N: k = N + 1, B is the N centred rows of A, with the column means as last row."""

    def __init__(self, spectrum: SpectrumAccumulator, eps: float = torch.finfo(torch.float64).eps) -> None:
        """No columns yet; `eps` is the relative rounding error of the values."""
        self.spectrum, self.eps = spectrum, eps
        self.num_dead_and_constant = torch.zeros(2, dtype=torch.float64, device=spectrum.squared_row_norms().device)

    def add(self, block_Nc: Tensor) -> None:
        """Add c columns of all N rows, in any floating dtype."""
        n, width = block_Nc.shape
        block_kn = torch.empty(n + 1, width, dtype=torch.float64, device=block_Nc.device)
        block_kn[:n] = block_Nc
        block_kn[n] = block_kn[:n].mean(0)
        block_kn[:n] -= block_kn[n]
        constant_c = _are_constant(block_kn[:n].square().sum(0), n, block_kn[n], self.eps)
        self.num_dead_and_constant += torch.stack([(block_Nc == 0).all(0).sum(), constant_c.sum()])
        self.spectrum.add(block_kn)

    def redistribute_columns(self, own_rows_nw: Tensor, counts: Sequence[int], world: World, block_bytes: int) -> None:
        """Add w columns, of which each rank holds `counts[rank]` rows. Collective.

        Args:
            own_rows_nw: this rank's rows of the columns.
            counts: number of rows on each rank, N in total.
            world: the ranks.
            block_bytes: maximum bytes of a rank's block of columns in float64.
        """
        for block in redistribution_blocks(own_rows_nw.shape[1], sum(counts), world.size, block_bytes):
            columns_nc = own_rows_nw[:, block.start : block.stop]
            shares = split(block.size, world.size)
            received = world.all_to_all(
                [columns_nc[:, share.start : share.stop] for share in shares], counts, shares[world.rank].size
            )
            if shares[world.rank].size:
                self.add(torch.cat(received))

    def finalized(self, centred: bool) -> SpectrumAccumulator:
        """The accumulator of all columns, centred or raw. Call the raw case last: it is computed in place."""
        return self.spectrum.fold(0.0 if centred else 1.0)

    def dead_units(self) -> int:
        """Number of columns of zeros."""
        return int(self.num_dead_and_constant[0])

    def constant_units(self) -> int:
        """Number of columns with one value, up to rounding."""
        return int(self.num_dead_and_constant[1])


def _are_constant(squares_D: Tensor, num_rows: int, mean_D: Tensor, eps: float) -> Tensor:
    """Whether each column has one value, up to rounding: standard deviation <= 4 eps |mean|. [D] bool.

    Args:
        squares_D: sums of the squared deviations from the means.
        num_rows: N.
        mean_D: the means.
        eps: relative rounding error of the values.

    >>> _are_constant(torch.tensor([0.0, 1e-16, 1.0]), 4, torch.tensor([0.0, 3.0, 0.0]), eps=1e-7)
    tensor([ True,  True, False])
    """
    return squares_D <= num_rows * (4 * eps * mean_D).square()


def redistribution_blocks(num_columns: int, num_rows: int, world_size: int, block_bytes: int) -> list[Span]:
    """The column blocks of a redistribution: each gives a rank at most `block_bytes` of full columns in float64.

    >>> redistribution_blocks(5, num_rows=7, world_size=2, block_bytes=64)
    [Span(start=0, stop=2), Span(start=2, stop=4), Span(start=4, stop=5)]
    """
    width = max(1, block_bytes // (8 * (num_rows + 1))) * world_size
    return [Span(at, min(at + width, num_columns)) for at in range(0, num_columns, width)]


def merge_ranks(matrices: Sequence[PrimalAccumulator | DualAccumulator], world: World) -> None:
    """Combine the accumulators of all ranks, in place, for all matrices together. Collective.

    Counts, means and numbers of dead and constant units take one all-reduce, packed triangles one per 16 MiB; with
    `tsqr`, triangular factors are combined in a binary tree instead.
    """
    if world.size == 1 or not matrices:
        return
    summaries = [
        torch.cat([m.mean_D.new_tensor([m.count]), m.mean_D * m.count])
        if isinstance(m, PrimalAccumulator)
        else m.num_dead_and_constant
        for m in matrices
    ]
    totals = world.all_reduce(torch.cat(summaries)).split([len(summary) for summary in summaries])
    for matrix, total in zip(matrices, totals, strict=True):
        if isinstance(matrix, DualAccumulator):
            matrix.num_dead_and_constant = total
            continue
        mean_D = total[1:] / total[0]
        matrix.spectrum.add((matrix.mean_D - mean_D)[:, None] * matrix.count**0.5)
        matrix.count, matrix.mean_D = int(total[0]), mean_D
    accumulators = [matrix.spectrum for matrix in matrices]
    all_reduce_grams([accumulator for accumulator in accumulators if isinstance(accumulator, GramAccumulator)], world)
    for accumulator in accumulators:
        if isinstance(accumulator, QRAccumulator):
            accumulator.all_reduce(world)
