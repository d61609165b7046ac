"""Run folders as data for tables and figures."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.analysis.compare import compare
from gengap_dist.analysis.results import Comparison, Run
from gengap_dist.config.identity import settings_of
from gengap_dist.config.metric_key import CONTROLS, MEASURED
from gengap_dist.errors import UsageError
from gengap_dist.runs.metrics_table import MetricsTable
from gengap_dist.runs.run_folder import FINISHED, load_spectra, read_info, read_metrics_table
from gengap_dist.statistics.paired import Paired, paired

EXPLANATIONS = re.compile(MEASURED + "|relative_distance_from_init")
CURVES = ("step", "epoch", "train/loss", "val/accuracy")  # what figures draw of every run
MEASURED_AT = "probe_seconds/near_rank_loss"  # in every line of a measurement


class _Recorded(NamedTuple):
    """What is kept in memory of metrics.jsonl: a study may have thousands of runs."""

    first: Mapping[str, float]
    last: Mapping[str, float]
    num_epochs: float
    curves: MetricsTable


def _digest(found: MetricsTable) -> _Recorded:
    if MEASURED_AT in found.columns:
        measured = np.flatnonzero(found.known[:, found.columns[MEASURED_AT]])
        first, last = found.line(measured[0]), found.line(measured[-1])
    else:  # a run that something else has trained measures when it likes
        ends = {name: found.series(name)[1][[0, -1]] for name in found.columns if EXPLANATIONS.fullmatch(name)}
        first, last = ({name: float(end[at]) for name, end in ends.items()} for at in (0, 1))
    epochs = found.series("epoch")[1]
    return _Recorded(first, last, float(epochs[-1]) if len(epochs) else 0.0, found.only(CURVES))


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

    def history(self) -> MetricsTable:
        """All that was recorded, read anew."""
        return read_metrics_table(self.folder)

    @cached_property
    def _recorded(self) -> _Recorded:
        return _digest(self.history())

    @property
    def num_epochs(self) -> float:
        """Epochs at the last recorded step; 0 if none was recorded."""
        return self._recorded.num_epochs

    def check(self) -> None:
        """Read what the report needs.

        Raises:
            ValueError: if metrics.jsonl is damaged.
        """
        _ = self._recorded

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of `name`, one of CURVES, where it was recorded."""
        return self._recorded.curves.series(name, against)

    def probed(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The lines of the first and of the last measurement; empty if there is none."""
        return self._recorded.first, self._recorded.last

    def untrained_and_trained(self, name: str) -> tuple[float, float]:
        """A probe's metric at the first and at the last measurement; nan where that measurement lacks it."""
        first, last = self.probed()
        return first.get(name, float("nan")), last.get(name, float("nan"))

    def explanation(self, name: str) -> float:
        """What a correlation calls `name`, at the last measurement; nan if this run lacks it."""
        if name == "updates":
            return float((self.info.get("result") or {}).get("num_steps", float("nan")))
        return self.untrained_and_trained(name)[1]

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
    unreadable: list[str] = field(default_factory=list)
    """Folders of runs whose run.json is missing or damaged, in words."""

    def of(self, arm: str) -> list[RunData]:
        """Runs of one arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def finished(self, arm: str) -> list[RunData]:
        """Runs of one arm that came to their end, by seed."""
        return [run for run in self.of(arm) if run.info["status"] == FINISHED]

    def results(self, arm: str, name: str) -> dict[int, float]:
        """Seed to a final result, over the finished runs of an arm that have it."""
        values = {run.seed: (run.info.get("result") or {}).get(name) for run in self.finished(arm)}
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
        trials = (self.info.get("tuned") or {}).get(arm, {}).get("trials", ())
        if trials and not self.of(arm):
            return f"none of {len(trials)} trials finished"
        return ", ".join(f"{number} {status}" for status, number in counts.items())

    @cached_property
    def comparison(self) -> Comparison:
        """What the study says, see `compare.compare`."""
        order = {arm: number for number, arm in enumerate(self.arms)}
        tuned = tuned_in(self.info)
        runs = sorted(self.runs, key=lambda run: (order[run.arm], run.seed))
        return compare([_seen(run, tuned) for run in runs], self.baseline)

    def against(self, baseline: str) -> "StudyData":
        """The same with another baseline."""
        return replace(self, baseline=baseline, info=self.info | {"baseline": baseline})

    def layer_keys(self) -> list[str]:
        """Layer keys that were measured, in the model's order."""
        for run in self.runs:
            if steps := run.spectra_steps():
                return list(run.spectra(steps[0]))
        return []


def _seen(run: RunData, tuned: Collection[str]) -> Run:
    """A run as comparisons see it; settings that were tuned for each arm do not tell arms apart."""
    info, result = run.info, run.info.get("result") or {}
    settings = {name: value for name, value in settings_of(info).items() if name not in tuned}
    first, last = run.probed()
    num_updates = int(result.get("num_steps") or info.get("num_steps") or 0)
    return Run(
        arm=run.arm,
        seed=run.seed,
        status=info["status"],
        global_size=run.global_size,
        num_updates=num_updates,
        num_epochs=run.num_epochs,
        settings=settings,
        accuracy=result.get("test/accuracy"),
        measures=_explanations(last),
        own_batch=_explanations(last, "/own_batch"),
        own_batch_untrained=_explanations(first, "/own_batch"),
        num_probe_samples=info.get("num_probe_samples"),
        target=_section(info, "train").get("target_accuracy"),
        updates_to_target=result.get("updates_to_target"),
    )


def tuned_in(study: Mapping[str, Any]) -> frozenset[str]:
    """Settings that a study has tuned."""
    return frozenset(name for found in (study.get("tuned") or {}).values() for name in found.get("best") or {})


def _section(info: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a run's settings; empty where something else has trained it."""
    found = info["config"].get(name)
    return found if isinstance(found, Mapping) else {}


def _explanations(line: Mapping[str, float], probe_set: str = "") -> dict[str, float]:
    """What may explain a gap: raw activations of the fixed probe set, or of another, by the name of the fixed one.

    >>> line = {"nc1": 2.0, "effective_rank/a": 8.0, "effective_rank/a/centred": 7.0, "effective_rank/a/own_batch": 3.0}
    >>> _explanations(line), _explanations(line, "/own_batch")
    ({'nc1': 2.0, 'effective_rank/a': 8.0}, {'effective_rank/a': 3.0})
    """
    names = {name.replace(probe_set, ""): name for name in line if probe_set in name}
    return {
        name: float(line[full])
        for name, full in names.items()
        if EXPLANATIONS.fullmatch(name) and not CONTROLS.search(name) and math.isfinite(line[full])
    }


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
    info = read_info(folder)
    if lacking := [name for name in ("seed", "status", "config") if name not in info]:
        raise UsageError(f"{folder / 'run.json'} lacks {', '.join(lacking)}: give the folder of a run")
    return RunData(folder, arm or folder.name, info)


def read_study(folder: Path) -> StudyData:
    """A study folder, or a single run's folder as a study of one arm.

    Raises:
        UsageError: if it is neither.
    """
    if not (folder / "study.json").exists():
        run = read_run(folder)
        return StudyData(folder, folder.name, "", run.arm, [run.arm], [run], run.info)
    info = read_info(folder / "study.json")
    members = info.get("members") or [
        {"folder": path, "arm": path.parent.name} for path in sorted(folder.glob("runs/*/*")) if path.is_dir()
    ]
    runs, unreadable = [], []
    for member in (member for member in members if member["arm"] in info["arms"]):
        try:
            run = read_run(Path(member["folder"]), member["arm"])
            run.check()
            runs += [run] if run.seed in info["seeds"] else []
        except UsageError as error:
            unreadable.append(str(error).replace(f"{folder}/", ""))
        except (KeyError, TypeError, ValueError) as error:
            unreadable.append(f"{member['folder']} is not whole ({type(error).__name__}: {error})")
    return StudyData(folder, info["name"], info["question"], info["baseline"], info["arms"], runs, info, unreadable)
