"""Assigns the samples of a global batch to ranks and micro-batches.

Pure arithmetic on positions 0 .. global_size - 1 of one global batch. The gradient of a step is
(sum of per-sample losses) / global_size, so shards and micro-batches may be uneven and the result is still exact.
"""

from typing import NamedTuple

from gengap_dist.distributed.process_group import World


class Span(NamedTuple):
    """Half-open range of positions in the global batch."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.stop - self.start


def split(total: int, parts: int) -> list[Span]:
    """Split `total` positions into `parts` consecutive spans whose sizes differ by at most one.

    >>> split(5, 2)
    [Span(start=0, stop=2), Span(start=2, stop=5)]
    """
    return [share(total, parts, part) for part in range(parts)]


def share(total: int, parts: int, part: int) -> Span:
    """Element `part` of `split(total, parts)`, without computing the others.

    >>> share(5, 2, 1)
    Span(start=2, stop=5)
    """
    return Span(part * total // parts, (part + 1) * total // parts)


def kinds_of_shares(total: int, parts: int) -> dict[int, int]:
    """The first part of each size in `split(total, parts)`, and the number of such parts; the last one by itself.

    The first part has the smaller size, the last one the larger.

    >>> [span.size for span in split(11, 4)], kinds_of_shares(11, 4), kinds_of_shares(8, 4)
    ([2, 3, 3, 3], {0: 1, 1: 2, 3: 1}, {0: 3, 3: 1})
    """
    num_larger = total % parts
    if not num_larger:
        return {0: parts - 1, parts - 1: 1}
    return {0: parts - num_larger, -(-parts // num_larger) - 1: num_larger - 1, parts - 1: 1}


class RankKind(NamedTuple):
    """Ranks whose micro-batches have the same sizes."""

    num_ranks: int
    num_samples: int
    """On each of them."""
    num_micro_batches: int
    micro_sizes: tuple[int, ...]
    """Sizes of their micro-batches, not one for each."""


class BatchPlan(NamedTuple):
    """How one global batch is split; the same object on every rank.

    Ranks and micro-batches get consecutive spans of nearly equal size. With `ghost_size`, whole ghost groups are
    assigned, so that no group is split over two ranks or two micro-batches.

    >>> BatchPlan(global_size=10, world_size=2, micro_size=3).micro_batches(rank=1)
    [Span(start=5, stop=7), Span(start=7, stop=10)]
    """

    global_size: int
    world_size: int
    micro_size: int
    ghost_size: int | None = None

    def micro_batches(self, rank: int, *, equal_counts: bool = False) -> list[Span]:
        """The rank's spans, in order. A rank with no samples gets one empty span: it still joins the all-reduce.

        Args:
            rank: the process rank.
            equal_counts: append empty spans until all ranks have equally many, for strategies with collectives in
                every micro-step.

        Raises:
            ValueError: if a size is not positive, the rank is not in the world, or a ghost group exceeds micro_size.
        """
        num_units, units_per_micro = self._units(rank)
        own = share(num_units, self.world_size, rank)
        num_micro = max(1, -(-own.size // units_per_micro))
        spans = [self._positions(own, part, num_micro) for part in range(num_micro)]
        if equal_counts:
            max_units = -(-num_units // self.world_size)  # of any rank
            spans += [Span(spans[-1].stop, spans[-1].stop)] * (-(-max_units // units_per_micro) - num_micro)
        return spans

    def _units(self, rank: int) -> tuple[int, int]:
        """Numbers of ghost groups, or of samples: of all, where the last group may be short, and of a micro-batch."""
        unit = self.ghost_size or 1
        for name in ("global_size", "world_size", "micro_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) is not positive: choose at least 1")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank ({rank}) is not in a world of {self.world_size}: choose 0 to {self.world_size - 1}")
        if self.micro_size < unit:
            raise ValueError(f"micro_size ({self.micro_size}) is smaller than a ghost group of {unit}: raise it")
        return -(-self.global_size // unit), self.micro_size // unit

    def _positions(self, own: Span, part: int, num_parts: int) -> Span:
        """A part of a rank's units as positions of the global batch."""
        unit, (start, stop) = self.ghost_size or 1, share(own.size, num_parts, part)
        return Span(*(min((own.start + at) * unit, self.global_size) for at in (start, stop)))

    def rank_kinds(self) -> list[RankKind]:
        """The ranks by the sizes of their micro-batches, in a time that depends on no size.

        >>> BatchPlan(global_size=10, world_size=3, micro_size=3).rank_kinds()
        [RankKind(num_ranks=2, num_samples=3, num_micro_batches=1, micro_sizes=(3,)), \
RankKind(num_ranks=1, num_samples=4, num_micro_batches=2, micro_sizes=(2,))]
        """
        num_units, units_per_micro = self._units(0)
        kinds = []
        for rank, num_ranks in kinds_of_shares(num_units, self.world_size).items():
            own = share(num_units, self.world_size, rank)
            num_micro = max(1, -(-own.size // units_per_micro))
            parts = [part for part, num in kinds_of_shares(own.size, num_micro).items() if num]
            sizes = sorted({self._positions(own, part, num_micro).size for part in parts})
            if num_ranks:
                kinds.append(RankKind(num_ranks, self._positions(own, 0, 1).size, num_micro, tuple(sizes)))
        return kinds

    def norm_sizes(self) -> set[int]:
        """Sizes of the groups over which batch norm computes its statistics, on all ranks.

        >>> sorted(BatchPlan(global_size=10, world_size=2, micro_size=3).norm_sizes())
        [2, 3]
        """
        sizes = {size for kind in self.rank_kinds() for size in kind.micro_sizes if size}
        if (ghost := self.ghost_size) is None:
            return sizes
        return {part for size in sizes for part in (min(ghost, size), size % ghost) if part}


def blocks(num_samples: int, size: int, world: World) -> list[Span]:
    """This rank's blocks of 0 .. num_samples - 1, assigned round-robin; the blocks do not depend on the world size.

    >>> blocks(7, 3, World(rank=0, size=2))
    [Span(start=0, stop=3), Span(start=6, stop=7)]
    """
    starts = range(world.rank * size, num_samples, world.size * size)
    return [Span(start, min(start + size, num_samples)) for start in starts]
