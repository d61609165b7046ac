"""The order of training images: a function of seed and epoch only.

It does not depend on world size or micro-batches, and the only state is the global step. The batch size changes only
between epochs, and does not change the order within an epoch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError


def seeded_rng(seed: int, *purpose: int) -> np.random.Generator:
    """An independent random generator for each purpose (sample order, probe set, ...) of one seed."""
    return np.random.default_rng([seed, *purpose])


def batch_size_schedule(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """(first epoch, global size) of every batch increase of optim.schedule=grow; empty for other schedules.

    At milestone m the batch is divided by gamma, starting at epoch round(m * train.epochs) (Smith et al. 2018).

    >>> grow = {"schedule": "grow", "milestones": [0.5, 0.8], "gamma": 0.5}
    >>> settings = {"optim": grow, "train": {"epochs": 10}, "batch": {"global_size": 32}}
    >>> batch_size_schedule(RunConfig.model_validate(settings))
    ((5, 64), (8, 128))

    Raises:
        UsageError: if two milestones fall into the same epoch, or one into the first.
    """
    optim, epochs = config.optim, config.train.epochs
    if optim.schedule != "grow":
        return ()
    starts = [round(milestone * epochs) for milestone in optim.milestones]
    if any(after <= before for before, after in zip([0, *starts], [*starts, epochs], strict=True)):
        raise UsageError(
            f"optim.milestones ({list(optim.milestones)}) increase the batch at epochs {starts} of 0 to "
            f"{epochs - 1}, which must be different, and not the first or the end: choose others, or more train.epochs"
        )
    factor = round(1 / optim.gamma)
    return tuple((start, config.batch.global_size * factor**k) for k, start in enumerate(starts, 1))


class BatchSizePhase(NamedTuple):
    """Consecutive epochs with the same global batch: first epoch, first step, global size."""

    epoch: int
    step: int
    size: int
    steps_per_epoch: int


class EpochSampler:
    """Indices of the images of every step. Each epoch visits every image once; its last step may be smaller."""

    def __init__(
        self,
        num_samples: int,
        global_size: int,
        seed: int,
        *,
        size_schedule: Sequence[tuple[int, int]] = (),
        worker: int | None = None,
    ) -> None:
        """Sampler of `num_samples` images in steps of `global_size`.

        Args:
            num_samples: number of images.
            global_size: images per step; with `size_schedule`, in the first epochs.
            seed: of the permutations.
            size_schedule: (first epoch, new global size) in ascending order, see `batch_size_schedule`.
            worker: network that has its own order, for algorithm.local_sgd=swap; None: the common order.

        Raises:
            UsageError: if a global batch is larger than `num_samples`.
        """
        self.num_samples, self.global_size, self.seed, self.worker = num_samples, global_size, seed, worker
        self.phases: list[BatchSizePhase] = []
        for epoch, size in [(0, global_size), *size_schedule]:
            if size > num_samples:
                given, remedy = f"batch.global_size ({global_size})", f"choose at most {num_samples}"
                if epoch:
                    given += f", which optim.milestones increase to {size} at epoch {epoch},"
                    remedy = "choose a smaller one, fewer milestones or a larger optim.gamma"
                raise UsageError(f"{given} is larger than the training set of {num_samples} images: {remedy}")
            step = self.num_steps(epoch) if self.phases else 0
            self.phases.append(BatchSizePhase(epoch, step, size, -(-num_samples // size)))
        self.steps_per_epoch = self.phases[0].steps_per_epoch
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def phase(self, step: int) -> BatchSizePhase:
        """The phase of step `step` (from 0); `size` is its global batch, the last step of an epoch may be smaller."""
        return self.phases[bisect_right(self.phases, step, key=attrgetter("step")) - 1]

    def epoch(self, step: int) -> int:
        """The epoch of step `step` (from 0)."""
        return self._locate(step)[0]

    def indices(self, step: int) -> Tensor:
        """[n] int64 positions of the images of step `step` (from 0), n = the global size or the rest of the epoch."""
        epoch, position, size = self._locate(step)
        if epoch != self._epoch:
            purpose = (1, epoch) if self.worker is None else (4, self.worker, epoch)
            permutation = seeded_rng(self.seed, *purpose).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, torch.from_numpy(permutation)
        return self._permutation[position * size : (position + 1) * size]

    def sizes(self) -> set[int]:
        """All numbers of images that a step can have.

        >>> sorted(EpochSampler(100, 40, seed=0).sizes())
        [20, 40]
        """
        return {size for phase in self.phases for size in (phase.size, self.num_samples % phase.size) if size}

    def epochs_done(self, steps: int) -> float:
        """Number of passes over the images after `steps` steps.

        >>> sampler = EpochSampler(100, 25, seed=0, size_schedule=[(2, 50)])  # steps in an epoch: 4, 4, 2, 2, ...
        >>> [sampler.epochs_done(steps) for steps in (0, 1, 8, 9, 12)]
        [0.0, 0.25, 2.0, 2.5, 4.0]
        """
        epoch, position, size = self._locate(steps)
        return epoch + position * size / self.num_samples

    def num_steps(self, epochs: int) -> int:
        """Number of steps in the first `epochs` epochs.

        >>> EpochSampler(100, 25, seed=0, size_schedule=[(2, 50)]).num_steps(4)
        12
        """
        return self.step_at(epochs)

    def step_at(self, epoch: float) -> int:
        """The number of steps after which the number of passes is nearest to `epoch`.

        >>> sampler = EpochSampler(100, 25, seed=0, size_schedule=[(2, 50)])
        >>> [sampler.step_at(epoch) for epoch in (0.3, 2, 2.5, 4)]
        [1, 8, 9, 12]
        """
        phase = self.phases[bisect_right(self.phases, epoch, key=attrgetter("epoch")) - 1]
        return phase.step + round((epoch - phase.epoch) * phase.steps_per_epoch)

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Epoch of a step, its position in that epoch, and the global size."""
        phase = self.phase(step)
        epoch, position = divmod(step - phase.step, phase.steps_per_epoch)
        return phase.epoch + epoch, position, phase.size
