"""`train.channels_last=auto`: chooses the faster memory format of images; measured once and cached.

Both formats give the same results up to rounding. Which is faster depends on the network and on the machine.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.training.autotune.cache import MemoryFormat, as_run_info, lookup, store
from gengap_dist.training.autotune.micro_batch import Workload, cache_key, candidates, describe_workload, hardware_of
from gengap_dist.training.autotune.search import pass_seconds
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, max_over_ranks
from gengap_dist.training.checks import strategy_name

MIN_SPEEDUP = 1.03  # required of channels_last, which is not the default
MAX_SAMPLES = 128  # per pass
MIN_ROUNDS, ROUNDS_SECONDS = 3, 1.5
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def resolve_memory_format(
    config: RunConfig, workload: Workload, world: World, previous: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config with true or false for train.channels_last, and how it was chosen; None if it was set. Collective.

    The network and random states are not changed: uncompiled copies of the network are measured.

    Args:
        config: the run.
        workload: its network, unsharded, and its task.
        world: the ranks.
        previous: the choice saved in run.json, if the run is resumed; the value on rank 0 is used.
    """
    if config.train.channels_last != "auto":
        return config, None
    convolves = any(isinstance(module, CONVOLUTIONS) for module in workload.model.modules())
    if not convolves or "channels_last" not in CAPABILITIES[strategy_name(config, world.size)].switches:
        return with_memory_format(config, False), {"by": "there is no choice", "channels_last": False}
    description = describe_workload(config, workload, hardware_of(world))
    key = cache_key(description)
    cached = lookup(MemoryFormat, key, previous) if world.rank == 0 else {}
    if cached_choice := world.broadcast_int({False: 1, True: 2}.get(cached.get("channels_last", ""), 0)):
        return with_memory_format(config, cached_choice == 2), cached
    gpus = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), world.timer.phase("other", "choosing train.channels_last"):
        rates = _samples_per_second(config, workload, world)
    world.timer.pop_seconds()  # exclude this time from the run
    use_channels_last = bool(world.broadcast_int(rates[True] > MIN_SPEEDUP * rates[False]))
    result = MemoryFormat(
        channels_last=use_channels_last, samples_per_second=(rates[False], rates[True]), where=description
    )
    if world.rank == 0:
        store(key, result)
    return with_memory_format(config, use_channels_last), as_run_info(result, key, "measurement")


def with_memory_format(config: RunConfig, channels_last: bool) -> RunConfig:
    """The config with `channels_last` for train.channels_last."""
    return config.model_copy(update={"train": config.train.model_copy(update={"channels_last": channels_last})})


def _samples_per_second(config: RunConfig, workload: Workload, world: World) -> dict[bool, float]:
    """Best rate of the slowest rank, by train.channels_last; all ranks run at once, formats alternate. Collective."""
    micro, sizes = config.batch.micro_size, candidates(config, world.size)
    most_samples = MAX_SAMPLES if micro == "auto" else min(micro, MAX_SAMPLES)
    size = max([size for size in sizes if size <= most_samples], default=sizes[0])
    synthetic: dict[bool, SyntheticWorkload] = {}
    for channels_last in (False, True):
        train = config.train.model_copy(update={"compile": False, "channels_last": channels_last})
        plain = config.model_copy(update={"train": train})
        dtype = getattr(torch, train.dtype)
        model = models.from_config(plain, workload.task.spec, World()).to(world.device, dtype)
        synthetic[channels_last] = SyntheticWorkload(plain, model, workload.task, world.device)
    best_seconds = dict.fromkeys(synthetic, math.inf)
    deadline, rounds = math.inf, 0
    while rounds <= MIN_ROUNDS or world.broadcast_int(time.monotonic() < deadline):
        for channels_last in sorted(synthetic, reverse=bool(rounds % 2)):
            seconds = max_over_ranks(pass_seconds(synthetic[channels_last], size, 1, world), world)
            if rounds:  # the first round is warm-up
                best_seconds[channels_last] = min(best_seconds[channels_last], seconds)
        rounds += 1
        deadline = time.monotonic() + ROUNDS_SECONDS if rounds == 1 else deadline
    return {
        channels_last: round(size / seconds, 1) for channels_last, seconds in best_seconds.items()
    }  # 0 if out of memory
