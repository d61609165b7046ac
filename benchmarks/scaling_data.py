"""Results of scaling.py: seconds of steps, constants of the time model, and ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import paired_timing
from predicted import Mode, Task, predict

from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.communication_model import Link
from gengap_dist.preflight.machine_constants import ComputeConstants, LinkConstants


class Point(NamedTuple):
    """One kind of step."""

    model: str
    mode: Mode
    ranks: int
    global_size: int


class Measurements(NamedTuple):
    """All measurements; each list has one entry per round."""

    tasks: dict[str, Task]
    steps: dict[Point, list[float]]
    """Seconds."""
    beside: dict[str, list[ComputeConstants]]
    """By network, measured on two ranks at the same time, as in `gengap plan --calibrate`."""
    alone: dict[str, list[ComputeConstants]]
    links: list[LinkConstants]

    def predicted(self, point: Point, compute: Mapping[str, Sequence[ComputeConstants]]) -> list[float]:
        """Seconds of a step with the constants of each round."""
        cluster, task = Cluster(1, point.ranks), self.tasks[point.model]
        links = [Link(link.alpha, link.beta) for link in self.links]
        pairs = zip(compute[point.model], links, strict=True)
        return [predict(task, point.global_size, cluster, constants, link, link) for constants, link in pairs]

    def single(self, point: Point) -> list[float]:
        """Seconds of one rank's step in the same mode."""
        return next(
            self.steps[one] for one in self.steps if (one.model, one.mode, one.ranks) == (point.model, point.mode, 1)
        )

    def efficiency(self, point: Point) -> paired_timing.Ratio:
        """Images per second per rank over those of a single rank."""
        share = point.ranks if point.mode == "strong" else 1
        return paired_timing.ratio(self.single(point), [share * seconds for seconds in self.steps[point]])

    def error(
        self, point: Point, compute: Mapping[str, Sequence[ComputeConstants]] | None = None
    ) -> paired_timing.Ratio:
        """Predicted over measured."""
        return paired_timing.ratio(self.predicted(point, compute or self.beside), self.steps[point])

    def contention(self, model: str) -> paired_timing.Ratio:
        """Time of a sample with a second busy rank over its time with a single rank."""
        kinds = (self.beside[model], self.alone[model])
        return paired_timing.ratio(*([each.seconds_per_sample for each in kind] for kind in kinds))


def median_compute(constants: Sequence[ComputeConstants]) -> ComputeConstants:
    """Median of each constant."""
    return ComputeConstants(
        seconds_per_sample=statistics.median(each.seconds_per_sample for each in constants),
        seconds_per_update=statistics.median(each.seconds_per_update for each in constants),
    )


def median_link(links: Sequence[LinkConstants]) -> Link:
    """Median of each constant."""
    return Link(statistics.median(link.alpha for link in links), statistics.median(link.beta for link in links))
