"""The tables of a report: each cell has its text and the number by which it is sorted."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gengap_dist.analysis.report.plotting import Row
from gengap_dist.analysis.report.text import gap_sentence, interval, last_layer, mean_text, plain, test_head, value_text
from gengap_dist.analysis.results import Comparison, Estimate, Requirement
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.study_data import RunData, StudyData
from gengap_dist.config.measures import SUMMARY
from gengap_dist.config.metric_key import layer_metric
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Interval, mean_and_std

FEW_PAIRS = 8  # of seeds: with fewer the bootstrap is too narrow


class Cell(NamedTuple):
    """One table cell."""

    text: str
    number: float | None = None
    """Sort key; None for text, nan for a missing value."""


class Table(NamedTuple):
    """A table: each row has one cell per head, and its first cell is its name."""

    name: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


MISSING = Cell("-", float("nan"))


def number(value: Any, style: str | None = None, text: str | None = None) -> Cell:
    """A number as a cell; a dash, sorted last, for a missing value.

    >>> number(1234, ","), number(None).text, number("nan").text
    (Cell(text='1,234', number=1234.0), '-', '-')
    """
    if value is None or (numeric := float(value)) != numeric:
        return MISSING
    shown = plain(numeric, 4) if style is None else format(value, style)
    return Cell(shown if text is None else text, numeric)


def _interval(pair: Interval | None, metric: MetricDescription) -> Cell:
    return MISSING if pair is None else Cell(interval(pair, metric), sum(pair) / 2)


def arm_tables(study: StudyData, comparison: Comparison) -> list[Table]:
    """One row per arm: results, and how sure they are; an arm without a run is in the first."""
    last, metric = last_layer(study), study.metric
    results, details = [], []
    for arm in study.arms:
        if not (runs := study.runs_of(arm)):
            if unfinished := study.unfinished_runs(arm):
                results.append(
                    [Cell(arm), MISSING, MISSING, Cell(f"0, {unfinished}", 0), *[MISSING] * (7 + bool(last))]
                )
            continue
        values, arm_gap = [*study.test_values(arm).values()], comparison.gaps.get(arm)
        count = str(len(values)) + (f" + {unfinished}" if (unfinished := study.unfinished_runs(arm)) else "")
        train, trained, ratio, train_test_gap = _training_cells(study, comparison, arm)
        row = [
            Cell(arm),
            number(runs[0].global_size, ","),
            number(runs[0].info.get("num_steps"), ","),
            Cell(count, len(values)),
            number(mean_and_std(values)[0] if values else None, text=mean_text(values, metric)),
            train,
            trained,
        ]
        if arm_gap is None:
            results.append([*row, Cell("baseline", 0.0) if arm == comparison.baseline else MISSING, MISSING, MISSING])
            matched = Cell("" if arm == comparison.baseline else "no pair")
            details.append([Cell(arm), ratio, train_test_gap, *[MISSING] * 3, matched])
        else:
            gap = number(arm_gap.paired.mean, text=metric.format_difference(arm_gap.paired.mean))
            results.append([*row, gap, _interval(arm_gap.paired.student, metric), number(arm_gap.holm, ".2g")])
            differences = (
                number(value, text="" if value is None else metric.format_difference(value, signed=False))
                for value in (arm_gap.ci_half_width, arm_gap.minimum_detectable_effect)
            )
            interval_cell = _interval(arm_gap.paired.bootstrap, metric)
            matched = Cell(arm_gap.matched or "nothing")
            details.append([Cell(arm), ratio, train_test_gap, interval_cell, *differences, matched])
        for name, rows in zip(SUMMARY if last else (), (results, details), strict=False):
            ends = [run.untrained_and_trained(layer_metric(name, last or ""))[1] for run in study.finished_runs(arm)]
            rows[-1].append(number(mean_and_std(ends)[0] if ends else None, ".3g"))
    heads = ["arm", "batch", "updates", "seeds", test_head(metric), "train (sd)", "trained", "gap", "95% t", "Holm p"]
    more = ["arm", "loss ratio", "train-test gap", "95% bootstrap", "CI half-width", "detectable", "matched"]
    caption = f"Gap: {gap_sentence(comparison.baseline, metric)}, paired by seed, on these test samples."
    about = "How sure the gaps are, by 95% intervals on these test samples, and how the arms trained."
    few = max((len(each.paired.differences) for each in comparison.gaps.values()), default=0)
    if 1 < few < FEW_PAIRS:
        about += f" With {few} pairs use the t interval: the bootstrap cannot exceed the observed differences."
    near_rank, effective = ([f"near-rank loss {last}"], [f"eff. rank {last}"]) if last else ([], [])
    return [
        Table("Arms", caption, heads + near_rank, results),
        Table("Arms, more numbers", about, more + effective, details),
    ]


def _training_cells(study: StudyData, comparison: Comparison, arm: str) -> list[Cell]:
    """Metric on training samples, whether the arm trained, loss ratio, and difference of training and test metric."""
    metric, trained = study.metric, comparison.training.get(arm)
    values = [*study.results(arm, f"train_full/{metric.name}").values()]
    gaps = [*study.results(arm, "train_test_gap").values()]
    gap = mean_and_std(gaps)[0] if gaps else None
    return [
        number(mean_and_std(values)[0] if values else None, text=mean_text(values, metric)),
        Cell(trained.label if trained else "-"),
        number(trained.loss_ratio if trained else None, ".3g"),
        number(gap, text="" if gap is None else metric.format_difference(gap)),
    ]


def intervention_tables(comparison: Comparison) -> list[Table]:
    """For each intervention on the rank: its quantities, and the conditions for a verdict."""
    metric, out = comparison.metric, []
    for each in comparison.interventions:
        confidence = Look(each.level).confidence
        rows = [
            [*_estimate_cells(estimate, metric), _estimate_interval(estimate.new_images, estimate, metric)]
            for estimate in each.estimates
        ]
        caption = (
            f"{each.arm}: {each.finding}{f' ({each.reason})' if each.reason else ''}. Means over the {each.num_seeds} "
            f"seeds of which all arms have a result, with {confidence} intervals on these test samples and on new "
            "ones. Lost, gain, cost, raising and lowering are differences of the test metric, growth, fall "
            "and rise of near-rank loss; raising and lowering are above 0 if more than half of the loss goes through "
            "the rank."
        )
        heads = ["quantity", "mean", "interval, these samples", "interval, new samples"]
        out.append(Table(f"Intervention at {each.arm}", caption, heads, rows))
        rows = [
            [
                *_estimate_cells(requirement.estimate, metric),
                number(requirement.limit, text=_limit(requirement, metric)),
                Cell("yes" if requirement.holds else "no"),
            ]
            for requirement in each.requirements
        ]
        caption = (
            f"What must surely hold, by {confidence} intervals, before a verdict is given. Differences of the "
            "metric on training samples have 90% intervals. Limits that are shares of loss or growth are compared "
            "seed by seed; means are shown."
        )
        heads = ["condition", "mean", "interval", "must be", "holds"]
        out.append(Table(f"Conditions at {each.arm}", caption, heads, rows))
    return out


def _estimate_cells(estimate: Estimate, metric: MetricDescription) -> list[Cell]:
    """Quantity, mean, and interval on these test samples."""
    mean = number(estimate.mean, text=_difference(estimate.mean, estimate, metric))
    return [Cell(estimate.quantity), mean, _estimate_interval(estimate.interval, estimate, metric)]


def _difference(value: float, estimate: Estimate, metric: MetricDescription) -> str:
    return metric.format_difference(value) if estimate.is_score else f"{value:+.3f}"


def _estimate_interval(pair: Interval | None, estimate: Estimate, metric: MetricDescription) -> Cell:
    if pair is None:
        return MISSING
    return Cell(f"[{', '.join(_difference(end, estimate, metric) for end in pair)}]", sum(pair) / 2)


def _limit(requirement: Requirement, metric: MetricDescription) -> str:
    limit = _difference(requirement.limit, requirement.estimate, metric)
    if not requirement.is_within:
        return f"above {limit}"
    return f"within \u00b1{limit.removeprefix('+')}" if requirement.limit > 0 else f"within {limit}, which nothing is"


def run_table(study: StudyData) -> Table:
    """One row per run, with any status."""
    heads = ["arm", "seed", "status", "updates", "test, last", "test, best by validation", "train", "train_test_gap"]
    heads += ["samples/s", "seconds"]
    rows, metric = [], study.metric
    for run in (run for arm in study.arms for run in study.runs_of(arm)):
        result = run.info.get("result") or {}
        values = [result.get(f"{name}/{metric.name}") for name in ("test", "test_at_best_val", "train_full")]
        values = [None if value is None else float(value) for value in values]
        gap = result.get("train_test_gap")
        rows.append(
            [
                Cell(run.arm),
                number(run.seed, ""),
                Cell(run.info["status"]),
                number(result.get("num_steps", run.info.get("num_steps")), ","),
                *(number(value, text=value_text(value, metric)) for value in values),
                number(gap, text="" if gap is None else metric.format_difference(float(gap))),
                number(run.samples_per_second, ",.0f"),
                number(run.info.get("seconds"), ",.1f"),
            ]
        )
    return Table("Runs", "Every run, including runs without a result.", heads, rows)


def tuning_tables(tuned: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], Table]]:
    """For each tuned arm: its best settings as text, settings at an edge of the space, and a table of its trials."""
    out = []
    for arm, search in tuned.items():
        trials = [dict(trial) for trial in search.get("trials") or []]
        settings = [trial.pop("setting", None) or {} for trial in trials]
        flat = [setting | trial for setting, trial in zip(settings, trials, strict=True)]
        best = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in (search.get("best") or {}).items())  # fmt: skip
        table = data_table(f"Trials of {arm}", [{"trial": at, **trial} for at, trial in enumerate(flat)])
        out.append((f"{arm}: {best or 'no trial has a result'}", list(search.get("edge") or []), table))
    return out


def matching_tables(matched: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], Table]]:
    """For each arm of study.match: the strength found and what it reaches as text, and a table of its runs."""
    out = []
    for arm, search in matched.items():
        trials = [dict(trial) for trial in search.get("trials") or []]
        rows = [(trial.pop("setting", None) or {}) | trial for trial in trials]
        strength = next(iter((search.get("best") or {}).values()), None)
        text = f"{arm}: " + ("no strength found" if strength is None else f"algorithm.rank_penalty {strength:.4g}")
        if search.get("shared"):
            text += f" (also of {', '.join(search['shared'])})"
        target = search.get("target")
        if search.get("problem"):
            text += f", {search['problem']}"
        elif target is not None:
            text += f", near-rank loss within {search.get('tolerance', 0.0):.3g} of {target:.3g} of {search.get('to')}"
        out.append((text, [], data_table(f"Search of {arm}", [{"run": at, **row} for at, row in enumerate(rows)])))
    return out


def data_table(name: str, rows: Sequence[Row]) -> Table:
    """Rows of a figure as a table."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return Table(name, "", heads, [[_any(row.get(head)) for head in heads] for row in rows])


def _any(value: object) -> Cell:
    if isinstance(value, bool | str):
        return Cell(str(value))
    return number(value, None if isinstance(value, float) else "") if isinstance(value, int | float) else MISSING


def representative_run(study: StudyData) -> RunData | None:
    """The run whose metadata the page shows: the first finished run, else the first."""
    finished = [run for arm in study.arms for run in study.finished_runs(arm)]
    return next(iter([*finished, *study.runs]), None)
