"""The fastest of several sizes of micro-batches: upwards until larger ones gain nothing, then the best take turns.

All ranks compute at once, and the slowest counts. What is decided here is decided by times that all ranks know, never
by a rank's own clock: all take the same turns.
"""

import math
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import nn

from gengap_dist.batching import BatchPlan
from gengap_dist.checks import strategy_name
from gengap_dist.config import RunConfig
from gengap_dist.planning.memory import SHARDING
from gengap_dist.planning.rehearsal import Rehearsal, most, timed
from gengap_dist.world import World

SMALLEST = 16  # smaller ones are tried only where nothing else fits
GAIN = 1.02  # two sizes in a row that gain less end the climb
CLOSE = 1.1  # within so much of the best: takes part in the last rounds
TURN_SECONDS, ROUNDS_SECONDS = 0.1, 1.5  # of one size; of the last rounds, of which there are at least 2
LONG_SECONDS = 1.0  # of a pass: what it costs besides its images is lost in that, larger ones cannot gain
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED", "could not create a memory")


def images_per_second(
    rehearsal: Rehearsal, config: RunConfig, share: int, sizes: Sequence[int], world: World
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

    def passes(size: int, times: int) -> float:
        """Seconds of one; infinite if it does not fit on every rank."""
        return most(_turn(rehearsal, cuts[size], times, world), world) + talking

    def first(size: int) -> float:
        took = passes(size, 1)  # some of it is spent on what only a first pass needs
        return passes(size, _times(took)) if took < LONG_SECONDS else took

    took: dict[int, list[float]] = {}

    def cost(size: int) -> float:
        """Seconds of an image."""
        return median(took[size]) / cuts[size]

    above = [size for size in sizes if size >= SMALLEST] or [sizes[-1]]
    best, flat = math.inf, 0
    for size in above:
        seconds = first(size)
        if seconds == math.inf:
            break
        took[size] = [seconds]
        flat = 0 if cost(size) * GAIN < best else flat + 1
        best = min(best, cost(size))
        if flat == 2 or seconds > LONG_SECONDS:
            break
    for size in () if took else [size for size in reversed(sizes) if size < above[0]]:
        if (seconds := first(size)) < math.inf:
            took[size] = [seconds]
            break
    close = [size for size in took if cost(size) < CLOSE * best]
    round_seconds = sum(max(TURN_SECONDS, *took[size]) for size in close)
    again: dict[int, list[float]] = {size: [] for size in close}
    for number in range(max(2, round(ROUNDS_SECONDS / round_seconds)) if len(close) > 1 else 0):
        for size in close if number % 2 else reversed(close):
            again[size].append(passes(size, _times(*took[size])))
    took |= {size: seconds for size, seconds in again.items() if seconds}
    return {size: round(1 / cost(size), 1) for size in took}


def _largest(share: int, size: int, ghost_size: int | None) -> int:
    """Images in the largest micro-batch of a share.

    >>> _largest(100, 64, None), _largest(100, 40, ghost_size=20)
    (50, 40)
    """
    return max(span.size for span in BatchPlan(share, 1, size, ghost_size).micro_batches(0))


def _times(seconds: float) -> int:
    return max(1, round(TURN_SECONDS / seconds))


def _turn(rehearsal: Rehearsal, num_images: int, times: int, world: World) -> float:
    """Seconds of one of several passes on this rank; infinite if it runs out of memory. Collective."""

    def job() -> None:
        for _ in range(times):
            rehearsal.micro_batch(num_images)

    took = math.inf
    try:
        took = timed(job, world) / times  # ranks meet before it, never in it: one that fails leaves nobody waiting
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
            raise
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
    turns = [most(timed(partial(world.sum, weights), world), world) for _ in range(4)]
    return median(turns[1:]) * (1.5 if sharding.parameters else 1.0)
