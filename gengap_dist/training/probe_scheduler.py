"""Decides at which steps of a run the network is measured, so that probes take a limited part of its time."""

import time
from collections.abc import Callable
from typing import Any, final

from torch import nn

from gengap_dist.config.sections import ProbeConfig
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.probes.cadence import any_of, at_steps, every, log_spaced, should_skip, spread
from gengap_dist.training.evaluation import Score
from gengap_dist.training.loss_trigger import LossTrigger, loss_grid
from gengap_dist.training.observer import Observation, ProbeObserver, measurement_seconds
from gengap_dist.training.state import TrainState

MIN_MEASUREMENTS = 8  # planned ones that are taken whatever their time: a curve needs points


@final
class ProbeScheduler:
    """Measures at the first and the last step, and at those between that the config names and the time allows.

    The config names steps, and losses at which to measure.
    """

    def __init__(self, config: ProbeConfig, sampler: EpochSampler, observer: ProbeObserver, state: TrainState) -> None:
        """Measure with `observer` while `state` changes."""
        self.config, self.observer, self.state = config, observer, state
        cadences = [at_steps(map(sampler.step_at, config.at_epochs))]
        cadences += [log_spaced(config.per_decade)] if config.per_decade else []
        cadences += [every(config.every)] if config.every else []
        self._in_cadence = any_of(*cadences)
        self.trigger = LossTrigger(loss_grid(config.at_losses) if config.enabled else ())
        self.seconds = 0.0
        """Seconds of all measurements."""
        self.skipped_steps: list[int] = []
        self._seconds_each, self._num_skipped_in_a_row = 0.0, 0
        self._always: frozenset[int] | None = None  # steps whose measurement is never skipped

    def possible(self, step: int) -> bool:
        """Whether a measurement is planned after `step` steps, whatever the loss; it may be skipped to save time."""
        return self.config.enabled and (step == self.state.num_steps or self._in_cadence(step))

    def triggered(self) -> bool:
        """Whether the loss asks for a measurement now; known when the steps but the last one are recorded."""
        return self.trigger.due(self.state.step)

    def due(self) -> bool:
        """Whether to measure now."""
        step = self.state.step
        planned = (self._in_cadence(step) or self.triggered()) and step not in self.skipped_steps[-1:]
        return self.config.enabled and (self.state.at_first_or_last or planned)

    def exceeds_time(self, run_seconds: float, seconds_per_step: float) -> bool:
        """Whether the measurement planned now would take more than probe.max_time_fraction of the run.

        The first and the last one never do, nor others of `MIN_MEASUREMENTS` spread over the planned ones. Rank 0
        decides, by its clock.

        Args:
            run_seconds: seconds since the run began.
            seconds_per_step: of the last steps.
        """
        step, num_steps = self.state.step, self.state.num_steps
        is_planned = self.possible(step) or self.triggered()
        if self.config.max_time_fraction is None or step == num_steps or not is_planned:
            return False
        if self._always is None:
            self._always = spread([*filter(self.possible, range(num_steps + 1))], MIN_MEASUREMENTS)
        if step in self._always:
            return False
        num_in_cadence = sum(map(self._in_cadence, range(step, num_steps)))
        num_triggered = self.trigger.num_remaining + (not self._in_cadence(step))  # at most
        return should_skip(
            self.config.max_time_fraction,
            spent_seconds=self.seconds,
            seconds_each=self._seconds_each,
            other_seconds=run_seconds - self.seconds + (num_steps - step) * seconds_per_step,
            num_remaining=num_in_cadence + num_triggered,
            num_skipped_in_a_row=self._num_skipped_in_a_row,
        )

    def skip(self) -> None:
        """Skip the measurement planned now."""
        self._num_skipped_in_a_row += 1
        self.skipped_steps.append(self.state.step)

    def measure(
        self, model: nn.Module, record: Callable[[Observation], None], validate: Callable[[nn.Module], Score] | None
    ) -> None:
        """Measure near-rank loss, loss and diagnostics on the probe set; at both ends also controls. Collective.

        A network that cannot be measured ends a run before its first step only.

        Args:
            model: the network.
            record: writes what was found; its time counts, too.
            validate: the score on the validation samples, which counts as part of the measurement; None: it is known.
        """
        start_time = time.monotonic()
        observation = self.observer(model, controls=self.state.at_first_or_last, required=self.state.step == 0)
        validation_start = time.monotonic()
        if validate is not None and (score := validate(model)):
            observation.metrics.update({f"val/{name}": value for name, value in score.items()})
            observation.metrics["probe_seconds/validation"] = time.monotonic() - validation_start
        record(observation)
        self.seconds += time.monotonic() - start_time
        self._seconds_each, self._num_skipped_in_a_row = measurement_seconds(observation.metrics), 0

    def summary(self) -> dict[str, Any]:
        """What the result says: seconds of all measurements, and the steps that were skipped."""
        return {"probe_seconds": round(self.seconds, 3), "probe_left_out": self.skipped_steps}

    def state_dict(self) -> dict[str, Any]:
        """Times, the steps that were skipped, and the last losses."""
        return {
            "seconds": self.seconds,
            "seconds_each": self._seconds_each,
            "skipped_steps": self.skipped_steps,
            "trigger": self.trigger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.seconds, self._seconds_each = state["seconds"], state["seconds_each"]
        self.skipped_steps = list(state["skipped_steps"])
        self.trigger.load_state_dict(state.get("trigger", {}))
