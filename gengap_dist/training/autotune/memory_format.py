"""`train.channels_last=auto`: whichever order of pictures in memory is faster, measured once and remembered.

Both orders compute the same to rounding. Which is faster depends on the network and on the machine.
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
from gengap_dist.training.autotune.cache import MemoryFormat, as_fact, lookup, store
from gengap_dist.training.autotune.micro_batch import ModelShape, cache_key, candidates, described, hardware_of
from gengap_dist.training.autotune.search import turn_seconds
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, most
from gengap_dist.training.checks import strategy_name

LEAST_GAIN = 1.03  # for the order that is not torch's own
MOST_IMAGES = 128  # in a pass
LEAST_ROUNDS, ROUNDS_SECONDS = 3, 1.5
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def resolve_memory_format(
    config: RunConfig, network: ModelShape, world: World, before: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config with true or false for train.channels_last, and how that was found; None if it was so. Collective.

    The network and random states stay as they are: twins of the network are measured, not compiled.

    Args:
        config: the run.
        network: its network, whole.
        world: the ranks.
        before: how it was found when the run began, if it is resumed; rank 0's word holds.
    """
    if config.train.channels_last != "auto":
        return config, None
    convolves = any(isinstance(module, CONVOLUTIONS) for module in network.model.modules())
    if not convolves or strategy_name(config, world.size) not in ("single", "ddp"):
        return resolved_memory_format(config, False), {"by": "there is no choice", "channels_last": False}
    what = described(config, network, hardware_of(world))
    mark = cache_key(what)
    known = lookup(MemoryFormat, mark, before) if world.rank == 0 else {}
    if answer := world.broadcast_int({False: 1, True: 2}.get(known.get("channels_last", ""), 0)):
        return resolved_memory_format(config, answer == 2), known
    gpus = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), world.timer.phase("other", "choosing train.channels_last"):
        rates = _images_per_second(config, network, world)
    world.timer.pop_seconds()  # that time is not the run's
    faster = bool(world.broadcast_int(rates[True] > LEAST_GAIN * rates[False]))
    found = MemoryFormat(channels_last=faster, images_per_second=(rates[False], rates[True]), where=what)
    if world.rank == 0:
        store(mark, found)
    return resolved_memory_format(config, faster), as_fact(found, mark, "measurement")


def resolved_memory_format(config: RunConfig, channels_last: bool) -> RunConfig:
    """The config with that for train.channels_last."""
    return config.model_copy(update={"train": config.train.model_copy(update={"channels_last": channels_last})})


def _images_per_second(config: RunConfig, network: ModelShape, world: World) -> dict[bool, float]:
    """Of the slowest rank, at best, by train.channels_last; all compute at once, orders take turns. Collective."""
    micro, sizes = config.batch.micro_size, candidates(config, world.size)
    most_images = MOST_IMAGES if micro == "auto" else min(micro, MOST_IMAGES)
    size = max([size for size in sizes if size <= most_images], default=sizes[0])
    rehearsals: dict[bool, SyntheticWorkload] = {}
    for last in (False, True):
        train = config.train.model_copy(update={"compile": False, "channels_last": last})
        plain = config.model_copy(update={"train": train})
        dtype = getattr(torch, train.dtype)
        model = models.from_config(plain, network.num_classes, network.in_channels, World()).to(world.device, dtype)
        rehearsals[last] = SyntheticWorkload(plain, model, network.in_channels, network.num_classes, world.device)
    took = dict.fromkeys(rehearsals, math.inf)
    until, rounds = math.inf, 0
    while rounds <= LEAST_ROUNDS or world.broadcast_int(time.monotonic() < until):
        for last in sorted(rehearsals, reverse=bool(rounds % 2)):
            seconds = most(turn_seconds(rehearsals[last], size, 1, world), world)
            if rounds:  # the first goes into what only a first pass needs
                took[last] = min(took[last], seconds)
        rounds += 1
        until = time.monotonic() + ROUNDS_SECONDS if rounds == 1 else until
    return {last: round(size / seconds, 1) for last, seconds in took.items()}  # 0 if it does not fit
