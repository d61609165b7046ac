"""Decides at which steps of a run the network is measured, so that probes take a limited part of its time."""

import time
from collections.abc import Callable
from typing import Any, final

from torch import nn

from gengap_dist.config.sections import ProbeConfig
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.probes.cadence import any_of, at_steps, every, log_spaced, should_skip
from gengap_dist.training.observer import Observation, ProbeObserver, measurement_seconds
from gengap_dist.training.state import TrainState


@final
class ProbeScheduler:
    """Measures at the first and the last step, and at those between that the config names and the time allows."""

    def __init__(self, config: ProbeConfig, sampler: EpochSampler, observer: ProbeObserver, state: TrainState) -> None:
        """Measure with `observer` while `state` changes."""
        self.config, self.observer, self.state = config, observer, state
        cadences = [at_steps(map(sampler.step_at, config.at_epochs))]
        cadences += [log_spaced(config.per_decade)] if config.per_decade else []
        cadences += [every(config.every)] if config.every else []
        self._in_cadence = any_of(*cadences)
        self.seconds = 0.0
        """Seconds of all measurements."""
        self.skipped_steps: list[int] = []
        self._seconds_each, self._num_skipped_in_a_row = 0.0, 0

    def possible(self, step: int) -> bool:
        """Whether a measurement is planned after `step` steps; it may be skipped to save time."""
        return self.config.enabled and (step == self.state.num_steps or self._in_cadence(step))

    def due(self) -> bool:
        """Whether to measure now."""
        step = self.state.step
        planned = self._in_cadence(step) and step not in self.skipped_steps[-1:]
        return self.config.enabled and (self.state.at_first_or_last or planned)

    def exceeds_time(self, run_seconds: float, seconds_per_step: float) -> bool:
        """Whether the measurement planned now would take more than probe.max_time_fraction of the run.

        The first and the last one never do. Rank 0 decides, by its clock.

        Args:
            run_seconds: seconds since the run began.
            seconds_per_step: of the last steps.
        """
        step, num_steps = self.state.step, self.state.num_steps
        if self.config.max_time_fraction is None or step == num_steps or not self.possible(step):
            return False
        return should_skip(
            self.config.max_time_fraction,
            spent_seconds=self.seconds,
            seconds_each=self._seconds_each,
            other_seconds=run_seconds - self.seconds + (num_steps - step) * seconds_per_step,
            num_remaining=sum(map(self._in_cadence, range(step, num_steps))),
            num_skipped_in_a_row=self._num_skipped_in_a_row,
        )

    def skip(self) -> None:
        """Skip the measurement planned now."""
        self._num_skipped_in_a_row += 1
        self.skipped_steps.append(self.state.step)

    def measure(self, model: nn.Module, record: Callable[[Observation], None]) -> None:
        """Measure near-rank loss and diagnostics on the probe set; at both ends also controls. Collective.

        `record` writes what was found; its time counts, too. A network that cannot be measured ends a run before its
        first step only.
        """
        start_time = time.monotonic()
        observation = self.observer(model, controls=self.state.at_first_or_last, required=self.state.step == 0)
        record(observation)
        self.seconds += time.monotonic() - start_time
        self._seconds_each, self._num_skipped_in_a_row = measurement_seconds(observation.metrics), 0

    def summary(self) -> dict[str, Any]:
        """What the result says: seconds of all measurements, and the steps that were skipped."""
        return {"probe_seconds": round(self.seconds, 3), "probe_left_out": self.skipped_steps}

    def state_dict(self) -> dict[str, Any]:
        """Times, and the steps that were skipped."""
        return {"seconds": self.seconds, "seconds_each": self._seconds_each, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.seconds, self._seconds_each = state["seconds"], state["seconds_each"]
        self.skipped_steps = list(state["skipped_steps"])
