"""Passes over random images, as training makes them, timed by all ranks at once: they share cores and memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader, Normalise
from gengap_dist.data.datasets import Images, Splits
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies import Single
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import PLAIN_OBJECTIVE, StepBatch, accumulate

LEAST_TIMES, LEAST_SECONDS = 5, 1.0  # of a median
NUM_IMAGES = 64  # that passes take theirs from, again and again


class SyntheticWorkload:
    """One rank's passes, which meet nobody's, with a network of their own."""

    def __init__(
        self, config: RunConfig, model: nn.Module, in_channels: int, num_classes: int, device: torch.device
    ) -> None:
        """Passes of `model`, which is on `device`, over images that are augmented as `config` says."""
        self.batches = random_batches(config, in_channels, num_classes, NUM_IMAGES, device)
        self.refused = ""
        """What a library said when a pass of this rank last ran out of memory."""
        self.strategy = Single(config, World(device=device))
        self.strategy.setup(model.train(), partial(build_optimizer, config.optim))
        # the weights stay; momentum costs what it does in a run, but does not decay: denormal numbers would be slow
        self.strategy.set_rates(0.0, 1.0 if config.optim.momentum else 0.0)

    def micro_batch(self, size: int) -> None:
        """Forward and backward of so many images."""
        self.strategy.begin_step(size)
        work = StepBatch(torch.arange(size) % NUM_IMAGES, 0, [Span(0, size)])
        accumulate(self.strategy, self.batches, work, PLAIN_OBJECTIVE)

    def update(self) -> None:
        """Gradient norm and optimizer step."""
        self.strategy.step()


def random_batches(
    config: RunConfig, in_channels: int, num_classes: int, num_images: int, device: torch.device
) -> BatchLoader:
    """Batches out of `num_images` random images like those of `config`, on `device`."""
    side, mean = config.data.image_size, torch.full((in_channels,), 127.0, dtype=torch.float64)
    pixels = torch.randint(256, (num_images, in_channels, side, side), dtype=torch.uint8)
    images = Images(pixels, torch.arange(num_images) % num_classes).to(device)
    splits = Splits(images, images, images, num_classes, mean, mean)
    return BatchLoader(images, Normalise(splits, device, getattr(torch, config.train.dtype)), config.data, config.seed)


def timed(job: Callable[[], object], world: World) -> float:
    """Seconds that `job` takes on this rank; ranks begin together. Collective."""
    world.barrier()
    synchronise(world)
    start = time.perf_counter()
    job()
    synchronise(world)
    return time.perf_counter() - start


def most(value: float, world: World) -> float:
    """The largest of what ranks say. Collective."""
    by_rank = torch.zeros(world.size, dtype=torch.float64)
    by_rank[world.rank] = value
    return float(world.all_reduce(by_rank).max())


def median_seconds(job: Callable[[], object], world: World) -> float:
    """Median time of `job` on the slowest rank. Collective; ranks take equally many turns."""
    job()
    took: list[float] = []
    began = time.monotonic()
    enough = False
    while not enough:
        took.append(timed(job, world))
        enough = bool(world.broadcast_int(len(took) >= LEAST_TIMES and time.monotonic() - began > LEAST_SECONDS))
    return most(statistics.median(took), world)


def synchronise(world: World) -> None:
    """Wait until this rank's device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
