"""How a global batch is divided over the ranks of a cluster. Pure functions; `distributed.batch_plan` has the rules."""

from dataclasses import dataclass

from gengap_dist.distributed.batch_plan import BatchPlan


@dataclass(frozen=True)
class Cluster:
    """A cluster of identical machines."""

    nodes: int
    gpus_per_node: int

    @property
    def num_ranks(self) -> int:
        """One rank for each GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Layout:
    """The global batch of one step, divided over the ranks; pairs are (smallest, largest)."""

    global_size: int
    samples_per_rank: tuple[int, int]
    micro_batches_per_rank: tuple[int, int]
    micro_sizes: tuple[int, int]
    """Of micro-batches with at least one sample."""
    num_idle: int
    """Ranks without a sample; they join the gradient all-reduce with zeros."""
    norm_sizes: list[int]
    """Sizes of the groups over which batch norm computes its statistics."""


def layout(plan: BatchPlan) -> Layout:
    """The layout of `plan` over its ranks.

    >>> layout(BatchPlan(global_size=5, world_size=2, micro_size=2))
    Layout(global_size=5, samples_per_rank=(2, 3), micro_batches_per_rank=(1, 2), micro_sizes=(1, 2), num_idle=0, \
norm_sizes=[1, 2])
    """
    ranks = [plan.micro_batches(rank) for rank in range(plan.world_size)]
    samples = [spans[-1].stop - spans[0].start for spans in ranks]
    sizes = [span.size for spans in ranks for span in spans if span.size]
    counts = [len(spans) for spans in ranks]
    return Layout(
        plan.global_size,
        (min(samples), max(samples)),
        (min(counts), max(counts)),
        (min(sizes), max(sizes)),
        samples.count(0),
        sorted(plan.norm_sizes()),
    )
