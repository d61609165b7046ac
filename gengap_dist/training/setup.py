"""What a run needs before its first step: data, network, a folder that all nodes share."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config.sections import DataConfig, RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Normalise
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.process_group import World, environment, local_size
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from gengap_dist.runs.system_metrics import sampling
from gengap_dist.training.checks import check_logits

SHARED_SECONDS = 5.0  # for a file to be seen on all nodes


Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words."""


class Diverged(Exception):
    """The loss is no longer a number; that is a result, not a crash."""

    def __init__(self, step: int, loss: float, name: str = "train/loss") -> None:
        super().__init__(f"{name} was {loss} at step {step}")
        self.step = step


def facts_before(out: Path) -> dict[str, Any]:
    """What the record of the run in `out` says, if there is one."""
    try:
        return read_info(out)
    except UsageError:  # none yet; a damaged one is complained of by whoever needs more of it
        return {}


def sampling_system_metrics(config: RunConfig, out: Path, world: World) -> contextlib.AbstractContextManager[None]:
    """One rank of each node looks at its machine meanwhile."""
    leads = environment()[1] == 0
    return sampling(out, config.mlflow.system_seconds if leads else None, num_nodes=-(-world.size // local_size()))


def check_shared(out: Path, world: World) -> None:
    """Refuse a run folder that not every rank sees. Collective.

    Raises:
        UsageError: naming the ranks that do not see a file which rank 0 wrote.
    """
    if world.size == 1:
        return
    token = out / f".shared.{world.broadcast_int(os.getpid())}"
    if world.rank == 0:
        token.touch()
    world.barrier()
    until = time.monotonic() + SHARED_SECONDS  # network file systems may take a moment
    while not token.exists() and time.monotonic() < until:
        time.sleep(0.1)
    blind = torch.zeros(world.size, dtype=torch.int64)
    blind[world.rank] = not token.exists()
    blind = world.all_reduce(blind, "check of the run folder").nonzero().flatten().tolist()
    if world.rank == 0:
        token.unlink()
    if blind:
        raise UsageError(
            f"--out ({out}) is not the same folder for rank {', '.join(map(str, blind))} as for rank 0: "
            "give a folder on storage that all nodes share"
        )


_LOADED: dict[DataConfig, datasets.Splits] = {}  # the last data set: the runs of a study share it


def load_data(config: RunConfig, world: World, progress: Progress) -> datasets.Splits:
    """The data of a run; the last data set is kept, because the runs of a study share it."""

    def report(what: str, done: int, total: int) -> None:
        progress(0, 0, f"{what} {done:,}/{total:,}")

    if config.data in _LOADED:
        return _LOADED[config.data]
    _LOADED.clear()
    local_rank = environment()[1]
    if config.data.download and local_rank == 0:
        datasets.load(config.data, report)  # one rank per machine fetches the files, the others find them
    if config.data.download:
        world.barrier()
    _LOADED[config.data] = datasets.load(config.data, report)
    return _LOADED[config.data]


def build_model(config: RunConfig, splits: datasets.Splits, world: World) -> nn.Module:
    """The network with the weights that the seed gives it, on this rank's device.

    Raises:
        UsageError: if there is no such model, or its output does not match the images and classes.
    """
    torch.manual_seed(int(seeded_rng(config.seed, 0).integers(2**62)))
    dtype = getattr(torch, config.train.dtype)
    model = models.from_config(config, splits.num_classes, splits.in_channels, world).to(world.device, dtype)
    images = Normalise(splits, world.device, dtype)(splits.train.pixels[:2].to(world.device))
    check_logits(config, model, images, splits.num_classes)
    return model
