"""How a global batch is divided over the ranks of a cluster. Pure functions; `distributed.batch_plan` has the rules."""

import math
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

    def shard_group(self, size: int) -> "Cluster":
        """`size` consecutive ranks; groups that do not fit into nodes are assumed to lie on more of them.

        >>> Cluster(nodes=4, gpus_per_node=8).shard_group(16), Cluster(4, 8).shard_group(2)
        (Cluster(nodes=2, gpus_per_node=8), Cluster(nodes=1, gpus_per_node=2))
        """
        each = math.gcd(size, self.gpus_per_node)
        return Cluster(size // each, each)

    def replicas(self, size: int) -> "Cluster":
        """One rank of each group of `size` consecutive ranks.

        >>> Cluster(nodes=4, gpus_per_node=8).replicas(16), Cluster(4, 8).replicas(2)
        (Cluster(nodes=2, gpus_per_node=1), Cluster(nodes=4, gpus_per_node=4))
        """
        each = 1 if self.gpus_per_node % size else self.gpus_per_node // size
        return Cluster(self.num_ranks // size // each, each)


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
    kinds = plan.rank_kinds()
    samples = [kind.num_samples for kind in kinds]
    sizes = [size for kind in kinds for size in kind.micro_sizes if size]
    counts = [kind.num_micro_batches for kind in kinds]
    return Layout(
        plan.global_size,
        (min(samples), max(samples)),
        (min(counts), max(counts)),
        (min(sizes), max(sizes)),
        sum(kind.num_ranks for kind in kinds if not kind.num_samples),
        sorted(plan.norm_sizes()),
    )
