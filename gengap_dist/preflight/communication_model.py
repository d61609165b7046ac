"""What ranks send each other, and how long that takes in the alpha-beta model.

A message of M bytes takes alpha + beta M (Hockney 1994). R ranks stand g to a node on N = R / g nodes; alpha_i, beta_i
are of the links inside a node, alpha_b, beta_b of those between nodes, beta in seconds per byte of one rank.
Collectives work by level, first inside nodes, then between ranks in the same place of every node, each on its 1/g of
the data:

    reduce-scatter or all-gather   (g-1) alpha_i + (g-1)/g M beta_i + (N-1) alpha_b + (N-1)/N M/g beta_b
    all-reduce                     2 (g-1) alpha_i + 2 (g-1)/g M beta_i + between
                         between:  2 (N-1) alpha_b + 2 (N-1)/N M/g beta_b              ring (Patarasu & Yuan 2009), or
                                   2 ceil(log2 N) alpha_b + 2 M/g beta_b               two trees (Sanders et al. 2009),
                                   whichever is sooner
    all-to-all                     (g-1) alpha_i + (R-g) alpha_b + the bytes sent, spread evenly over the other ranks

What a rank puts on the wire is the same as without levels: (R-1)/R M, and twice that for an all-reduce.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gengap_dist.distributed.batch_plan import split
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.probes.layer_view import LayerView
from gengap_dist.probes.spectra.accumulate import num_redistributions
from gengap_dist.probes.spectra.gram import BUCKET_BYTES
from gengap_dist.probes.spectra.measure import ColumnBlock, stream_bytes

MIB = 2**20
DDP_BUCKETS = (MIB, 25 * MIB)  # torch's own: the first, and each of the others

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


@dataclass(frozen=True)
class Message:
    """What a rank gives to collectives of one kind."""

    what: str
    operation: Operation
    num_bytes: int
    """M of all of them together; all-to-all: the most that any rank sends to others, or receives."""
    times: int = 1
    """Number of collectives."""

    def on_wire(self, num_ranks: int) -> int:
        """Bytes that a rank sends; in an all-to-all, the busiest.

        >>> Message("gradients", "all-reduce", 100).on_wire(4)
        150
        """
        if self.operation == "all-to-all":
            return self.num_bytes
        turns_round = 2 if self.operation == "all-reduce" else 1
        return turns_round * self.num_bytes * (num_ranks - 1) // num_ranks


@dataclass(frozen=True)
class Link:
    """Constants of one kind of link."""

    alpha: float
    """Seconds per message."""
    beta: float
    """Seconds per byte of one rank."""


def seconds(message: Message, cluster: Cluster, inside: Link, between: Link) -> float:
    """Time that the collectives of `message` take; see the head of this file.

    >>> link = Link(alpha=1.0, beta=0.01)
    >>> seconds(Message("", "all-reduce", 100), Cluster(1, 2), link, link)  # 2 alpha + M beta
    3.0
    >>> seconds(Message("", "all-reduce", 100), Cluster(2, 1), link, link)
    3.0
    """
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


def step_messages(strategy: str, gradient_bytes: int, parameter_bytes: int, num_micro: int) -> list[Message]:
    """What one step sends, by strategy; nothing on one rank.

    ddp, zero0: gradients are all-reduced once. zero1, zero2: DeepSpeed all-reduces whole buckets of gradients, too
    (stage 2 after every micro-batch), each rank keeps its share, and updated parameters are gathered. zero3, fsdp:
    parameters are gathered for forward and again for backward, and gradients reduce-scattered, in every micro-batch:
    three times the parameters, where ddp sends two (Rajbhandari et al. 2020, section 7).

    >>> [(m.operation, m.num_bytes) for m in step_messages("zero2", 8, 8, num_micro=2)]
    [('all-reduce', 16), ('all-gather', 8)]
    """
    match strategy:
        case "single":
            return []
        case "zero1" | "zero2":
            rounds = num_micro if strategy == "zero2" else 1
            return [
                Message("gradients", "all-reduce", rounds * gradient_bytes, rounds),
                Message("parameters", "all-gather", parameter_bytes),
            ]
        case "zero3" | "fsdp":
            return [
                Message("parameters", "all-gather", 2 * num_micro * parameter_bytes, 2 * num_micro),
                Message("gradients", "reduce-scatter", num_micro * gradient_bytes, num_micro),
            ]
    first, each = DDP_BUCKETS
    return [Message("gradients", "all-reduce", gradient_bytes, 1 + max(0, math.ceil((gradient_bytes - first) / each)))]


def probe_messages(
    sites: Sequence[LayerView],
    passes: Sequence[Sequence[ColumnBlock]],
    counts: Sequence[int],
    *,
    method: str,
    memory_mib: int,
    device_type: str,
    num_centrings: int = 2,
) -> list[Message]:
    """What one near-rank-loss measurement sends, as `probes.rank_loss.measure` does it; nothing on one rank.

    Args:
        sites: layers in their views.
        passes: what each pass over the probe images measures, from `rank_loss.plan`.
        counts: probe images of every rank.
        method: probe.method.
        memory_mib: probe.memory_mib.
        device_type: cpu or cuda, which differ in the size of blocks.
        num_centrings: raw, or raw and centred.
    """
    num_ranks = len(counts)
    if num_ranks == 1:
        return []
    block_bytes = stream_bytes(device_type, memory_mib)
    rows = np.array(counts)
    sent, received, num_turns = np.zeros_like(rows), np.zeros_like(rows), 0
    for piece in (piece for pieces in passes for piece in pieces if sites[piece.site].wide):
        site = sites[piece.site]
        row_bytes = site.rows_each * site.dtype.itemsize
        for block in num_redistributions(piece.stop - piece.start, site.num_rows, num_ranks, block_bytes):
            shares = np.array([share.size for share in split(block.size, num_ranks)])
            sent += row_bytes * rows * (block.size - shares)
            received += row_bytes * (rows.sum() - rows) * shares
            num_turns += 1
    facts = sum(1 if site.wide else site.num_units + 1 for site in sites)
    values = num_centrings * sum(min(site.num_units, site.num_rows) for site in sites)
    found = [
        Message("who has images", "all-reduce", 8 * (num_ranks + 10), 2),
        Message("means", "all-reduce", 8 * facts, len(passes)),
        Message("singular values", "all-reduce", 8 * values, len(passes)),
    ]
    if num_turns:
        busiest = int(max(sent.max(), received.max()))
        found.append(Message("columns of wide layers", "all-to-all", busiest, num_turns))
    if method == "tsqr":  # rank 0 receives from one rank at every level of the tree, then all get its result
        squares, levels = 8 * sum(site.size**2 for site in sites), math.ceil(math.log2(num_ranks))
        found.append(Message("triangles up the tree", "all-to-all", levels * squares, levels * len(sites)))
        return [*found, Message("triangles", "all-reduce", squares, len(sites))]
    triangles = 8 * sum(site.size * (site.size + 1) // 2 for site in sites)
    times = max(len(passes), -(-triangles // BUCKET_BYTES))
    return [*found, Message("packed triangles", "all-reduce", triangles, times)]
