"""Training passes over random images, timed on all ranks at once, because ranks share cores and memory."""

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

MIN_REPEATS, MIN_SECONDS = 5, 1.0  # of a median
NUM_IMAGES = 64  # reused by all passes


class SyntheticWorkload:
    """The passes of one rank, without communication, on a separate network."""

    def __init__(
        self, config: RunConfig, model: nn.Module, in_channels: int, num_classes: int, device: torch.device
    ) -> None:
        """Passes of `model`, which is on `device`, over images augmented according to `config`."""
        self.batches = random_batches(config, in_channels, num_classes, NUM_IMAGES, device)
        self.out_of_memory_message = ""
        """The library's message when a pass of this rank last ran out of memory."""
        self.strategy = Single(config, World(device=device))
        self.strategy.setup(model.train(), partial(build_optimizer, config.optim))
        # weights are not changed; momentum costs as in a run, but does not decay to slow denormal numbers
        self.strategy.set_rates(0.0, 1.0 if config.optim.momentum else 0.0)

    def micro_batch(self, size: int) -> None:
        """Forward and backward pass of `size` images."""
        self.strategy.begin_step(size)
        step_batch = StepBatch(torch.arange(size) % NUM_IMAGES, 0, [Span(0, size)])
        accumulate(self.strategy, self.batches, step_batch, PLAIN_OBJECTIVE)

    def update(self) -> None:
        """Gradient norm and optimizer step."""
        self.strategy.step()


def random_batches(
    config: RunConfig, in_channels: int, num_classes: int, num_images: int, device: torch.device
) -> BatchLoader:
    """Batches of `num_images` random images with the shape that `config` gives, on `device`."""
    side, mean = config.data.image_size, torch.full((in_channels,), 127.0, dtype=torch.float64)
    pixels = torch.randint(256, (num_images, in_channels, side, side), dtype=torch.uint8)
    images = Images(pixels, torch.arange(num_images) % num_classes).to(device)
    splits = Splits(images, images, images, num_classes, mean, mean)
    return BatchLoader(images, Normalise(splits, device, getattr(torch, config.train.dtype)), config.data, config.seed)


def timed(job: Callable[[], object], world: World) -> float:
    """Seconds that `job` takes on this rank; all ranks start together. Collective."""
    world.barrier()
    synchronise(world)
    start = time.perf_counter()
    job()
    synchronise(world)
    return time.perf_counter() - start


def max_over_ranks(value: float, world: World) -> float:
    """The maximum of `value` over ranks. Collective."""
    by_rank = torch.zeros(world.size, dtype=torch.float64)
    by_rank[world.rank] = value
    return float(world.all_reduce(by_rank).max())


def median_seconds(job: Callable[[], object], world: World) -> float:
    """Median seconds of `job` on the slowest rank; all ranks run it equally often. Collective."""
    job()
    seconds: list[float] = []
    start_time = time.monotonic()
    enough = False
    while not enough:
        seconds.append(timed(job, world))
        enough = bool(world.broadcast_int(len(seconds) >= MIN_REPEATS and time.monotonic() - start_time > MIN_SECONDS))
    return max_over_ranks(statistics.median(seconds), world)


def synchronise(world: World) -> None:
    """Wait until this rank's device has finished all its work."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
