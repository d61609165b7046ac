"""Measures this machine: forward and backward pass of a sample, an update, and the link between two ranks.

Two ranks on this machine measure together, as in training: on two GPUs over NCCL, or on the CPU over gloo with shared
cores. With a single GPU, one rank measures, and there is no link.
"""

import platform
from contextlib import closing
from functools import partial

import numpy as np
import torch

from gengap_dist import models
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.datasets import Sizes
from gengap_dist.distributed.cores import threads_per_rank
from gengap_dist.distributed.process_group import World, init_process_group
from gengap_dist.distributed.worker_pool import Worker, WorkerPool
from gengap_dist.parallel.execution import keep_freed_memory
from gengap_dist.preflight.machine_constants import ComputeConstants, Constants, LinkConstants, workload_name
from gengap_dist.training.autotune.memory_format import with_memory_format
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, median_seconds
from gengap_dist.training.tasks import build_task

SIZES = [2**power for power in range(10, 25, 2)]  # bytes of all-reduces


def calibrate(config: RunConfig, sizes: Sizes, micro_size: int, known: Constants) -> Constants:
    """`known`, updated with the constants that two ranks of this machine measure for `config`.

    Raises:
        RankFailed: if a rank fails.
    """
    if config.train.channels_last == "auto":
        config = with_memory_format(config, False)  # as in the plan
    num_ranks = 1 if torch.cuda.device_count() == 1 and config.launch.device != "cpu" else 2
    with closing(WorkerPool(num_ranks, threads_per_rank(num_ranks, config.launch.threads_per_rank))) as pool:
        where, compute, link = pool(measure, config, sizes, micro_size)[0]
    key = workload_name(config, sizes.spec, micro_size)
    return known.model_copy(
        update={"where": where, "inside": link or known.inside, "compute": known.compute | {key: compute}}
    )


def measure(
    worker: Worker, config: RunConfig, sizes: Sizes, micro_size: int
) -> tuple[str, ComputeConstants, LinkConstants | None]:
    """The job of each rank: a description of the hardware, and the constants. Collective."""
    world = init_process_group(config.launch.device, config.launch.timeout_seconds)
    if world.device.type == "cpu":
        keep_freed_memory()  # as a run does
    compute = time_compute(config, sizes, micro_size, world)
    link = time_link(world) if world.size > 1 else None
    where = f"{platform.machine()}, {world.size} rank(s) on {world.device.type}, {worker.threads} thread(s) each"
    return where, compute, link


def time_compute(config: RunConfig, sizes: Sizes, micro_size: int, world: World) -> ComputeConstants:
    """Seconds of one micro-batch of random samples, and of an update, on the slowest rank. Collective."""
    model = models.from_config(config, sizes.spec, World())
    model = model.to(world.device, getattr(torch, config.train.dtype))
    synthetic = SyntheticWorkload(config, model, build_task(config, sizes.spec), world.device)
    pass_seconds, update_seconds = (
        median_seconds(job, world) for job in (partial(synthetic.micro_batch, micro_size), synthetic.update)
    )
    return ComputeConstants(seconds_per_sample=pass_seconds / micro_size, seconds_per_update=update_seconds)


def time_link(world: World) -> LinkConstants:
    """Constants of the ring of these ranks, fitted to all-reduces of several sizes. Collective."""
    times = [
        median_seconds(partial(world.all_reduce, torch.zeros(size // 4, device=world.device)), world) for size in SIZES
    ]
    return fit_link(SIZES, times, world.size)


def fit_link(sizes: list[int], times: list[float], num_ranks: int) -> LinkConstants:
    """Constants of T = 2 (P-1) alpha + 2 (P-1)/P M beta, by least squares of relative errors.

    >>> fit_link([100, 10_000], [0.02 + 100e-6, 0.02 + 10_000e-6], num_ranks=2)
    LinkConstants(alpha=0.01, beta=1e-06)
    """
    num_messages = 2 * (num_ranks - 1)
    rows = np.array([[num_messages, num_messages / num_ranks * size] for size in sizes]) / np.array(times)[:, None]
    (alpha, beta), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    return LinkConstants(alpha=round(max(alpha, 0.0), 12), beta=round(max(beta, 0.0), 18))
