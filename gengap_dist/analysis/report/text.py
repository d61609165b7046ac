"""Formats numbers and rows as text, for the terminal and the page."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.config.measures import SUMMARY
from gengap_dist.config.metric_key import LayerKey, MetricKey, layer_metric
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Paired, mean_and_std

MAX_EVIDENCE = 3_000  # characters of the evidence of a claim that are shown at once: about ten arms
MAX_CAVEATS = 12  # that are shown at once


def interval(pair: tuple[float, float] | None, metric: MetricDescription) -> str:
    """An interval of differences of a metric, or a dash.

    >>> interval((-0.001, 0.02), MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    '[-0.10, +2.00]'
    """
    return "-" if pair is None else f"[{metric.format_difference(pair[0])}, {metric.format_difference(pair[1])}]"


def plain(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, and without an exponent if it is large.

    >>> plain(1049.7), plain(0.01234), plain(51.26)
    ('1,050', '0.0123', '51.3')
    """
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if 10 ** (digits - 1) <= abs(rounded) < 1e15 else f"{rounded:.{digits}g}"


def value_text(value: float | None, metric: MetricDescription) -> str:
    """A value of a metric, or a dash."""
    return "-" if value is None else metric.format(float(value))


def mean_text(values: Sequence[float], metric: MetricDescription) -> str:
    """Mean of the values of a metric, with their standard deviation in parentheses if there are several; or a dash.

    >>> mean_text([0.5, 0.75], MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    '62.50% (17.68)'
    """
    if not values:
        return "-"
    mean, deviation = mean_and_std([*values])
    shown = f" ({metric.format_difference(deviation, signed=False)})" if deviation == deviation else ""
    return metric.format(mean) + shown


def test_head(metric: MetricDescription) -> str:
    """Head of a column with means of the metric on the test samples."""
    return f"test {'acc.' if metric.name == 'accuracy' else metric.name} (sd)"


def gap_sentence(baseline: str, metric: MetricDescription) -> str:
    """What a gap is: above 0, the arm is worse.

    >>> gap_sentence("b64", MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    "test accuracy of b64 minus the arm's, in percentage points"
    """
    order = f"of {baseline} minus the arm's" if metric.higher_is_better else f"of the arm minus that of {baseline}"
    return f"test {metric.name} {order}" + (f", in {metric.difference_unit}" if metric.difference_unit else "")


def level_sentence(look: Look, *, with_interventions: bool = False) -> str:
    """How sure the intervals of claims are, if those of the table of arms and of figures are another 95%; else empty.

    >>> level_sentence(Look()), level_sentence(Look(0.01, name="look 1 of 2")).partition(";")[0]
    ('', 'Intervals in claims are 99% (look 1 of 2)')
    """
    if not look.level or look == Look(sentence=look.sentence):
        return ""
    where = f"in claims{' and of interventions' * with_interventions}"
    name = f" ({look.name})" if look.name else ""
    return (
        f"Intervals {where} are {look.confidence}{name}; those in the table of arms and in figures are 95% and decide "
        "nothing."
    )


def limits(look: Look, comparison: Comparison) -> list[str]:
    """The limits of a comparison; first how sure intervals are, where that differs."""
    levels = level_sentence(look, with_interventions=bool(comparison.interventions)) if comparison.claims else ""
    return [*filter(None, [levels]), *comparison.caveats]


def last_layer(study: StudyData) -> str | None:
    """Key of the last hidden layer, centred activations: verdicts are about it; None if it was not measured."""
    primary = next((run.primary_measure for run in study.runs if run.primary_measure), None)
    if primary is None:
        return None
    key = MetricKey.parse(primary)
    return LayerKey(key.layer, key.view, key.centred).format()


def study_rows(study: StudyData, last: str | None) -> list[list[str]]:
    """The cells of `cli.terminal.study_table`, as text."""
    rows, metric = [], study.metric
    for arm in study.arms:
        runs, values = study.runs_of(arm), list(study.test_values(arm).values())
        if not runs:
            if unfinished := study.unfinished_runs(arm):
                rows.append([arm, "-", "-", f"0, {unfinished}", *["-"] * (8 if last else 6)])
            continue
        unfinished = study.unfinished_runs(arm)
        gap: Paired | None = None if arm == study.baseline else study.gap(arm)
        trained = study.comparison.training.get(arm)
        num_steps = runs[0].info.get("num_steps")  # not of a run of any other program
        row = [
            arm,
            f"{runs[0].global_size:,}",
            "-" if num_steps is None else f"{num_steps:,}",
            str(len(values)) + (f" + {unfinished}" if unfinished else ""),
            mean_text(values, metric),
            _mean(study, arm),
            "-" if trained is None or trained.loss_ratio is None else f"{trained.loss_ratio:.3g}",
            _train_test_gap(study, arm),
            "baseline" if arm == study.baseline else metric.format_difference(gap.mean) if gap else "-",
            interval(gap.student if gap else None, metric),
        ]
        if last:
            for name in SUMMARY:
                final_values = [
                    run.untrained_and_trained(layer_metric(name, last))[1] for run in study.finished_runs(arm)
                ]
                row.append(f"{mean_and_std(final_values)[0]:.3g}" if final_values else "-")
        rows.append(row)
    return rows


def _mean(study: StudyData, arm: str) -> str:
    """Mean of the metric on the training samples."""
    values = [*study.results(arm, f"train_full/{study.metric.name}").values()]
    return study.metric.format(mean_and_std(values)[0]) if values else "-"


def _train_test_gap(study: StudyData, arm: str) -> str:
    gaps = [*study.results(arm, "train_test_gap").values()]
    return study.metric.format_difference(mean_and_std(gaps)[0]) if gaps else "-"


def first_sentences(text: str, max_length: int = MAX_EVIDENCE) -> tuple[str, str]:
    """A text of many sentences in two parts: the first sentences, at least one, and the others.

    >>> first_sentences("lb64 loses 0.5 points. lb128 loses 1.2 points. lb256 gains.", 50)
    ('lb64 loses 0.5 points. lb128 loses 1.2 points.', 'lb256 gains.')
    >>> first_sentences("One. Two.")
    ('One. Two.', '')
    """
    if len(text) <= max_length:
        return text, ""
    end = text.rfind(". ", 0, max_length)
    end = text.find(". ") if end < 0 else end
    return (text, "") if end < 0 else (text[: end + 1], text[end + 2 :])


def ui_command(uri: str) -> str:
    """The command that opens an MLflow store.

    >>> ui_command("http://mlflow:5000")
    'open http://mlflow:5000'
    """
    if uri.startswith(("http://", "https://")):
        return shlex.join(["open", uri])
    return shlex.join([str(Path(sys.executable).parent / "mlflow"), "ui", "--backend-store-uri", uri])
