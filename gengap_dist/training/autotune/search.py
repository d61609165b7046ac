"""Finds the fastest of several micro-batch sizes: increase until there is no gain, then alternate between the best.

All ranks run at once, and the slowest rank counts. The fastest run of each size counts, because other load can
only slow a run down. Decisions use times that all ranks share, or are made by rank 0, so that all do the same runs.
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
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.out_of_memory import is_out_of_memory, library_message
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, max_over_ranks, timed
from gengap_dist.training.checks import strategy_name

SMALLEST_SIZE = 16  # smaller sizes are tried only if no larger one fits
MIN_GAIN = 1.02  # the search ends after two consecutive sizes with a smaller gain
FINALIST_RATIO = 1.1  # sizes within this ratio of the best take part in the final rounds
TURN_SECONDS, ROUNDS_SECONDS = 0.05, 1.5  # of one size; of the final rounds, at least 2
LONG_SECONDS = 1.0  # of a pass: fixed costs are negligible, larger sizes cannot gain


def samples_per_second(
    workload: SyntheticWorkload, config: RunConfig, share: int, sizes: Sequence[int], world: World
) -> dict[int, float]:
    """Samples per second of the slowest rank, by measured size; empty if none fits. Collective.

    Args:
        workload: the passes to measure.
        config: the run.
        share: maximum number of samples of a rank in a step; each size splits it into nearly equal micro-batches.
        sizes: ascending.
        world: the ranks.
    """
    communication_seconds = _communication_seconds(config, workload.strategy.model, world)
    largest_micro_batch = {size: _largest(share, size, config.batch.ghost_size) for size in sizes}
    seconds_per_sample: dict[int, float] = {}  # minimum of all runs
    seconds_per_pass: dict[int, float] = {}  # seconds per pass

    def measure(size: int) -> None:
        times = max(1, round(TURN_SECONDS / seconds_per_pass[size])) if size in seconds_per_pass else 1
        seconds_per_pass[size] = (
            max_over_ranks(pass_seconds(workload, largest_micro_batch[size], times, world), world)
            + communication_seconds
        )
        seconds = seconds_per_pass[size] / largest_micro_batch[size]
        seconds_per_sample[size] = (
            seconds if seconds == math.inf else min(seconds, seconds_per_sample.get(size, math.inf))
        )

    def fits(size: int) -> bool:
        measure(size)  # includes warm-up of the first pass
        if seconds_per_sample[size] < math.inf:
            for _ in range(3 if seconds_per_pass[size] < LONG_SECONDS else 1):
                measure(size)
        return seconds_per_sample[size] < math.inf

    regular_sizes = [size for size in sizes if size >= SMALLEST_SIZE] or [sizes[-1]]
    best, num_without_gain = math.inf, 0
    for size in regular_sizes:
        if not fits(size):
            break
        num_without_gain = 0 if seconds_per_sample[size] * MIN_GAIN < best else num_without_gain + 1
        best = min(best, seconds_per_sample[size])
        if num_without_gain == 2 or seconds_per_sample[size] * largest_micro_batch[size] > LONG_SECONDS:
            break
    small_sizes = (
        [size for size in sizes if size < regular_sizes[0]] if seconds_per_sample[regular_sizes[0]] == math.inf else []
    )
    while small_sizes and not fits(small_sizes.pop()):
        pass
    finalists = [size for size in seconds_per_sample if seconds_per_sample[size] < FINALIST_RATIO * best]
    deadline, rounds = time.monotonic() + ROUNDS_SECONDS, 0
    while len(finalists) > 1 and (rounds < 2 or world.broadcast_int(time.monotonic() < deadline)):
        for size in finalists if rounds % 2 else reversed(finalists):
            measure(size)
        rounds += 1
    return {size: round(1 / seconds, 1) for size, seconds in seconds_per_sample.items() if seconds < math.inf}


def _largest(share: int, size: int, ghost_size: int | None) -> int:
    """Images in the largest micro-batch of a share.

    >>> _largest(100, 64, None), _largest(100, 40, ghost_size=20)
    (50, 40)
    """
    return max(span.size for span in BatchPlan(share, 1, size, ghost_size).micro_batches(0))


def pass_seconds(workload: SyntheticWorkload, num_samples: int, num_passes: int, world: World) -> float:
    """Mean seconds of `num_passes` passes on this rank; infinite if it runs out of memory. Collective."""

    def job() -> None:
        for _ in range(num_passes):
            workload.micro_batch(num_samples)

    seconds_per_sample = math.inf
    try:
        seconds_per_sample = (
            timed(job, world) / num_passes
        )  # no collectives inside the job: a failing rank blocks no other rank
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        workload.out_of_memory_message = library_message(error)
    if seconds_per_sample == math.inf and world.device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds_per_sample


def _communication_seconds(config: RunConfig, model: nn.Module, world: World) -> float:
    """Seconds of communication per pass, if the strategy shards gradients (an all-reduce) or parameters.

    Parameters are gathered twice and gradients scattered once; each takes half as long as an all-reduce.
    """
    sharding = CAPABILITIES[strategy_name(config, world.size)].sharding
    if world.size == 1 or not sharding.gradients:
        return 0.0
    weights = torch.zeros(sum(p.numel() for p in model.parameters()), device=world.device)
    return min(max_over_ranks(timed(partial(world.all_reduce, weights), world), world) for _ in range(3)) * (
        1.5 if sharding.parameters else 1.0
    )
