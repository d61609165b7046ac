"""Measure this machine: a sample's forward and backward pass, an update, and the link between two ranks.

Two ranks of this machine do it together, as they would in training: on two GPUs over NCCL, else on the CPU over gloo,
sharing the cores. One GPU alone has no link to measure.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from gengap_dist import models
from gengap_dist.batching import Span
from gengap_dist.config import RunConfig
from gengap_dist.data.catalog import Images, Sizes, Splits
from gengap_dist.data.resident import Batches, Normalise
from gengap_dist.launchers.base import RankFailed, leave
from gengap_dist.launchers.local import free_port, threads_per_rank
from gengap_dist.loop import Work, train_step
from gengap_dist.optim.build import build as build_optimizer
from gengap_dist.planning.constants import ComputeConstants, Constants, LinkConstants, workload
from gengap_dist.strategies import Single
from gengap_dist.world import World, connect, disconnect

SIZES = [2**power for power in range(10, 25, 2)]  # bytes of all-reduces
LEAST_TIMES, LEAST_SECONDS = 5, 1.0  # of each measurement


def calibrate(config: RunConfig, sizes: Sizes, micro_size: int, known: Constants) -> Constants:
    """`known`, with what two ranks of this machine find for `config`.

    Raises:
        RankFailed: if a rank fails.
    """
    num_ranks = 1 if torch.cuda.device_count() == 1 and config.launch.device != "cpu" else 2
    context = get_context("spawn")
    port = str(free_port())
    pipes: list[Any] = []
    for rank in range(num_ranks):
        here, there = context.Pipe()
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        env |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_PORT": port} | threads_per_rank(num_ranks)
        context.Process(target=_rank, args=(there, env, config, sizes, micro_size), daemon=True).start()
        there.close()
        pipes.append(here)
    found = [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
    where, compute, link = found[0]
    key = workload(config, sizes.in_channels, micro_size)
    return known.model_copy(
        update={"where": where, "inside": link or known.inside, "compute": known.compute | {key: compute}}
    )


Found = tuple[str, ComputeConstants, LinkConstants | None]


def _answer(rank: int, pipe: Any) -> Found:
    try:
        found, error = pipe.recv()
    except EOFError:
        raise RankFailed(f"rank {rank} of the calibration died") from None
    if error:
        raise RankFailed(f"rank {rank} of the calibration failed: {error}")
    return found


def _rank(pipe: Any, env: dict[str, str], config: RunConfig, sizes: Sizes, micro_size: int) -> None:
    """One rank's life."""
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # the variable comes too late: torch is imported
    try:
        world = connect(config.launch)
        compute = time_compute(config, sizes, micro_size, world)
        link = time_link(world) if world.size > 1 else None
        threads = torch.get_num_threads()
        where = f"{platform.machine()}, {world.size} rank(s) on {world.device.type}, {threads} thread(s) each"
        disconnect()
        pipe.send(((where, compute, link), None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
    leave(0)


def time_compute(config: RunConfig, sizes: Sizes, micro_size: int, world: World) -> ComputeConstants:
    """The slowest rank's time for one micro-batch of random images, and for an update. Collective."""
    dtype = getattr(torch, config.train.dtype)
    batches = random_batches(config, sizes, micro_size, world.device)
    model = models.of(config, sizes.num_classes, sizes.in_channels, World()).to(world.device, dtype)
    strategy = Single(config, World(device=world.device))
    strategy.setup(model.train(), partial(build_optimizer, config.optim))
    # the weights stay; momentum costs what it does in a run, but does not decay: denormal numbers would be slow
    strategy.set_rates(0.0, 1.0 if config.optim.momentum else 0.0)
    work = Work(torch.arange(micro_size), 0, [Span(0, micro_size)])

    def step() -> None:
        train_step(strategy, batches, work)

    def update() -> None:
        strategy.step()

    step_seconds, update_seconds = (median_seconds(job, world) for job in (step, update))
    return ComputeConstants(
        seconds_per_sample=max(step_seconds - update_seconds, 0.0) / micro_size, seconds_per_update=update_seconds
    )


def random_batches(config: RunConfig, sizes: Sizes, num_images: int, device: torch.device) -> Batches:
    """Batches out of `num_images` random images like those of `config`, on `device`."""
    side = config.data.image_size
    pixels = torch.randint(256, (num_images, sizes.in_channels, side, side), dtype=torch.uint8)
    images = Images(pixels, torch.arange(num_images) % sizes.num_classes).to(device)
    mean = torch.full((sizes.in_channels,), 127.0, dtype=torch.float64)
    splits = Splits(images, images, images, sizes.num_classes, mean, mean)
    dtype = getattr(torch, config.train.dtype)
    return Batches(images, Normalise(splits, device, dtype), config.data, config.seed)


def time_link(world: World) -> LinkConstants:
    """Constants of the ring of these ranks, from all-reduces of many sizes. Collective."""
    times = [median_seconds(partial(world.sum, torch.zeros(size // 4, device=world.device)), world) for size in SIZES]
    return fit_link(SIZES, times, world.size)


def fit_link(sizes: list[int], times: list[float], num_ranks: int) -> LinkConstants:
    """Constants of T = 2 (P-1) alpha + 2 (P-1)/P M beta, by least squares of relative errors.

    >>> fit_link([100, 10_000], [0.02 + 100e-6, 0.02 + 10_000e-6], num_ranks=2)
    LinkConstants(alpha=0.01, beta=1e-06)
    """
    turns = 2 * (num_ranks - 1)
    rows = np.array([[turns, turns / num_ranks * size] for size in sizes]) / np.array(times)[:, None]
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    return LinkConstants(alpha=round(max(alpha, 0.0), 12), beta=round(max(beta, 0.0), 18))


def median_seconds(job: Callable[[], object], world: World) -> float:
    """Median time of `job` on the slowest rank. Collective; ranks begin together, and take equally many turns."""
    job()
    took: list[float] = []
    began = time.monotonic()
    while True:
        world.barrier()
        synchronise(world)
        start = time.perf_counter()
        job()
        synchronise(world)
        took.append(time.perf_counter() - start)
        enough = len(took) >= LEAST_TIMES and time.monotonic() - began > LEAST_SECONDS
        word = torch.tensor([float(enough), 0.0] if world.rank == 0 else [0.0, 0.0], device=world.device)
        if world.sum(word)[0]:
            break
    by_rank = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    by_rank[world.rank] = statistics.median(took)
    return float(world.sum(by_rank).max())


def synchronise(world: World) -> None:
    """Wait until this rank's device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
