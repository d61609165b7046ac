"""Setup of a run before its first step: data, network, a run folder that all nodes share."""

import contextlib
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.runtime_context import local_size, rank_environment
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from gengap_dist.runs.schema import RunInfo
from gengap_dist.runs.system_metrics import sampling
from gengap_dist.training.checks import check_network
from gengap_dist.training.inspection import Inspection, inspect
from gengap_dist.training.tasks import Task

NUM_NAMED = 5  # names in a warning
SHARED_SECONDS = 5.0  # until a new file must be visible on all nodes


Progress = Callable[[int, int, str], None]
"""Called with the number of completed steps, the total number, and a short note."""


class Diverged(Exception):
    """A loss or a gradient is not finite; this is a result of the run, not a crash."""

    def __init__(self, step: int, value: float, name: str) -> None:
        super().__init__(f"{name} was {value} at step {step}")
        self.step = step


def previous_run_info(out: Path) -> RunInfo | None:
    """The run.json of the run in `out`; None if there is none."""
    try:
        return read_info(out)
    except UsageError:  # none yet; other readers report a damaged file
        return None


def sampling_system_metrics(config: RunConfig, out: Path, world: World) -> contextlib.AbstractContextManager[None]:
    """While open, one rank of each node samples its system metrics."""
    is_local_rank_0 = rank_environment()[1] == 0
    return sampling(
        out, config.mlflow.system_seconds if is_local_rank_0 else None, num_nodes=-(-world.size // local_size())
    )


def check_shared(out: Path, world: World) -> None:
    """Refuse a run folder that is not visible on every rank. Collective.

    Raises:
        UsageError: names the ranks that do not see a file written by rank 0.
    """
    if world.size == 1:
        return
    token = out / f".shared.{world.broadcast_int(os.getpid())}"
    if world.rank == 0:
        token.touch()
    world.barrier()
    deadline = time.monotonic() + SHARED_SECONDS  # network file systems may take a moment
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks_without_file = torch.zeros(world.size, dtype=torch.int64)
    ranks_without_file[world.rank] = not token.exists()
    ranks_without_file = world.all_reduce(ranks_without_file, "check of the run folder").nonzero().flatten().tolist()
    if world.rank == 0:
        token.unlink()
    if ranks_without_file:
        raise UsageError(
            f"--out ({out}) is not the same folder for rank {', '.join(map(str, ranks_without_file))} as for rank 0: "
            "give a folder on storage that all nodes share"
        )


def load_data(config: RunConfig, world: World, progress: Progress) -> datasets.Splits:
    """The data of a run; with data.download, one rank of each node downloads the files first."""

    def report(label: str, done: int, total: int) -> None:
        progress(0, 0, f"{label} {done:,}/{total:,}")

    if config.data.download and rank_environment()[1] == 0:
        datasets.load(config.data, report, seed=config.seed)
    if config.data.download:
        world.barrier()
    return datasets.load(config.data, report, seed=config.seed)


def build_model(config: RunConfig, splits: datasets.Splits, task: Task, world: World) -> nn.Module:
    """The network, initialised from the seed, on this rank's device.

    Raises:
        UsageError: if the model does not exist, or does not match the samples and the task.
    """
    models.factory_of(config.model.name)  # the module of a user may draw random numbers when it is imported
    seed = int(seeded_rng(config.seed, 0).integers(2**62))
    for set_seed in (torch.manual_seed, random.seed, lambda seed: np.random.seed(seed % 2**32)):  # noqa: NPY002
        set_seed(seed)  # a user's factory may draw from any of them
    dtype = getattr(torch, config.train.dtype)
    model = models.from_config(config, splits.spec, world).to(world.device, dtype)
    check_network(config, model, *two_samples(config, splits, world), task)
    return model


def inspect_network(
    config: RunConfig, splits: datasets.Splits, model: nn.Module, task: Task, world: World
) -> Inspection:
    """What a training pass of the network does that a run must know; rank 0 warns. Collective with sync batch norm."""
    found = inspect(model, *two_samples(config, splits, world), task)
    if world.rank == 0 and found.unused_parameters:
        warnings.warn(
            f"{_named(found.unused_parameters)} of {config.model.name} got no gradient in a pass of two samples: they "
            "may never be trained",
            stacklevel=2,
        )
    if world.rank == 0 and found.depends_on_ranks:
        warnings.warn(
            f"{_named(found.depends_on_ranks)} of {config.model.name} draw random numbers by micro-batch, or change in "
            "every pass: the result depends on the number of ranks and micro-batches (run.json, depends_on_ranks)",
            stacklevel=2,
        )
    return found


def _named(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMED]) + f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED)


def two_samples(config: RunConfig, splits: datasets.Splits, world: World) -> tuple[Tensor, Tensor]:
    """Two training samples as the network receives them, and their targets, on this rank's device."""
    preprocess = Preprocess(splits.pixels, world.device, getattr(torch, config.train.dtype))
    return preprocess(splits.train.inputs[:2].to(world.device)), splits.train.targets[:2].to(world.device)
