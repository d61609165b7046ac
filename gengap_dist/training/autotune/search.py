"""The fastest of several sizes of micro-batches: upwards until larger ones gain nothing, then the best take turns.

All ranks compute at once, and the slowest counts; of a size's turns the quickest does: whatever else a machine has to
do can only take time away. Decisions are made by times that all ranks know, or by rank 0's word: all take the same
turns.
"""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.memory_model import SHARDING
from gengap_dist.parallel.out_of_memory import is_out_of_memory, library_message
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, most, timed
from gengap_dist.training.checks import strategy_name

SMALLEST = 16  # smaller ones are tried only where nothing else fits
GAIN = 1.02  # two sizes in a row that gain less end the climb
CLOSE = 1.1  # within so much of the best: takes part in the last rounds
TURN_SECONDS, ROUNDS_SECONDS = 0.05, 1.5  # of one size; of the last rounds, of which there are at least 2
LONG_SECONDS = 1.0  # of a pass: what it costs besides its images is lost in that, larger ones cannot gain


def images_per_second(
    rehearsal: SyntheticWorkload, config: RunConfig, share: int, sizes: Sequence[int], world: World
) -> dict[int, float]:
    """By size, those that were tried: images per second of the slowest rank; empty if none fits. Collective.

    Args:
        rehearsal: the passes.
        config: the run.
        share: the most images that a rank has of a step: each size cuts it into nearly equal micro-batches.
        sizes: rising.
        world: the ranks.
    """
    talking = _talking(config, rehearsal.strategy.model, world)
    cuts = {size: _largest(share, size, config.batch.ghost_size) for size in sizes}
    took: dict[int, float] = {}  # seconds of an image, the least of all turns
    latest: dict[int, float] = {}  # seconds of a pass

    def turn(size: int) -> None:
        times = max(1, round(TURN_SECONDS / latest[size])) if size in latest else 1
        latest[size] = most(turn_seconds(rehearsal, cuts[size], times, world), world) + talking
        seconds = latest[size] / cuts[size]
        took[size] = seconds if seconds == math.inf else min(seconds, took.get(size, math.inf))

    def fits(size: int) -> bool:
        turn(size)  # some of it goes into what only a first pass needs
        if took[size] < math.inf:
            for _ in range(3 if latest[size] < LONG_SECONDS else 1):
                turn(size)
        return took[size] < math.inf

    above = [size for size in sizes if size >= SMALLEST] or [sizes[-1]]
    best, flat = math.inf, 0
    for size in above:
        if not fits(size):
            break
        flat = 0 if took[size] * GAIN < best else flat + 1
        best = min(best, took[size])
        if flat == 2 or took[size] * cuts[size] > LONG_SECONDS:
            break
    below = [size for size in sizes if size < above[0]] if took[above[0]] == math.inf else []
    while below and not fits(below.pop()):
        pass
    close = [size for size in took if took[size] < CLOSE * best]
    until, rounds = time.monotonic() + ROUNDS_SECONDS, 0
    while len(close) > 1 and (rounds < 2 or world.broadcast_int(time.monotonic() < until)):
        for size in close if rounds % 2 else reversed(close):
            turn(size)
        rounds += 1
    return {size: round(1 / seconds, 1) for size, seconds in took.items() if seconds < math.inf}


def _largest(share: int, size: int, ghost_size: int | None) -> int:
    """Images in the largest micro-batch of a share.

    >>> _largest(100, 64, None), _largest(100, 40, ghost_size=20)
    (50, 40)
    """
    return max(span.size for span in BatchPlan(share, 1, size, ghost_size).micro_batches(0))


def turn_seconds(rehearsal: SyntheticWorkload, num_images: int, times: int, world: World) -> float:
    """Seconds of one of several passes on this rank; infinite if it runs out of memory. Collective."""

    def job() -> None:
        for _ in range(times):
            rehearsal.micro_batch(num_images)

    took = math.inf
    try:
        took = timed(job, world) / times  # ranks meet before it, never in it: one that fails leaves nobody waiting
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rehearsal.refused = library_message(error)
    if took == math.inf and world.device.type == "cuda":
        torch.cuda.empty_cache()
    return took


def _talking(config: RunConfig, model: nn.Module, world: World) -> float:
    """Seconds that ranks talk in every pass, where a strategy shards gradients (an all-reduce) or parameters.

    Parameters are gathered twice and gradients scattered once, each of which takes half as long as an all-reduce.
    """
    sharding = SHARDING[strategy_name(config, world.size)]
    if world.size == 1 or not sharding.gradients:
        return 0.0
    weights = torch.zeros(sum(p.numel() for p in model.parameters()), device=world.device)
    return min(most(timed(partial(world.all_reduce, weights), world), world) for _ in range(3)) * (
        1.5 if sharding.parameters else 1.0
    )
