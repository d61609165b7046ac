"""Times of a run: seconds of each phase on each rank, and of training, in windows between two records."""

import time
from typing import final

import torch
from torch import Tensor

from gengap_dist.distributed.phase_timer import PHASES
from gengap_dist.distributed.process_group import World
from gengap_dist.training.state import TrainState


@final
class RunTimes:
    """Adds up the times of one start of a run. A window ends when something other than steps is due."""

    def __init__(self, world: World, state: TrainState) -> None:
        """No time has passed; `state` gets the seconds of training."""
        self.world, self.state = world, state
        self._phase_seconds = torch.zeros(world.size, len(PHASES), dtype=torch.float64)  # of this start
        self._start_time, self._start_step = time.monotonic(), 0

    def begin(self) -> None:
        """Begin a window of training."""
        self._start_time, self._start_step = time.monotonic(), self.state.step

    def exclude(self, seconds: float) -> None:
        """Do not count `seconds` of the window as training."""
        self._start_time += seconds

    def seconds_per_step(self) -> float:
        """In the window, which has steps, by this rank's clock."""
        return (time.monotonic() - self._start_time) / (self.state.step - self._start_step)

    def record(self, *flags: bool) -> tuple[dict[str, float], list[bool]]:
        """End the window: its metrics, and the `flags` of rank 0, on every rank. Collective."""
        shared = torch.zeros(len(flags) + self._phase_seconds.numel(), dtype=torch.float64)
        times = shared[len(flags) :].view_as(self._phase_seconds)
        times[self.world.rank] = torch.tensor(self.world.timer.pop_seconds())
        if self.world.rank == 0:
            shared[: len(flags)] = torch.tensor(flags)
        self.world.all_reduce(shared, "times of the last steps")
        self._phase_seconds += times
        self.state.train_seconds += time.monotonic() - self._start_time
        return time_metrics(times), shared[: len(flags)].bool().tolist()

    def totals(self) -> dict[str, float]:
        """The metrics of all windows."""
        return time_metrics(self._phase_seconds)


def time_metrics(times: Tensor) -> dict[str, float]:
    """Mean seconds by phase, and the slowest rank, from seconds by rank and phase [ranks, phases].

    >>> seconds = torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]])
    >>> time_metrics(seconds)["time/slowest_rank"]
    0
    """
    out: dict[str, float] = {f"time/{kind}": round(float(x), 4) for kind, x in zip(PHASES, times.mean(0), strict=True)}
    busy_seconds = times[:, :2].sum(1)  # data and compute; other ranks wait, which counts as communication
    if len(busy_seconds) > 1 and busy_seconds.sum() > 0:
        slowest = int(busy_seconds.argmax())
        out |= {
            "time/slowest_rank": slowest,
            "time/slowest_over_mean": round(float(busy_seconds[slowest] / busy_seconds.mean()), 3),
        }
    return out


def memory_peaks(world: World) -> dict[str, list[float]]:
    """Peak GPU memory allocated by torch since this start, in GiB, by rank; {} on CPUs. Collective."""
    if world.device.type != "cuda":
        return {}
    peaks = torch.zeros(world.size, dtype=torch.float64)
    peaks[world.rank] = torch.cuda.max_memory_allocated(world.device) / 2**30
    return {"memory_peak_gib": [round(peak, 3) for peak in world.all_reduce(peaks, "peaks of memory").tolist()]}
