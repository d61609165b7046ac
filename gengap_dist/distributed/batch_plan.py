"""Which samples of a global batch go to which rank in which micro-batch.

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
        """How many positions it holds."""
        return self.stop - self.start


def split(total: int, parts: int) -> list[Span]:
    """`total` positions cut into `parts` consecutive spans whose sizes differ by at most one.

    >>> split(5, 2)
    [Span(start=0, stop=2), Span(start=2, stop=5)]
    """
    return [share(total, parts, part) for part in range(parts)]


def share(total: int, parts: int, part: int) -> Span:
    """Number `part` of `split(total, parts)`, without the others.

    >>> share(5, 2, 1)
    Span(start=2, stop=5)
    """
    return Span(part * total // parts, (part + 1) * total // parts)


class BatchPlan(NamedTuple):
    """How one global batch is cut; the same object on every rank.

    Ranks and micro-batches take consecutive, nearly equal spans. With `ghost_size`, whole ghost groups are dealt out,
    so that no group straddles two ranks or two micro-batches.

    >>> BatchPlan(global_size=10, world_size=2, micro_size=3).micro_batches(rank=1)
    [Span(start=5, stop=7), Span(start=7, stop=10)]
    """

    global_size: int
    world_size: int
    micro_size: int
    ghost_size: int | None = None

    def micro_batches(self, rank: int, *, equal_counts: bool = False) -> list[Span]:
        """This rank's spans, in order. A rank without samples gets one empty span: it still joins the all-reduce.

        Args:
            rank: the process rank.
            lockstep: give every rank as many as any rank has, by empty ones at the end: ranks meet in every pass.

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
        mine = share(num_units, self.world_size, rank)
        at_once = self.micro_size // unit
        num_micro = max(1, -(-mine.size // at_once))
        spans = [Span(mine.start + span.start, mine.start + span.stop) for span in split(mine.size, num_micro)]
        if equal_counts:
            largest = -(-num_units // self.world_size)  # share of a rank
            spans += [Span(mine.stop, mine.stop)] * (-(-largest // at_once) - num_micro)
        return [Span(min(a * unit, self.global_size), min(b * unit, self.global_size)) for a, b in spans]

    def norm_sizes(self) -> set[int]:
        """Sizes of the groups over which batch norm takes its statistics, over all ranks.

        >>> sorted(BatchPlan(global_size=10, world_size=2, micro_size=3).norm_sizes())
        [2, 3]
        """
        spans = [span for rank in range(self.world_size) for span in self.micro_batches(rank) if span.size]
        ghost = self.ghost_size
        if ghost is None:
            return {span.size for span in spans}
        return {min(ghost, span.stop - at) for span in spans for at in range(span.start, span.stop, ghost)}


def blocks(num_samples: int, size: int, world: World) -> list[Span]:
    """This rank's blocks of 0 .. num_samples - 1: blocks are the same on any number of ranks, dealt out in turn.

    >>> blocks(7, 3, World(rank=0, size=2))
    [Span(start=0, stop=3), Span(start=6, stop=7)]
    """
    starts = range(world.rank * size, num_samples, world.size * size)
    return [Span(start, min(start + size, num_samples)) for start in starts]
