"""The order in which training images are visited: a function of seed and epoch, and of nothing else.

World size and micro-batches never enter, and the only state is the global step. A batch that grows does so between
epochs, and leaves every epoch's order as it is.
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
    """A random generator of its own for each purpose (order, probe set, ...) under one seed."""
    return np.random.default_rng([seed, *purpose])


def batch_size_schedule(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """(first epoch, global size) of every growth of the batch under optim.schedule=grow; elsewhere none.

    At milestone m the batch is divided by gamma, from epoch round(m * train.epochs) on (Smith et al. 2018).

    >>> grow = {"schedule": "grow", "milestones": [0.5, 0.8], "gamma": 0.5}
    >>> batch_size_schedule(RunConfig.model_validate({"optim": grow, "train": {"epochs": 10}, "batch": {"global_size": 32}}))
    ((5, 64), (8, 128))

    Raises:
        UsageError: if the run has too few epochs for a milestone to be the start of one of its own.
    """
    optim, epochs = config.optim, config.train.epochs
    if optim.schedule != "grow":
        return ()
    starts = [round(milestone * epochs) for milestone in optim.milestones]
    if any(after <= before for before, after in zip([0, *starts], [*starts, epochs], strict=True)):
        raise UsageError(
            f"optim.milestones ({list(optim.milestones)}) let the batch grow before epochs {starts} of 0 to "
            f"{epochs - 1}, and it must be before different ones, not the first: choose others, or more train.epochs"
        )
    factor = round(1 / optim.gamma)
    return tuple((start, config.batch.global_size * factor**k) for k, start in enumerate(starts, 1))


class Phase(NamedTuple):
    """Epochs with one global batch: number of the first, its first step, and the batch."""

    epoch: int
    step: int
    size: int
    steps_per_epoch: int


class EpochSampler:
    """The images of every step. Each epoch visits every image once; its last step may be smaller."""

    def __init__(
        self,
        num_samples: int,
        global_size: int,
        seed: int,
        *,
        growth: Sequence[tuple[int, int]] = (),
        worker: int | None = None,
    ) -> None:
        """Order of `num_samples` images in steps of `global_size`.

        Args:
            num_samples: images in all.
            global_size: images in a step; with `batch_size_schedule`, at first.
            seed: of the order.
            growth: (first epoch, images in a step from there on), epochs rising, see `batch_size_schedule`.
            worker: which network's own order it is, for algorithm.local_sgd=swap; None: the order of all.

        Raises:
            UsageError: if one step would need more images than there are.
        """
        self.num_samples, self.global_size, self.seed, self.worker = num_samples, global_size, seed, worker
        self.phases: list[Phase] = []
        for epoch, size in [(0, global_size), *growth]:
            if size > num_samples:
                given, remedy = f"batch.global_size ({global_size})", f"choose at most {num_samples}"
                if epoch:
                    given += f", which optim.milestones let grow to {size} at epoch {epoch},"
                    remedy = "choose a smaller one, fewer milestones or a larger optim.gamma"
                raise UsageError(f"{given} is larger than the training set of {num_samples} images: {remedy}")
            step = self.num_steps(epoch) if self.phases else 0
            self.phases.append(Phase(epoch, step, size, -(-num_samples // size)))
        self.steps_per_epoch = self.phases[0].steps_per_epoch
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def phase(self, step: int) -> Phase:
        """The phase of step number `step` (from 0): `size` is the global batch, an epoch's last may be smaller."""
        return self.phases[bisect_right(self.phases, step, key=attrgetter("step")) - 1]

    def epoch(self, step: int) -> int:
        """The epoch that step number `step` (from 0) belongs to."""
        return self._place(step)[0]

    def indices(self, step: int) -> Tensor:
        """[n] int64 positions of the images of step `step` (from 0), n = the global size or the rest of the epoch."""
        epoch, at, size = self._place(step)
        if epoch != self._epoch:
            purpose = (1, epoch) if self.worker is None else (4, self.worker, epoch)
            permutation = seeded_rng(self.seed, *purpose).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, torch.from_numpy(permutation)
        return self._permutation[at * size : (at + 1) * size]

    def sizes(self) -> set[int]:
        """Images in a step, of all kinds of steps.

        >>> sorted(EpochSampler(100, 40, seed=0).sizes())
        [20, 40]
        """
        return {size for phase in self.phases for size in (phase.size, self.num_samples % phase.size) if size}

    def epochs_done(self, steps: int) -> float:
        """Passes over the images after `steps` steps.

        >>> order = EpochSampler(100, 25, seed=0, growth=[(2, 50)])  # steps in an epoch: 4, 4, 2, 2, ...
        >>> [order.epochs_done(steps) for steps in (0, 1, 8, 9, 12)]
        [0.0, 0.25, 2.0, 2.5, 4.0]
        """
        epoch, at, size = self._place(steps)
        return epoch + at * size / self.num_samples

    def num_steps(self, epochs: int) -> int:
        """Steps in the first `epochs` epochs.

        >>> EpochSampler(100, 25, seed=0, growth=[(2, 50)]).num_steps(4)
        12
        """
        return self.step_at(epochs)

    def step_at(self, epoch: float) -> int:
        """The number of steps after which nearest to `epoch` passes are done.

        >>> order = EpochSampler(100, 25, seed=0, growth=[(2, 50)])
        >>> [order.step_at(epoch) for epoch in (0.3, 2, 2.5, 4)]
        [1, 8, 9, 12]
        """
        phase = self.phases[bisect_right(self.phases, epoch, key=attrgetter("epoch")) - 1]
        return phase.step + round((epoch - phase.epoch) * phase.steps_per_epoch)

    def _place(self, step: int) -> tuple[int, int, int]:
        """Epoch of a step, its number in that epoch, and the global size."""
        phase = self.phase(step)
        epoch, at = divmod(step - phase.step, phase.steps_per_epoch)
        return phase.epoch + epoch, at, phase.size
