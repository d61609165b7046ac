"""The order of training samples: a function of seed and epoch only.

It does not depend on world size or micro-batches, and the only state is the global step. A batch that grows, between
epochs or within one, does not change the order.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError


def seeded_rng(seed: int, *purpose: int) -> np.random.Generator:
    """An independent random generator for each purpose (sample order, probe set, ...) of one seed."""
    return np.random.default_rng([seed, *purpose])


class BatchSizePhase(NamedTuple):
    """Consecutive steps with the same global batch."""

    step: int
    """Its first step."""
    epoch: int
    position: int
    """Samples of `epoch` before its first step."""
    size: int
    first_steps: int
    """Steps in the rest of `epoch`."""
    steps_per_epoch: int
    """Steps in each epoch after that."""


class EpochSampler:
    """Indices of the samples of every step. Each epoch visits every sample once; its last step may be smaller."""

    def __init__(
        self,
        num_samples: int,
        global_size: int,
        seed: int,
        *,
        size_schedule: Sequence[tuple[float, int]] = (),
        schedule_unit: Literal["samples", "steps", "epochs", "tokens"] = "epochs",
        sample_tokens: int = 1,
        worker: int | None = None,
        in_order: bool = False,
    ) -> None:
        """Sampler of `num_samples` samples in steps of `global_size`.

        Args:
            num_samples: of the training set.
            global_size: samples per step; with `size_schedule`, of the first steps.
            seed: of the permutations.
            size_schedule: (where, new global size) in ascending order.
            schedule_unit: of where: the size holds from the first step before which so much was done.
            sample_tokens: tokens in a sample, with which `schedule_unit` tokens counts.
            worker: network that has its own order, for algorithm.local_sgd=swap; None: the common order.
            in_order: each epoch is in the order of the data set, which is a stream.

        Raises:
            UsageError: if a global batch is larger than `num_samples`, or two changes fall on the same step.
        """
        self.num_samples, self.global_size, self.seed, self.worker = num_samples, global_size, seed, worker
        self.sample_tokens = sample_tokens
        self.in_order = in_order
        self.phases: list[BatchSizePhase] = []
        self._add_phase(0, global_size, f"batch.global_size ({global_size})")
        for at, size in size_schedule:
            change = f"batch.schedule ({size} at {at:.15g} {schedule_unit})"
            step = int(at) if schedule_unit == "steps" else self._first_step(self._num_samples(at, schedule_unit))
            if step <= self.phases[-1].step:
                raise UsageError(
                    f"{change} begins with the same step as {self.phases[-1].size}, which then has none: move it "
                    "further away, or leave one out"
                )
            self._add_phase(step, size, change)
        self.steps_per_epoch = self.phases[0].steps_per_epoch
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    @classmethod
    def of(cls, config: RunConfig, num_samples: int, *, in_order: bool = False) -> Self:
        """The sampler of a run; `in_order` if its data set is a stream.

        >>> batch = {"global_size": 25, "schedule": [{"at": 0, "size": 25}, {"at": 60, "size": 50}]}
        >>> sampler = EpochSampler.of(RunConfig.model_validate({"batch": batch}), 100)
        >>> [len(sampler.indices(step)) for step in range(6)]
        [25, 25, 25, 25, 50, 50]

        Raises:
            UsageError: see the constructor.
        """
        batch, changes = config.batch, [(change.at, change.size) for change in config.batch.schedule[1:]]
        return cls(
            num_samples,
            batch.global_size,
            config.seed,
            size_schedule=changes,
            schedule_unit=batch.schedule_unit,
            sample_tokens=config.data.context if config.data.is_tokens else 1,
            in_order=in_order,
        )

    def _add_phase(self, step: int, size: int, name: str) -> None:
        if size > self.num_samples:
            raise UsageError(
                f"{name} is larger than the training set of {self.num_samples} samples: choose at most "
                f"{self.num_samples}"
            )
        epoch, position, _ = self._locate(step) if self.phases else (0, 0, 0)
        rest = -(-(self.num_samples - position) // size)
        self.phases.append(BatchSizePhase(step, epoch, position, size, rest, -(-self.num_samples // size)))

    def _num_samples(self, at: float, unit: str) -> int:
        """The number of samples in which `at` is reached; with tokens, those of every position of a sequence count."""
        each = {"samples": 1.0, "epochs": 1 / self.num_samples, "tokens": float(self.sample_tokens)}[unit]
        return math.ceil(at / each - 1e-6)

    def _first_step(self, samples: int) -> int:
        """The first step before which `samples` were done."""
        epoch, position = divmod(samples, self.num_samples)
        begins = [(phase.epoch, phase.position) for phase in self.phases]
        phase = self.phases[bisect_right(begins, (epoch, position)) - 1]
        if epoch == phase.epoch:
            return phase.step - (-(position - phase.position) // phase.size)
        between = phase.first_steps + (epoch - phase.epoch - 1) * phase.steps_per_epoch
        return phase.step + between - (-position // phase.size)

    def phase(self, step: int) -> BatchSizePhase:
        """The phase of step `step` (from 0); `size` is its global batch, the last step of an epoch may be smaller."""
        return self.phases[bisect_right(self.phases, step, key=attrgetter("step")) - 1]

    def epoch(self, step: int) -> int:
        """The epoch of step `step` (from 0)."""
        return self._locate(step)[0]

    def indices(self, step: int) -> Tensor:
        """[n] int64 positions of the samples of step `step` (from 0), n = the global size or the rest of the epoch."""
        epoch, start, size = self._locate(step)
        if self.in_order:
            return torch.arange(start, min(start + size, self.num_samples))
        if epoch != self._epoch:
            purpose = (1, epoch) if self.worker is None else (4, self.worker, epoch)
            permutation = seeded_rng(self.seed, *purpose).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, torch.from_numpy(permutation)
        return self._permutation[start : start + size]

    def sizes(self) -> set[int]:
        """All numbers of samples that a step can have.

        >>> sorted(EpochSampler(100, 40, seed=0).sizes())
        [20, 40]
        """
        out: set[int] = set()
        ends = [*(phase.step for phase in self.phases[1:]), math.inf]
        for phase, end in zip(self.phases, ends, strict=True):
            if phase.position + phase.size <= self.num_samples or phase.step + phase.first_steps < end:
                out.add(phase.size)
            if phase.step + phase.first_steps <= end:
                out.add((self.num_samples - phase.position) % phase.size)
            if phase.step + phase.first_steps + phase.steps_per_epoch <= end:
                out.add(self.num_samples % phase.size)
        return out - {0}

    def epochs_done(self, steps: int) -> float:
        """Number of passes over the samples after `steps` steps.

        >>> sampler = EpochSampler(100, 25, seed=0, size_schedule=[(2, 50)])  # steps in an epoch: 4, 4, 2, 2, ...
        >>> [sampler.epochs_done(steps) for steps in (0, 1, 8, 9, 12)]
        [0.0, 0.25, 2.0, 2.5, 4.0]
        """
        epoch, position, _ = self._locate(steps)
        return epoch + position / self.num_samples

    def num_steps_of_tokens(self, tokens: int) -> int:
        """Number of steps in which `tokens` tokens are reached.

        >>> sampler = EpochSampler(100, 25, seed=0, size_schedule=[(2, 50)], sample_tokens=8)
        >>> [sampler.num_steps_of_tokens(tokens) for tokens in (1, 200, 201, 1600, 1601, 2400)]
        [1, 1, 2, 8, 9, 10]
        """
        return self._first_step(self._num_samples(tokens, "tokens"))

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

        def begin(phase: BatchSizePhase) -> float:
            return phase.epoch + phase.position / self.num_samples

        phase = self.phases[bisect_right(self.phases, epoch, key=begin) - 1]
        if epoch < phase.epoch + 1:
            share = (epoch - begin(phase)) * self.num_samples / (self.num_samples - phase.position)
            return phase.step + round(share * phase.first_steps)
        return phase.step + round(phase.first_steps + (epoch - phase.epoch - 1) * phase.steps_per_epoch)

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Epoch of a step, the samples of that epoch before it, and the global size."""
        phase = self.phase(step)
        done = step - phase.step
        if done < phase.first_steps:
            return phase.epoch, phase.position + done * phase.size, phase.size
        epoch, position = divmod(done - phase.first_steps, phase.steps_per_epoch)
        return phase.epoch + 1 + epoch, position * phase.size, phase.size
