"""Training passes over random samples, timed on all ranks at once, because ranks share cores and memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.datasets import PixelStatistics, Samples
from gengap_dist.distributed.batch_plan import Span
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies import Single
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import Objective, StepBatch, accumulate
from gengap_dist.training.tasks import Task

MIN_REPEATS, MIN_SECONDS = 5, 1.0  # of a median
NUM_SAMPLES = 64  # reused by all passes


class SyntheticWorkload:
    """The passes of one rank, without communication, on a separate network."""

    def __init__(self, config: RunConfig, model: nn.Module, task: Task, device: torch.device) -> None:
        """Passes of `model`, which is on `device`, over samples augmented according to `config`."""
        self.batches = random_batches(config, task.spec, NUM_SAMPLES, device)
        self.objective = Objective(task)
        self.out_of_memory_message = ""
        """The library's message when a pass of this rank last ran out of memory."""
        self.strategy = Single(config, World(device=device))
        self.strategy.setup(model.train(), partial(build_optimizer, config.scaled_optim))
        # weights are not changed; momentum costs as in a run, but does not decay to slow denormal numbers
        self.strategy.set_rates(0.0, 1.0 if config.optim.momentum else 0.0)

    def micro_batch(self, size: int) -> None:
        """Forward and backward pass of `size` samples."""
        self.strategy.begin_step(size)
        step_batch = StepBatch(torch.arange(size) % NUM_SAMPLES, 0, [Span(0, size)])
        accumulate(self.strategy, self.batches, step_batch, self.objective)

    def update(self) -> None:
        """Gradient norm and optimizer step."""
        self.strategy.step()


def random_batches(config: RunConfig, spec: DataSpec, num: int, device: torch.device) -> BatchLoader:
    """Batches of `num` random samples as in `spec`, on `device`."""
    pixels = None
    if spec.is_image:
        mean = torch.full((spec.input_shape[0],), 127.0, dtype=torch.float64)
        pixels = PixelStatistics(mean, mean)
    targets = spec.zero_targets(num)
    if spec.num_classes:
        targets += (torch.arange(targets.numel()) % spec.num_classes).view(targets.shape)
    samples = Samples(spec.random_inputs(num), targets).to(device)
    preprocess = Preprocess(pixels, device, getattr(torch, config.train.dtype))
    return BatchLoader(samples, preprocess, config.data, config.seed, spec.num_classes)


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
