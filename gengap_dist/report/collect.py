"""Run folders as data for tables and figures."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gengap_dist.comparison.pairing import Paired, paired
from gengap_dist.tracking.record import FINISHED, load_spectra, read_info, read_metrics


@dataclass(frozen=True)
class RunData:
    """One run folder."""

    folder: Path
    arm: str
    info: dict[str, Any] = field(repr=False)

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.info["seed"]

    @property
    def global_size(self) -> int:
        """Its global batch."""
        return self.info["config"]["batch"]["global_size"]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return list(read_metrics(self.folder))

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of metric `name`, where the metric was recorded."""
        points = [(line[against], line[name]) for line in self.lines if name in line]
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.array(x, dtype=float), np.array(y, dtype=float)

    def untrained_and_trained(self, name: str) -> tuple[float, float]:
        """A probe's metric at the first and at the last measurement; nan where that measurement lacks it."""
        probed = [line for line in self.lines if "probe_seconds/near_rank_loss" in line]
        ends = (probed[0], probed[-1]) if probed else ({}, {})
        return ends[0].get(name, float("nan")), ends[1].get(name, float("nan"))

    def spectra_steps(self) -> list[int]:
        """Steps whose spectra are on disk."""
        return sorted(int(path.stem.split("_")[1]) for path in (self.folder / "spectra").glob("step_*.npz"))

    def spectra(self, step: int) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """Layer key to singular values and facts, at one step."""
        return load_spectra(self.folder / "spectra" / f"step_{step:08d}.npz")


@dataclass(frozen=True)
class StudyData:
    """A study folder, or one run seen as a study of one arm."""

    folder: Path
    name: str
    question: str
    baseline: str
    arms: list[str]
    runs: list[RunData]
    info: dict[str, Any] = field(repr=False)

    def of(self, arm: str) -> list[RunData]:
        """Runs of one arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def finished(self, arm: str) -> list[RunData]:
        """Runs of one arm that came to their end, by seed."""
        return [run for run in self.of(arm) if run.info["status"] == FINISHED]

    def results(self, arm: str, name: str) -> dict[int, float]:
        """Seed to a final result, over the finished runs of an arm that have it."""
        values = {run.seed: run.info["result"].get(name) for run in self.finished(arm)}
        return {seed: value for seed, value in values.items() if value is not None}

    def gap(self, arm: str, name: str = "test/accuracy") -> Paired | None:
        """Baseline minus arm, paired by seed; None where no seed has both."""
        ours, theirs = self.results(arm, name), self.results(self.baseline, name)
        return paired(theirs, ours) if ours.keys() & theirs.keys() else None

    def not_finished(self, arm: str) -> str:
        """How many runs of an arm ended otherwise, in words; empty if none."""
        counts: dict[str, int] = {}
        for run in self.of(arm):
            if run.info["status"] != FINISHED:
                counts[run.info["status"]] = counts.get(run.info["status"], 0) + 1
        return ", ".join(f"{number} {status}" for status, number in counts.items())

    def layer_keys(self) -> list[str]:
        """Layer keys that were measured, in the model's order."""
        for run in self.runs:
            if steps := run.spectra_steps():
                return list(run.spectra(steps[0]))
        return []


def metric(measure: str, key: str, threshold: str = "") -> str:
    """The metric name of a measure of a layer, see `probes.metrics`.

    >>> metric("near_rank_loss", "fc2/centred", "abs_1e-2")
    'near_rank_loss/fc2/centred/abs_1e-2'
    """
    return "/".join(filter(None, (measure, key, threshold)))


def read_run(folder: Path, arm: str | None = None) -> RunData:
    """One run folder.

    Raises:
        UsageError: if it is none.
    """
    return RunData(folder, arm or folder.name, read_info(folder))


def read_study(folder: Path) -> StudyData:
    """A study folder, or a single run's folder as a study of one arm.

    Raises:
        UsageError: if it is neither.
    """
    if not (folder / "study.json").exists():
        run = read_run(folder)
        return StudyData(folder, folder.name, "", run.arm, [run.arm], [run], run.info)
    info = read_info(folder / "study.json")
    paths = sorted(folder.glob("runs/*/*/run.json"))
    runs = [read_run(path.parent, path.parent.parent.name) for path in paths]
    runs = [run for run in runs if run.arm in info["arms"]]
    return StudyData(folder, info["name"], info["question"], info["baseline"], info["arms"], runs, info)
