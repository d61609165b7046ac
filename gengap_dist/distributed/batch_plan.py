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
        unit = self.ghost_size or 1
        for name in ("global_size", "world_size", "micro_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) is not positive: choose at least 1")
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank ({rank}) is not in a world of {self.world_size}: choose 0 to {self.world_size - 1}")
        if self.micro_size < unit:
            raise ValueError(f"micro_size ({self.micro_size}) is smaller than a ghost group of {unit}: raise it")
        num_units = -(-self.global_size // unit)  # the last group of a ragged batch may be short
        own = share(num_units, self.world_size, rank)
        units_per_micro = self.micro_size // unit
        num_micro = max(1, -(-own.size // units_per_micro))
        spans = [Span(own.start + span.start, own.start + span.stop) for span in split(own.size, num_micro)]
        if equal_counts:
            max_units = -(-num_units // self.world_size)  # of any rank
            spans += [Span(own.stop, own.stop)] * (-(-max_units // units_per_micro) - num_micro)
        return [Span(min(a * unit, self.global_size), min(b * unit, self.global_size)) for a, b in spans]

    def norm_sizes(self) -> set[int]:
        """Sizes of the groups over which batch norm computes its statistics, on all ranks.

        >>> sorted(BatchPlan(global_size=10, world_size=2, micro_size=3).norm_sizes())
        [2, 3]
        """
        spans = [span for rank in range(self.world_size) for span in self.micro_batches(rank) if span.size]
        ghost = self.ghost_size
        if ghost is None:
            return {span.size for span in spans}
        return {min(ghost, span.stop - start) for span in spans for start in range(span.start, span.stop, ghost)}


def blocks(num_samples: int, size: int, world: World) -> list[Span]:
    """This rank's blocks of 0 .. num_samples - 1, assigned round-robin; the blocks do not depend on the world size.

    >>> blocks(7, 3, World(rank=0, size=2))
    [Span(start=0, stop=3), Span(start=6, stop=7)]
    """
    starts = range(world.rank * size, num_samples, world.size * size)
    return [Span(start, min(start + size, num_samples)) for start in starts]
