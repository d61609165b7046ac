"""Reads run folders and study folders for tables and figures."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import rank_role
from gengap_dist.analysis.compare import compare
from gengap_dist.analysis.looks import NEVER, look_of
from gengap_dist.analysis.registration import registration_sentence
from gengap_dist.analysis.results import Comparison, Curve, Run
from gengap_dist.analysis.rules.look import Look
from gengap_dist.config.identity import complete_settings
from gengap_dist.config.measures import OWN_BATCH, PRIMARY, PRIMARY_VIEWS, WEIGHT_VIEW
from gengap_dist.config.metric_key import LayerKey, MetricKey
from gengap_dist.errors import UsageError
from gengap_dist.runs.metric import ACCURACY, MetricDescription, metric_of, score_of
from gengap_dist.runs.metrics_table import MetricsTable
from gengap_dist.runs.mixtures import changed_data
from gengap_dist.runs.run_folder import (
    load_layer_facts,
    load_spectra,
    read_info,
    read_metrics_table,
    read_study_info,
    read_test_correct,
    spectra_by_step,
)
from gengap_dist.runs.schema import REMEDY, RunStatus, section
from gengap_dist.statistics.paired import Paired

PENALTY_NORM = "train/rank_penalty_grad_norm"
CURVES = ("step", "epoch", "train/loss", "train/lr", "probe/loss", PENALTY_NORM)  # kept of every run, with its metrics
MEASURED_AT = "probe_seconds/near_rank_loss"  # present in every line with a probe measurement


class _MetricsSummary(NamedTuple):
    """The part of metrics.jsonl that is kept in memory, because a study may have thousands of runs."""

    first: Mapping[str, float]
    last: Mapping[str, float]
    num_epochs: float
    curves: MetricsTable
    primary: str | None
    """Name of the primary measure."""


def _summarise_metrics(table: MetricsTable, metric: MetricDescription, layer: str | None) -> _MetricsSummary:
    if MEASURED_AT in table.columns:
        measured = table.column(MEASURED_AT)[0]
        first, last = table.line(measured[0]), table.line(measured[-1])
    else:  # a run of another program may measure at any step
        names = [name for name in table.columns if MetricKey.parse(name).known.is_explanation]
        ends = {name: table.series(name)[1][[0, -1]] for name in names}
        first, last = ({name: float(end[at]) for name, end in ends.items()} for at in (0, 1))
    epochs = table.series("epoch")[1]
    num_epochs = float(epochs[-1]) if len(epochs) else 0.0
    primary = _primary_measure(table.columns, layer)
    names = (*CURVES, f"val/{metric.name}", f"probe/{metric.name}", *([primary] if primary else ()))
    return _MetricsSummary(first, last, num_epochs, table.select_columns(names), primary)


def _primary_measure(names: Iterable[str], layer: str | None) -> str | None:
    """The metric that verdicts are about: centred near-rank loss of the last hidden layer; None if it is not there.

    Args:
        names: metrics of a run, in the order in which its layers run.
        layer: the last hidden layer; None, in runs of earlier versions: the last one that was measured.

    >>> names = [f"near_rank_loss/{key}/rel_1e-2" for key in ("fc1/centred", "fc2", "fc2/centred", "fc2/centred/n64")]
    >>> _primary_measure(names, "fc1"), _primary_measure(names, None)
    ('near_rank_loss/fc1/centred/rel_1e-2', 'near_rank_loss/fc2/centred/rel_1e-2')
    """
    keys = {name: MetricKey.parse(name) for name in names}
    found = {
        name: key
        for name, key in keys.items()
        if (f"{key.measure}/{key.threshold}", key.centred, key.probe_set) == (PRIMARY, True, "")
        and key.view in PRIMARY_VIEWS
    }
    wanted = layer or next((key.layer for key in reversed(found.values())), None)
    views = {PRIMARY_VIEWS.index(key.view): name for name, key in found.items() if key.layer == wanted}
    return views[min(views)] if views else None


@dataclass(frozen=True)
class RunData:
    """One run folder."""

    folder: Path
    arm: str
    info: dict[str, Any] = field(repr=False)
    damaged: list[str] = field(default_factory=list, repr=False)
    """One sentence for each damaged file of spectra that was asked for."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.info["seed"]

    @property
    def metric(self) -> MetricDescription:
        """The metric that the run is compared by."""
        return metric_of(self.info)

    @property
    def score(self) -> float | None:
        """`MetricDescription.score` of the metric on the test samples; None if there is none."""
        return score_of(self.info)

    @property
    def global_size(self) -> int:
        """Global batch size."""
        return self.info["config"]["batch"]["global_size"]

    @property
    def samples_per_second(self) -> float | None:
        """Speed of training; None if it is not known."""
        result = self.info.get("result") or {}
        return result.get("samples_per_second", result.get("images_per_second"))  # its name in schema 1

    @property
    def max_time_fraction(self) -> float:
        """`probe.max_time_fraction`; nan if it is not known."""
        fraction = section(self.info.get("config"), "probe").get("max_time_fraction")
        return math.nan if fraction is None else fraction

    @property
    def num_skipped(self) -> int:
        """Measurements that `probe.max_time_fraction` left out."""
        left_out = (self.info.get("result") or {}).get("probe_left_out")
        return len(left_out) if isinstance(left_out, list) else 0

    def in_arm(self, arm: str) -> "RunData":
        """The same run in another arm, with what was read of it."""
        out = replace(self, arm=arm)
        vars(out).update({name: value for name, value in vars(self).items() if name not in vars(out)})
        return out

    def history(self) -> MetricsTable:
        """All recorded metrics, read from disk at each call."""
        return read_metrics_table(self.folder)

    @cached_property
    def _recorded(self) -> _MetricsSummary:
        return _summarise_metrics(self.history(), self.metric, self.info.get("last_hidden_layer"))

    @property
    def num_epochs(self) -> float:
        """Epochs at the last recorded step; 0 if none was recorded."""
        return self._recorded.num_epochs

    def check(self) -> None:
        """Read what every comparison needs, to detect damage.

        Raises:
            UsageError: if it is damaged, or that of a finished run is missing.
        """
        has_metrics = any((self.folder / name).exists() for name in ("metrics.jsonl", "metrics.npz"))
        if not has_metrics and self.info["status"] == RunStatus.FINISHED:
            raise UsageError(f"{self.folder} is damaged: it has finished, and its metrics are missing; {REMEDY}")
        _ = self._recorded, self.test_correct()

    def series(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Values of `against` and of `name` at the steps where `name` was recorded.

        Names are those of CURVES, val/METRIC, probe/METRIC, and the primary measure.
        """
        return self._recorded.curves.series(name, against)

    @property
    def primary_measure(self) -> str | None:
        """The metric that verdicts are about: centred near-rank loss of the last hidden layer; None: not recorded."""
        return self._recorded.primary

    @property
    def penalty_norm(self) -> float | None:
        """See `results.Run`."""
        norms = self.series(PENALTY_NORM)[1]
        return float(np.mean(norms)) if len(norms) else None

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, losses on the probe set and `MetricDescription.score` of the validation metric, [k] float64 each.

        At the steps that have both. Empty for a run without validation samples, or of an earlier version.
        """
        table, names = self._recorded.curves, ("step", "probe/loss", f"val/{self.metric.name}")
        if not all(name in table.columns for name in names):
            return np.empty(0), np.empty(0), np.empty(0)
        recorded, known = table.values_at(table.series("step")[1], names)
        steps, losses, values = recorded[known.all(1)].T
        return steps, losses, values if self.metric.higher_is_better else -values

    def test_correct(self) -> np.ndarray | None:
        """Whether the run is right about each test sample, [M] bool; see `run_folder.read_test_correct`."""
        return read_test_correct(self.folder, self.info.get("result") or {})

    def first_and_last_probe(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The metrics at the first and at the last measurement; empty if there is none."""
        return self._recorded.first, self._recorded.last

    def untrained_and_trained(self, name: str) -> tuple[float, float]:
        """A probe's metric at the first and at the last measurement; nan where it is missing."""
        first, last = self.first_and_last_probe()
        return first.get(name, float("nan")), last.get(name, float("nan"))

    @property
    def num_units(self) -> dict[str, int]:
        """Layer to its number of units, where N / D is recorded with enough digits, and N is above D."""
        num_samples, out = self.info.get("num_probe_samples") or 0, {}
        for text, ratio in (self.info.get("samples_per_unit") or {}).items():
            key = LayerKey.parse(text)
            if key.view in ("", "pool") and ratio > 1 and num_samples < 1000 * ratio**2:  # it has three decimals
                out[key.layer] = round(num_samples / ratio)
        return out

    def explanation(self, name: str) -> float:
        """The measure `name` of a correlation, at the last measurement; nan if this run does not have it."""
        if name == "updates":
            return float((self.info.get("result") or {}).get("num_steps", float("nan")))
        return self.untrained_and_trained(name)[1]

    def spectra_steps(self) -> list[int]:
        """Steps with spectra on disk, in increasing order."""
        return [*spectra_by_step(self.folder / "spectra")]

    def spectra(self, step: int) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """Layer key to singular values and their metadata, at one step; {} if the file is damaged.

        Without those that `gengap clean` has removed.
        """
        return self._of_step(step, load_spectra)

    def layer_facts(self, step: int) -> dict[str, dict[str, Any]]:
        """Layer key to the metadata of its spectrum, of all that were measured at a step; {} if the file is damaged."""
        return self._of_step(step, load_layer_facts)

    def _of_step(self, step: int, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        try:
            return load(self.folder / "spectra" / f"step_{step:08d}.npz")
        except UsageError as error:
            self.damaged.extend({str(error)} - {*self.damaged})
            return {}


@dataclass(frozen=True)
class StudyData:
    """A study folder, or one run as a study of one arm."""

    folder: Path
    name: str
    question: str
    baseline: str
    arms: list[str]
    runs: list[RunData]
    info: dict[str, Any] = field(repr=False)
    unreadable: list[str] = field(default_factory=list)
    """One sentence for each run folder that is damaged."""

    @property
    def left_out(self) -> list[str]:
        """One sentence for each run that cannot be read, and each damaged file of spectra that a figure needed."""
        spectra = [f"Spectra are left out of the figures: {text}" for run in self.runs for text in run.damaged]
        return [*(f"A run is left out of the report: {text}" for text in self.unreadable), *spectra]

    def runs_of(self, arm: str) -> list[RunData]:
        """Runs of one arm, by seed."""
        return self._runs_by_arm.get(arm, [])

    @cached_property
    def _runs_by_arm(self) -> dict[str, list[RunData]]:
        out: dict[str, list[RunData]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            out.setdefault(run.arm, []).append(run)
        return out

    @cached_property
    def rank_roles(self) -> Mapping[str, str]:
        """Arm to what it does to the rank, see `arm_roles.rank_role`; arms without a penalty or a run are missing."""
        out = {}
        for arm, runs in self._runs_by_arm.items():
            algorithm = section(runs[0].info.get("config"), "algorithm")
            if role := rank_role({f"algorithm.{name}": value for name, value in algorithm.items()}):
                out[arm] = role
        return out

    def finished_runs(self, arm: str) -> list[RunData]:
        """Finished runs of one arm, by seed."""
        return [run for run in self.runs_of(arm) if run.info["status"] == RunStatus.FINISHED]

    def results(self, arm: str, name: str) -> dict[int, float]:
        """Seed to the final result `name`, for the finished runs of an arm that have it."""
        values = {run.seed: (run.info.get("result") or {}).get(name) for run in self.finished_runs(arm)}
        return {seed: value for seed, value in values.items() if value is not None}

    @cached_property
    def metric(self) -> MetricDescription:
        """The metric that the runs are compared by.

        Raises:
            UsageError: if they have different ones.
        """
        metrics = {run.metric.name: run.metric for run in self.runs}
        if len(metrics) > 1:
            raise UsageError(
                f"the runs in {self.folder} are compared by different metrics ({', '.join(metrics)}): compare runs of "
                "one task"
            )
        return next(iter(metrics.values()), ACCURACY)

    def test_values(self, arm: str) -> dict[int, float]:
        """Seed to the metric on the test samples, for the finished runs of an arm that have it."""
        return self.results(arm, f"test/{self.metric.name}")

    def scores(self, arm: str) -> dict[int, float]:
        """Seed to `MetricDescription.score` of `test_values`."""
        return {seed: self.metric.score(value) for seed, value in self.test_values(arm).items()}

    def gap(self, arm: str) -> Paired | None:
        """Score of the baseline minus that of another arm, paired by seed; None if no seed has both."""
        found = self.comparison.gaps.get(arm)
        return found.paired if found else None

    def unfinished_runs(self, arm: str) -> str:
        """Runs of an arm that did not finish, as text ("1 diverged"); empty if there are none."""
        counts: dict[str, int] = {}
        for run in self.runs_of(arm):
            if run.info["status"] != RunStatus.FINISHED:
                counts[run.info["status"]] = counts.get(run.info["status"], 0) + 1
        trials = (self.info.get("tuned") or {}).get(arm, {}).get("trials", ())
        if trials and not self.runs_of(arm):
            return f"none of {len(trials)} trials finished"
        return ", ".join(f"{number} {status}" for status, number in counts.items())

    @cached_property
    def comparison(self) -> Comparison:
        """The comparison with the baseline, see `compare.compare`."""
        order = {arm: number for number, arm in enumerate(self.arms)}
        tuned = tuned_settings(self.info)
        runs = sorted(self.runs, key=lambda run: (order[run.arm], run.seed))
        found = compare(
            [comparison_run(run, tuned) for run in runs],
            self.baseline,
            self.metric,
            margin=None if self.tolerance is None else float(self.tolerance) / self.metric.scale,
            look=self.look,
        )
        across = (self.info.get("config") or {}).get("across") or []  # what `gengap compare --across` was told to mix
        changed = changed_data({f"{run.arm}/{run.folder.name}": run.info for run in runs})
        mixed = [text[0].upper() + text[1:] + "." for text in dict.fromkeys([*across, *changed])]
        return found._replace(caveats=[*mixed, *found.caveats])

    @property
    def look(self) -> Look:
        """How sure differences must be; nothing is judged before all runs of a study have ended."""
        if reason := self.info.get("not_judged"):
            return NEVER._replace(sentence=reason)
        seeds, judged = self.info.get("seeds") or [], self.info.get("judged") or []
        return look_of(seeds, judged, self.declared, complete=not self.unfinished)

    @property
    def unfinished(self) -> list[tuple[str, int]]:
        """Arm and seed of each run that is planned and has not come to its end, or cannot be read."""
        planned = [(run.arm, run.seed) for run in self.runs]
        if self.info.get("members") is None:
            tuned = self.info.get("tuned") or {}  # an arm of which no trial finished has no runs
            arms = [arm for arm in self.arms if self.runs_of(arm) or arm not in tuned]
            planned = [*((arm, seed) for arm in arms for seed in self.info.get("seeds") or []), *planned]
        ended = {(run.arm, run.seed) for run in self.runs if RunStatus(run.info["status"]).is_final}
        return [each for each in dict.fromkeys(planned) if each not in ended]

    @property
    def tolerance(self) -> float | None:
        """`study.tolerance`."""
        return section(self.info.get("config"), "study").get("tolerance")

    @property
    def declared(self) -> Mapping[str, Any]:
        """`looks` and `may_extend` as they were when the study was first judged; else as they are set now."""
        return self.info.get("declared") or section(self.info.get("config"), "study")

    @property
    def registration(self) -> str:
        """Whether the configuration was committed before the first run, as a sentence; empty if it is not known."""
        started = [run.info["started"] for run in self.runs if run.info.get("started")]
        return registration_sentence(self.info.get("registration"), started)

    def with_baseline(self, baseline: str) -> "StudyData":
        """The same study with another baseline."""
        return replace(self, baseline=baseline, info=self.info | {"baseline": baseline})

    def layer_keys(self, *, with_spectra: bool = False) -> list[str]:
        """Keys of the measured layers on raw activations, in the model's order.

        With `with_spectra`, only of those whose spectra are in the folder of the first run that has some.
        """
        for run in self.runs:
            facts = run.spectra if with_spectra else run.layer_facts
            if (steps := run.spectra_steps()) and (keys := facts(steps[0])):
                return [key for key in keys if not LayerKey.parse(key).centred]
        return []


def comparison_run(run: RunData, tuned: Collection[str]) -> Run:
    """The data of a run that a comparison uses; settings tuned for each arm are left out."""
    info, result = run.info, run.info.get("result") or {}
    settings = {name: value for name, value in complete_settings(info["config"]).items() if name not in tuned}
    first, last = run.first_and_last_probe()
    num_updates = int(result.get("num_steps") or info.get("num_steps") or 0)
    metric, primary = run.metric, run.primary_measure
    trained, train_value = result.get("train_full/loss"), result.get(f"train_full/{run.metric.name}")
    chance = metric.chance
    if chance is None and metric.name == "loss":  # that of the untrained network
        chance = next(iter(run.series("probe/loss")[1].tolist()), None)
    untrained_and_trained = run.untrained_and_trained(primary) if primary else (math.nan, math.nan)
    near_rank_losses = [value if math.isfinite(value) else None for value in untrained_and_trained]
    return Run(
        arm=run.arm,
        seed=run.seed,
        status=info["status"],
        global_size=run.global_size,
        num_updates=num_updates,
        num_epochs=run.num_epochs,
        settings=settings,
        score=run.score if run.score is None or math.isfinite(run.score) else None,
        measures=_explanations(last),
        own_batch=_explanations(last, OWN_BATCH),
        own_batch_untrained=_explanations(first, OWN_BATCH),
        num_probe_samples=info.get("num_probe_samples"),
        target=_target(section(info.get("config"), "train")),
        updates_to_target=result.get("updates_to_target"),
        train_score=None if train_value is None else metric.score(float(train_value)),
        train_loss=None if trained is None else float(trained),
        chance=None if chance is None else metric.score(float(chance)),
        near_rank_loss=near_rank_losses[1],
        near_rank_loss_untrained=near_rank_losses[0],
        near_rank_loss_raw=_raw(last, primary),
        near_rank_loss_pooled=pooled_near_rank_loss(last, run.num_units),
        penalty_norm=run.penalty_norm,
        num_skipped=run.num_skipped,
        curve=_curve(run),
        test_correct=run.test_correct(),
    )


def _target(train: Mapping[str, Any]) -> str | None:
    """The validation score to reach, by a run's settings of `train`, as text.

    >>> _target({"target_accuracy": 0.8}), _target({"target_loss": 1.5}), _target({})
    ('80.0% validation accuracy', '1.5 validation loss', None)
    """
    if (accuracy := train.get("target_accuracy")) is not None:
        return f"{accuracy:.1%} validation accuracy"
    return None if train.get("target_loss") is None else f"{train['target_loss']:g} validation loss"


def _raw(line: Mapping[str, float], primary: str | None) -> float | None:
    value = line.get(MetricKey.parse(primary)._replace(centred=False).format()) if primary else None
    return value if value is not None and math.isfinite(value) else None


def pooled_near_rank_loss(line: Mapping[str, float], num_units: Mapping[str, int] | None = None) -> float | None:
    """Sum of near-rank counts over sum of the numbers of singular values, of centred activations of all layers.

    Args:
        line: metrics of one measurement.
        num_units: layer to its number of units, which is its number of singular values where no count is above 0,
            except in view flatten.

    Returns:
        None without a layer, or if the number of singular values of one is not known.

    >>> line = {"near_rank_count/a/centred/rel_1e-2": 2.0, "near_rank_loss/a/centred/rel_1e-2": 0.5}
    >>> line |= {"near_rank_count/b/centred/rel_1e-2": 0.0, "near_rank_loss/b/centred/rel_1e-2": 0.0}
    >>> pooled_near_rank_loss(line), pooled_near_rank_loss(line, {"b": 4})
    (None, 0.25)
    >>> line |= {"near_rank_count/b/centred/rel_1e-1": 3.0, "near_rank_loss/b/centred/rel_1e-1": 0.5}
    >>> pooled_near_rank_loss(line)
    0.2
    """
    known = num_units or {}
    counts: dict[MetricKey, float] = {}
    sizes: dict[MetricKey, float] = {}
    for name, share in line.items():
        key = MetricKey.parse(name)
        if key.measure != "near_rank_loss" or not key.centred or key.probe_set or key.view == WEIGHT_VIEW:
            continue
        count = line.get(key._replace(measure="near_rank_count").format())
        if count is None or not math.isfinite(count + share):
            continue
        of_layer = key._replace(threshold="")
        if f"{key.measure}/{key.threshold}" == PRIMARY:
            counts[of_layer] = count
        if share > 0:
            sizes[of_layer] = count / share
        elif key.layer in known and key.view != "flatten":  # which has more columns than units
            sizes.setdefault(of_layer, known[key.layer])
    if not counts or counts.keys() - sizes.keys():
        return None
    return sum(counts.values()) / sum(sizes[key] for key in counts)


def _curve(run: RunData) -> Curve | None:
    """What a run recorded at its measurements; None without both losses and scores."""
    steps, losses, scores = run.curve()
    if not len(steps):
        return None
    rate_steps, rates = run.series("train/lr")
    shares = (
        np.interp(steps, rate_steps, rates / rates.max()) if len(rates) and rates.max() > 0 else np.ones(len(steps))
    )
    near_rank_losses = np.full(len(steps), np.nan)
    if run.primary_measure:
        measured, values = run.series(run.primary_measure)
        found = np.searchsorted(steps, measured)
        inside = found < len(steps)
        inside[inside] &= steps[found[inside]] == measured[inside]
        near_rank_losses[found[inside]] = values[inside]
    return Curve(steps, losses, scores, near_rank_losses, shares)


def tuned_settings(study: Mapping[str, Any]) -> frozenset[str]:
    """Names of the settings tuned by a study."""
    return frozenset(name for search in (study.get("tuned") or {}).values() for name in search.get("best") or {})


def _explanations(line: Mapping[str, float], probe_set: str = "") -> dict[str, float]:
    """Measures that may explain a gap, on raw activations, and near-rank loss on centred ones, too.

    The name of another probe set is removed from the names.

    >>> line = {"nc1": 2.0, "effective_rank/a": 8.0, "effective_rank/a/centred": 7.0, "effective_rank/a/own_batch": 3.0}
    >>> _explanations(line), _explanations(line, "own_batch")
    ({'nc1': 2.0, 'effective_rank/a': 8.0}, {'effective_rank/a': 3.0})
    """
    out: dict[str, float] = {}
    for name, value in line.items():
        key = MetricKey.parse(name)
        if key.known.is_explanation and key.probe_set == probe_set and math.isfinite(value):
            key = key._replace(probe_set="")
            if not key.is_control or (f"{key.measure}/{key.threshold}", key.centred) == (PRIMARY, True):
                out[key.format() if probe_set else name] = float(value)
    return out


def read_run(folder: Path, arm: str | None = None) -> RunData:
    """Read one run folder.

    Raises:
        UsageError: if it is not a run folder, or its settings have no global batch size.
    """
    info = read_info(folder)
    if info.global_size is None:
        path = folder / info.file_name
        raise UsageError(f"{path} has no config.batch.global_size, by which runs are compared: add it")
    return RunData(folder, folder.name if arm is None else arm, info.content())


def read_study(folder: Path) -> StudyData:
    """Read a study folder, or a run folder as a study of one arm.

    Raises:
        UsageError: if it is neither, or a single run is damaged.
    """
    if not (folder / "study.json").exists():
        run = read_run(folder)
        run.check()
        return StudyData(folder, folder.name, "", run.arm, [run.arm], [run], run.info)
    info = read_study_info(folder)
    if info.members is None:
        members = [(path, path.parent.name) for path in sorted(folder.glob("runs/*/*")) if path.is_dir()]
    else:
        members = [(folder / member.folder, member.arm) for member in info.members]
    runs, unreadable = [], []
    for path, arm in ((path, arm) for path, arm in members if arm in info.arms):
        try:
            run = read_run(path, arm)
            run.check()
            runs += [run] if run.seed in info.seeds else []
        except UsageError as error:
            unreadable.append(str(error).replace(f"{folder}/", ""))
    return StudyData(folder, info.name, info.question, info.baseline, info.arms, runs, info.content(), unreadable)
