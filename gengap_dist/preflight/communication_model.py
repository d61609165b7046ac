"""The messages between ranks, and their time in the alpha-beta model.

A message of M bytes takes alpha + beta M seconds (Hockney 1994). R ranks run on N = R / g nodes with g ranks each;
alpha_i and beta_i are constants of the links inside a node, alpha_b and beta_b of the links between nodes, beta in
seconds per byte of one rank. Collectives are hierarchical: first inside nodes, then between ranks with the same local
rank, each on its 1/g of the data:

    reduce-scatter or all-gather   (g-1) alpha_i + (g-1)/g M beta_i + (N-1) alpha_b + (N-1)/N M/g beta_b
    all-reduce                     2 (g-1) alpha_i + 2 (g-1)/g M beta_i + between
                         between:  2 (N-1) alpha_b + 2 (N-1)/N M/g beta_b              ring (Patarasu & Yuan 2009), or
                                   2 ceil(log2 N) alpha_b + 2 M/g beta_b               two trees (Sanders et al. 2009),
                                   whichever is faster
    all-to-all                     (g-1) alpha_i + (R-g) alpha_b + the bytes sent, spread evenly over the other ranks

The bytes sent by a rank are the same as without hierarchy: (R-1)/R M, and twice that for an all-reduce.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gengap_dist.config.measures import Strategy
from gengap_dist.distributed.batch_plan import share
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.probes.layer_view import LayerView
from gengap_dist.probes.spectra.accumulate import redistribution_blocks
from gengap_dist.probes.spectra.gram import BUCKET_BYTES
from gengap_dist.probes.spectra.measure import ColumnBlock, stream_bytes

MIB = 2**20
DDP_BUCKETS = (MIB, 25 * MIB)  # torch's defaults: the first bucket, and each of the others

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


@dataclass(frozen=True)
class Message:
    """The data that a rank passes to collectives of one kind."""

    what: str
    operation: Operation
    num_bytes: int
    """Sum of M over all of them; for all-to-all: the maximum over ranks of the bytes sent or received."""
    times: int = 1
    """Number of collectives."""
    ranks: Cluster | None = None
    """Those that take part; None: all."""

    def on_wire(self, num_ranks: int) -> int:
        """Bytes sent by a rank; for all-to-all, by the rank that sends most.

        >>> Message("gradients", "all-reduce", 100).on_wire(4)
        150
        """
        if self.operation == "all-to-all":
            return self.num_bytes
        num_ranks = self.ranks.num_ranks if self.ranks else num_ranks
        num_phases = 2 if self.operation == "all-reduce" else 1
        return num_phases * self.num_bytes * (num_ranks - 1) // num_ranks


@dataclass(frozen=True)
class Link:
    """Constants of one kind of link."""

    alpha: float
    """Seconds per message."""
    beta: float
    """Seconds per byte of one rank."""


def collective_seconds(message: Message, cluster: Cluster, inside: Link, between: Link) -> float:
    """Seconds that the collectives of `message` take; formulas: module docstring.

    >>> link = Link(alpha=1.0, beta=0.01)
    >>> collective_seconds(Message("", "all-reduce", 100), Cluster(1, 2), link, link)  # 2 alpha + M beta
    3.0
    >>> collective_seconds(Message("", "all-reduce", 100), Cluster(2, 1), link, link)
    3.0
    """
    cluster = message.ranks or cluster
    g, n, num_ranks = cluster.gpus_per_node, cluster.nodes, cluster.num_ranks
    each = message.num_bytes / max(message.times, 1)
    if num_ranks == 1:
        return 0.0
    if message.operation == "all-to-all":
        near, far = (g - 1) / (num_ranks - 1), (num_ranks - g) / (num_ranks - 1)
        latency = (g - 1) * inside.alpha + (num_ranks - g) * between.alpha
        return message.times * (latency + each * (near * inside.beta + far * between.beta))
    within = (g - 1) * inside.alpha + (g - 1) / g * each * inside.beta
    ring = (n - 1) * between.alpha + (n - 1) / n * each / g * between.beta
    if message.operation != "all-reduce":
        return message.times * (within + ring)
    trees = math.ceil(math.log2(n)) * between.alpha + each / g * between.beta
    return message.times * 2 * (within + (min(ring, trees) if n > 1 else 0.0))


def step_messages(strategy: Strategy, gradient_bytes: int, parameter_bytes: int, num_micro: int) -> list[Message]:
    """The messages of one step, by strategy; empty on one rank.

    ddp, zero0: gradients are all-reduced once. zero1, zero2: DeepSpeed also all-reduces whole buckets of gradients
    (stage 2 after every micro-batch), each rank keeps its shard, and updated parameters are gathered. zero3, fsdp:
    parameters are gathered for forward and again for backward, and gradients reduce-scattered, in every micro-batch:
    three times the parameters, while ddp sends twice (Rajbhandari et al. 2020, section 7).

    >>> [(m.operation, m.num_bytes) for m in step_messages("zero2", 8, 8, num_micro=2)]
    [('all-reduce', 16), ('all-gather', 8)]
    """
    capabilities = CAPABILITIES[strategy]
    match capabilities.traffic:
        case "none":
            return []
        case "all-reduce and all-gather":
            rounds = num_micro if capabilities.sends_every_micro_batch else 1
            return [
                Message("gradients", "all-reduce", rounds * gradient_bytes, rounds),
                Message("parameters", "all-gather", parameter_bytes),
            ]
        case "all-gather and reduce-scatter":
            return [
                Message("parameters", "all-gather", 2 * num_micro * parameter_bytes, 2 * num_micro),
                Message("gradients", "reduce-scatter", num_micro * gradient_bytes, num_micro),
            ]
        case "all-reduce":
            first, each = DDP_BUCKETS
            buckets = 1 + max(0, math.ceil((gradient_bytes - first) / each))
            return [Message("gradients", "all-reduce", gradient_bytes, buckets)]


def hybrid_messages(messages: Sequence[Message], cluster: Cluster, shard_size: int) -> list[Message]:
    """The messages of a step with launch.shard_size: those of a group, and an all-reduce of its sums over the groups.

    >>> step = step_messages("fsdp", 8, 8, num_micro=1)
    >>> [(m.operation, m.num_bytes, m.on_wire(4)) for m in hybrid_messages(step, Cluster(2, 2), shard_size=2)]
    [('all-gather', 16, 8), ('reduce-scatter', 8, 4), ('all-reduce', 4, 4)]
    """
    group, replicas = cluster.shard_group(shard_size), cluster.replicas(shard_size)
    return [replace(message, ranks=group) for message in messages] + [
        replace(message, operation="all-reduce", num_bytes=message.num_bytes // shard_size, ranks=replicas)
        for message in messages
        if message.operation == "reduce-scatter"
    ]


def probe_messages(
    layer_views: Sequence[LayerView],
    passes: Sequence[Sequence[ColumnBlock]],
    counts: Sequence[int],
    *,
    num_ranks: int,
    input_size: int,
    num_leaves: int,
    method: str,
    memory_mib: int,
    device_type: str,
    num_centrings: int = 2,
) -> list[Message]:
    """The messages of one near-rank-loss measurement (`probes.spectra.measure`); empty on one rank.

    Args:
        layer_views: the measured layers.
        passes: column blocks that each pass over the probe samples measures, from `measure.plan_passes`.
        counts: probe samples on each of the first ranks; the others have none.
        num_ranks: number of all ranks.
        input_size: numbers in one sample.
        num_leaves: modules of the network without children.
        method: probe.method.
        memory_mib: probe.memory_mib.
        device_type: cpu or cuda; it determines the block size.
        num_centrings: 1 for raw, 2 for raw and centred.
    """
    if num_ranks == 1:
        return []
    block_bytes = stream_bytes(device_type, memory_mib)
    rows = dict(enumerate(counts))
    rows.setdefault(num_ranks - 1, 0)  # of the ranks without samples it receives most: the larger share of each block
    sent, received, num_redistributions_total = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0), 0
    for column_block in (
        column_block
        for column_blocks in passes
        for column_block in column_blocks
        if layer_views[column_block.view_index].is_wide
    ):
        view = layer_views[column_block.view_index]
        row_bytes = view.rows_per_input * view.dtype.itemsize
        num_columns = column_block.stop - column_block.start
        blocks = redistribution_blocks(num_columns, view.num_rows, num_ranks, block_bytes)
        for size, times in Counter(block.size for block in blocks).items():
            for rank, num in rows.items():
                own = share(size, num_ranks, rank).size
                sent[rank] += times * row_bytes * num * (size - own)
                received[rank] += times * row_bytes * (sum(counts) - num) * own
        num_redistributions_total += len(blocks)
    sizes_of_passes = [len({layer_views[block.view_index].layer.name for block in blocks}) for blocks in passes]
    sizes_of_passes[0] = len({view.layer.name for view in layer_views})  # the first pass checks all layers
    num_means = sum(2 if view.is_wide else view.num_units + 1 for view in layer_views)
    num_values = sum(
        min(view.num_units, view.num_rows - centred) for view in layer_views for centred in range(num_centrings)
    )
    messages = [
        Message("sample counts and traced samples", "all-reduce", 8 * (num_ranks + 10 + 2 * input_size), 3),
        Message(
            "layers that ran", "all-reduce", 8 * (3 + num_leaves + len(passes) + sum(sizes_of_passes)), 2 + len(passes)
        ),
        Message("means", "all-reduce", 8 * num_means, len(passes)),
        Message("singular values", "all-reduce", 8 * num_values, len(passes)),
    ]
    if num_redistributions_total:
        busiest = max(*sent.values(), *received.values())
        messages.append(Message("columns of wide layers", "all-to-all", busiest, num_redistributions_total))
    if method == "tsqr":  # rank 0 receives from one rank at each level of the tree, then broadcasts the result
        triangle_bytes, levels = 8 * sum(view.size**2 for view in layer_views), math.ceil(math.log2(num_ranks))
        messages.append(
            Message("triangles up the tree", "all-to-all", levels * triangle_bytes, levels * len(layer_views))
        )
        return [*messages, Message("triangles", "all-reduce", triangle_bytes, len(layer_views))]
    packed_bytes = 8 * sum(view.size * (view.size + 1) // 2 for view in layer_views)
    times = max(len(passes), -(-packed_bytes // BUCKET_BYTES))
    return [*messages, Message("packed triangles", "all-reduce", packed_bytes, times)]
