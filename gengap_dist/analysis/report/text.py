"""Formats numbers and rows as text, for the terminal and the page."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gengap_dist.analysis.study_data import StudyData
from gengap_dist.config.measures import SUMMARY
from gengap_dist.config.metric_key import layer_metric
from gengap_dist.statistics.paired import Paired, mean_and_std

if TYPE_CHECKING:  # they would import torch, and the driver of ranks needs none
    pass


def percent(value: float | None) -> str:
    """A share as percent, or a dash.

    >>> percent(0.9735), percent(None)
    ('97.35%', '-')
    """
    return "-" if value is None else f"{value:.2%}"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed.

    >>> points(0.0123)
    '+1.23'
    """
    return f"{100 * value:+.2f}"


def interval(pair: tuple[float, float] | None) -> str:
    """An interval in percentage points, or a dash.

    >>> interval((-0.001, 0.02))
    '[-0.10, +2.00]'
    """
    return "-" if pair is None else f"[{points(pair[0])}, {points(pair[1])}]"


def last_layer(study: StudyData) -> str | None:
    """Key of the last measured layer, raw activations; None if there is none."""
    keys = study.layer_keys()
    return keys[-1] if keys else None


def study_rows(study: StudyData, last: str | None) -> list[list[str]]:
    """The cells of `cli.terminal.study_table`, as text."""
    rows = []
    for arm in study.arms:
        runs, accuracies = study.runs_of(arm), list(study.results(arm, "test/accuracy").values())
        if not runs:
            if unfinished := study.unfinished_runs(arm):
                rows.append([arm, "-", "-", f"0, {unfinished}", *["-"] * (6 if last else 4)])
            continue
        mean, deviation = mean_and_std(accuracies) if accuracies else (None, float("nan"))
        accuracy = percent(mean) + (f" ({100 * deviation:.2f})" if deviation == deviation else "")
        unfinished = study.unfinished_runs(arm)
        gap: Paired | None = None if arm == study.baseline else study.gap(arm)
        row = [
            arm,
            f"{runs[0].global_size:,}",
            f"{runs[0].info['num_steps']:,}",
            str(len(accuracies)) + (f" + {unfinished}" if unfinished else ""),
            accuracy,
            "baseline" if arm == study.baseline else points(gap.mean) if gap else "-",
            interval(gap.bootstrap if gap else None),
            interval(gap.student if gap else None),
        ]
        if last:
            for name in SUMMARY:
                final_values = [
                    run.untrained_and_trained(layer_metric(name, last))[1] for run in study.finished_runs(arm)
                ]
                row.append(f"{mean_and_std(final_values)[0]:.3g}" if final_values else "-")
        rows.append(row)
    return rows


def ui_command(uri: str) -> str:
    """The command that opens an MLflow store.

    >>> ui_command("http://mlflow:5000")
    'open http://mlflow:5000'
    """
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}"
