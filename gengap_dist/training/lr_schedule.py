"""The length of a run, and the learning rate and momentum of each step: pure functions of the step.

The full learning rate follows the global batch by optim.scaling, see `config.batch_rules`. The schedule then depends on
t, the completed fraction of the steps after warm-up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, final

from gengap_dist.config.batch_rules import lr_factor
from gengap_dist.config.sections import OptimConfig, RunConfig
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.errors import UsageError


def scaled_lr(config: OptimConfig, global_size: int) -> float:
    """The full learning rate for a global batch.

    >>> rules = ("none", "linear", "sqrt", "legw")
    >>> [scaled_lr(OptimConfig(lr=0.1, scaling=rule, base_size=256), global_size=1024) for rule in rules]
    [0.1, 0.4, 0.2, 0.2]
    """
    return config.lr * lr_factor(config.scaling, config.batch_ratio(global_size))


def warmup_steps(config: OptimConfig, *, global_size: int, steps_per_epoch: int) -> int:
    """The number of warm-up steps: warmup_epochs epochs; with legw k = B / base_size times as many.

    >>> rules = ("sqrt", "legw")
    >>> configs = [OptimConfig(scaling=rule, base_size=8, warmup_epochs=0.5) for rule in rules]
    >>> [warmup_steps(config, global_size=32, steps_per_epoch=10) for config in configs]
    [5, 20]
    """
    factor = config.batch_ratio(global_size) if config.scaling == "legw" else 1.0
    return round(config.warmup_epochs * factor * steps_per_epoch)


def decay_steps(config: OptimConfig, num_steps: int) -> int:
    """The number of steps in which the wsd schedule falls, at least one.

    >>> decay_steps(OptimConfig(decay_fraction=0.25), num_steps=10)
    2
    """
    return max(1, round(config.decay_fraction * num_steps))


def lr_at(step: int, config: OptimConfig, *, global_size: int, steps_per_epoch: int, num_steps: int) -> float:
    """The learning rate of step number `step` (from 0) of `num_steps`.

    Warm-up: rate * (step + 1) / W over the first W = `warmup_steps`. From there, with t = (step - W) / (num_steps - W):

        constant: rate                                      step: rate * gamma^(number of milestones m passed)
        cosine:         rate * (1 + cos(pi t)) / 2          polynomial: rate * (1 - t)^power
        wsd:            rate * min(1, (num_steps - step) / D), D = round(decay_fraction * num_steps)   Hu et al. 2024

    A milestone m is passed at step round(m * num_steps).

    >>> def rates(**settings):
    ...     config = OptimConfig(lr=1.0, warmup_epochs=1.0, **settings)
    ...     return [round(lr_at(s, config, global_size=8, steps_per_epoch=2, num_steps=6), 3) for s in range(6)]
    >>> rates()
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    >>> rates(schedule="step", milestones=(0.5, 0.8), gamma=0.1)
    [0.5, 1.0, 1.0, 0.1, 0.1, 0.01]
    >>> rates(schedule="cosine")
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    >>> rates(schedule="polynomial", power=2.0)
    [0.5, 1.0, 1.0, 0.562, 0.25, 0.062]
    >>> rates(schedule="wsd", decay_fraction=0.5)
    [0.5, 1.0, 1.0, 1.0, 0.667, 0.333]
    """
    full = scaled_lr(config, global_size)
    warmup = warmup_steps(config, global_size=global_size, steps_per_epoch=steps_per_epoch)
    if step < warmup:
        return full * (step + 1) / warmup
    t = (step - warmup) / max(1, num_steps - warmup)
    match config.schedule:
        case "step":
            return full * config.gamma ** sum(step >= round(m * num_steps) for m in config.milestones)
        case "cosine":
            return full * (1 + math.cos(math.pi * t)) / 2
        case "polynomial":
            return full * (1 - t) ** config.power
        case "wsd":
            return full * min(1.0, (num_steps - step) / decay_steps(config, num_steps))
    return full


def momentum_at(step: int, config: OptimConfig, lr: Callable[[int], float]) -> float:
    """The momentum of step number `step` (from 0) under rates `lr`, for optimizers with u = m u + g and w -= lr u.

    In this form a new rate applies to the whole buffer, which is the correction of Goyal et al. 2017 (remark 2).
    Without it, v = m v + lr g and w -= v: with v = lr u, this equals a momentum of m * lr_(t-1) / lr_t.

    >>> config = OptimConfig(momentum=0.5, momentum_correction=False)
    >>> [momentum_at(step, config, [1.0, 1.0, 0.1, 0.1].__getitem__) for step in range(4)]
    [0.5, 0.5, 5.0, 0.5]
    """
    if config.momentum_correction or step == 0:
        return config.momentum
    before, now = lr(step - 1), lr(step)
    return config.momentum * (before / now if now else 1.0)  # at rate 0 the momentum has no effect


@final
@dataclass(frozen=True)
class Schedule:
    """The length of one run, and the learning rate and momentum of each step."""

    optim: OptimConfig
    global_size: int
    """Of the first step."""
    steps_per_epoch: int
    """Steps per epoch of warm-up."""
    num_steps: int
    rate_factor: Callable[[int], float] = lambda step: 1.0
    """Factor of the rate of a step for the growth of its batch."""

    @classmethod
    def of(cls, config: RunConfig, sampler: EpochSampler) -> Self:
        """The schedule of a run that draws samples with `sampler`.

        The length is train.steps, train.tokens, or train.epochs passes. With train.length_unit=updates it is the
        number of steps that a global batch of optim.base_size makes in these epochs, also for warm-up (regime
        adaptation; Hoffer et al. 2017).

        >>> settings = {"batch": {"global_size": 50}, "optim": {"base_size": 10}, "train": {"epochs": 3}}
        >>> sampler = EpochSampler(100, 50, seed=0)
        >>> Schedule.of(RunConfig.model_validate(settings), sampler).num_steps
        6
        >>> settings["train"]["length_unit"] = "updates"
        >>> Schedule.of(RunConfig.model_validate(settings), sampler).num_steps
        30

        Raises:
            UsageError: if warm-up does not end before the run, the first milestone of step, the decay of wsd or the
                first change of batch.schedule, or if such a change comes after the end of the run.
        """
        train, optim = config.train, config.optim
        steps_per_epoch, num_steps = sampler.steps_per_epoch, train.steps or sampler.num_steps(train.epochs)
        if train.tokens:
            num_steps = sampler.num_steps_of_tokens(train.tokens)
        if train.length_unit == "updates" and optim.base_size:
            base_steps = -(-sampler.num_samples // optim.base_size)
            num_steps = train.epochs * base_steps
            if optim.scaling != "legw":  # legw already has this factor
                steps_per_epoch = base_steps
        size, power = config.batch.global_size, config.batch.schedule_lr_power

        def factor(step: int) -> float:
            return (sampler.phase(step).size / size) ** power

        schedule = cls(optim, size, steps_per_epoch, num_steps, factor)
        for phase in sampler.phases:
            if phase.step >= num_steps:
                raise UsageError(
                    f"batch.schedule never starts with {phase.size}: that would be before step {phase.step + 1} of a "
                    f"run of {num_steps}: choose an earlier place, or a longer run"
                )
        schedule._check_warmup(sampler)
        return schedule

    def _check_warmup(self, sampler: EpochSampler) -> None:
        optim, size = self.optim, self.global_size
        steps = warmup_steps(optim, global_size=size, steps_per_epoch=self.steps_per_epoch)
        end, part = self.num_steps, "the run"
        if optim.schedule == "step" and optim.milestones:
            end, part = round(optim.milestones[0] * self.num_steps), "the part before the first of optim.milestones"
        elif optim.schedule == "wsd":
            end = self.num_steps - decay_steps(optim, self.num_steps)
            part = "the part before the decay of optim.decay_fraction"
        if len(sampler.phases) > 1 and sampler.phases[1].step < end:
            end, part = sampler.phases[1].step, "the part before the batch of batch.schedule grows"
        if steps and steps >= end:
            legw = f", {optim.batch_ratio(size):g} times as many under optim.scaling=legw,"
            raise UsageError(
                f"optim.warmup_epochs ({optim.warmup_epochs:g}){legw if optim.scaling == 'legw' else ''} are {steps} "
                f"steps, and {part} has {end}: choose a smaller value, or a longer run"
            )

    def lr(self, step: int) -> float:
        """The learning rate of step number `step` (from 0): see `lr_at`, times (B / B0)^batch.schedule_lr_power."""
        return self.rate_factor(step) * lr_at(step, self.optim, **self._run_sizes())

    def momentum(self, step: int) -> float:
        """The momentum of step number `step` (from 0), see `momentum_at`."""
        return momentum_at(step, self.optim, self.lr)

    def _run_sizes(self) -> dict[str, int]:
        sizes = {"global_size": self.global_size, "steps_per_epoch": self.steps_per_epoch}
        return sizes | {"num_steps": self.num_steps}
