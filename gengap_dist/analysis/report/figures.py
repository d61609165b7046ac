"""Figures of a study's results and of training. Each function returns None if there is nothing to draw."""

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gengap_dist.analysis.report.plotting import (
    ACCENT,
    COLOURS,
    MAX_METRIC,
    PAPER,
    QUIET,
    ROW,
    SOFT,
    WARM,
    ReportFigure,
    Row,
    arms_with_runs,
    batch_axis,
    batch_axis_position,
    colour,
    dots,
    in_rows,
    label_of,
    listed,
    plain_tick_labels,
    row_axis,
    row_colour,
)
from gengap_dist.analysis.results import Comparison, Correlation
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Interval, differences, mean_and_std, t_interval

HIGHEST_LOSS = 20.0  # upper limit of the axis; a diverging run may exceed it
MAX_POINTS = 80  # of a curve: thousands of noisy steps hide the trend
MAX_EXPLANATIONS, MAX_SCATTERS, MAX_LINES = 20, 6, 8
SIGNIFICANT = 0.05


def test_values(study: StudyData) -> ReportFigure | None:
    """The metric on the test samples, by global batch or one row per arm: dots are seeds, means have t intervals."""
    metric = study.metric
    name, scale = f"test/{metric.name}", metric.scale
    results = {arm: study.test_values(arm) for arm, _ in arms_with_runs(study)}
    arms = [arm for arm, values in results.items() if values]
    if not arms:
        return None
    rows = in_rows(study)
    figure = Figure(figsize=(7.2, ROW * len(arms) + 0.8 if rows else 4.0))
    axes = figure.subplots()
    sizes = [study.runs_of(arm)[0].global_size for arm in arms]
    data: list[Row] = []
    for number, arm in enumerate(arms):
        values, colour_of_arm = (
            scale * np.array(list(results[arm].values())),
            (row_colour if rows else colour)(study, arm),
        )
        position, mean, half = (
            number if rows else batch_axis_position(sizes, number, 1.09),
            float(values.mean()),
            _t_half(values),
        )
        dots(axes, rows, position, values, marker="o", color=colour_of_arm, alpha=0.45, markersize=5, mew=0)
        middle = [mean, position] if rows else [position, mean]
        bar = {"xerr" if rows else "yerr": half or None}
        axes.errorbar(*middle, **bar, fmt="D", color=colour_of_arm, capsize=4, markersize=6, label=label_of(arm))
        data += [
            {"arm": arm, "global_size": sizes[number], "kind": "seed", "seed": seed, name: value}
            for seed, value in results[arm].items()
        ]
        ends = {"ci_low": (mean - half) / scale, "ci_high": (mean + half) / scale} if half else {}
        data.append({"arm": arm, "global_size": sizes[number], "kind": "mean", name: mean / scale} | ends)
    axis, limits = (axes.xaxis, axes.set_xlim) if rows else (axes.yaxis, axes.set_ylim)
    axis.set_label_text(f"test {metric.axis_label}")
    if metric.unit == "share":
        low, high = axis.get_view_interval()
        limits(max(low, -3), min(high, 103))  # an interval may extend beyond 0% or 100%
    if rows:
        row_axis(axes, arms)
    else:
        batch_axis(axes, sizes)
        axes.set_xlabel("global batch (samples per step)")
        axes.legend(loc="best", fontsize=9)
    means = [f"{row['arm']} {metric.format(row[name])}" for row in data if row["kind"] == "mean"]
    return ReportFigure(figure, f"Mean test {metric.name}: {listed(means)}.", data)


def gap(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """What arms lost against the baseline, one row per arm: seeds, means, t intervals; unfinished runs are counted."""
    arms = [arm for arm, _ in arms_with_runs(study) if arm != comparison.baseline]
    if not any(arm in comparison.gaps for arm in arms):
        return None
    figure = Figure(figsize=(7.2, ROW * len(arms) + 1.1))
    axes, metric = figure.subplots(), comparison.metric
    scale = metric.scale
    data: list[Row] = []
    axes.axvline(0, color=SOFT, linestyle="--", linewidth=1.2)
    row_transform = axes.get_yaxis_transform()
    for number, arm in enumerate(arms):
        arm_gap, unfinished = comparison.gaps.get(arm), study.unfinished_runs(arm)
        row: Row = {"arm": arm, "global_size": study.runs_of(arm)[0].global_size, "lost": unfinished}
        notes = [f"{unfinished}"] if unfinished else []
        if arm_gap is None:
            data.append(row | {"kind": "mean"})
            notes.append("no pair")
        else:
            paired, significant = arm_gap.paired, arm_gap.holm is not None and arm_gap.holm < SIGNIFICANT
            c = ACCENT if significant else SOFT
            dots(
                axes,
                True,
                number,
                [scale * d for d in paired.differences.values()],
                marker="o",
                color=c,
                alpha=0.4,
                mew=0,
            )
            if paired.student:
                axes.plot([scale * end for end in paired.student], [number] * 2, color=c, linewidth=1.8)
            axes.plot(
                scale * paired.mean, number, "D", color=c, markersize=6.5, mfc=c if significant else PAPER, mew=1.6
            )
            data += [row | {"kind": "seed", "seed": s, "sb_lb_gap": d} for s, d in paired.differences.items()]
            low, high = paired.student or (None, None)
            mean = {"kind": "mean", "sb_lb_gap": paired.mean, "ci_low": low, "ci_high": high, "holm_p": arm_gap.holm}
            data.append(row | mean)
        if notes:
            axes.text(1.01, number, ", ".join(notes), transform=row_transform, va="center", color=WARM, fontsize=9)
    row_axis(axes, arms)
    points = "points of " if metric.unit == "share" else ""
    axes.set_xlabel(f"{points}test {metric.harm} against {label_of(comparison.baseline)} (above 0: the arm is worse)")
    handles = [
        Line2D([], [], color=ACCENT, marker="D", label=f"differs (Holm p < {SIGNIFICANT:g})"),
        Line2D([], [], color=SOFT, marker="D", mfc=PAPER, mew=1.6, label="not significant"),
        Line2D([], [], color=SOFT, marker="o", alpha=0.4, mew=0, linestyle="", label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    means = [
        f"{row['arm']} {metric.format_difference(row['sb_lb_gap'])}"
        for row in data
        if row["kind"] == "mean" and "sb_lb_gap" in row
    ]
    return ReportFigure(figure, f"{_harm_label(metric)} against {comparison.baseline}: {listed(means)}.", data)


def updates_to_target(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """Updates to the target by batch (Shallue et al. 2019), with fitted curve, critical batch and perfect scaling."""
    target = comparison.target
    reached = {arm: seeds for arm, seeds in target.updates.items() if seeds and study.runs_of(arm)} if target else {}
    if target is None or not reached:
        return None
    size_of = {arm: runs[0].global_size for arm, runs in arms_with_runs(study)}
    sizes = [size_of[arm] for arm in reached]
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    data: list[Row] = []
    for number, (arm, seeds) in enumerate(reached.items()):
        at = batch_axis_position(sizes, number, 1.06)
        label = label_of(arm) if len(reached) <= MAX_LINES else None
        dots(axes, False, at, list(seeds.values()), marker="o", color=colour(study, arm), alpha=0.7, mew=0, label=label)
        data += [
            {"kind": "seed", "arm": arm, "global_size": size_of[arm], "seed": s, "updates_to_target": updates}
            for s, updates in seeds.items()
        ]
    smallest = min(sizes)
    mean_at_smallest = float(
        np.mean([n for arm, seeds in reached.items() if size_of[arm] == smallest for n in seeds.values()])
    )
    missed = {arm: count for arm, count in target.missed.items() if count and arm in size_of}
    every_size = [*sizes, *(size_of[arm] for arm in missed)]
    x = np.geomspace(smallest / 1.3, max(every_size) * 1.3, 60)
    axes.plot(x, mean_at_smallest * smallest / x, color=QUIET, linestyle="--", linewidth=1.2, label="perfect scaling")
    if target.least_updates is not None and target.critical_batch is not None:
        curve = target.least_updates * (1 + target.critical_batch / x)
        axes.plot(x, curve, color=ACCENT, linewidth=1.8, label="S = S_min (1 + B_crit / B)")
        data += [
            {"kind": "fit", "global_size": float(b), "updates_to_target": float(s)}
            for b, s in zip(x, curve, strict=True)
        ]
    axes.set_yscale("log")
    batch_axis(axes, every_size)
    low, high = axes.get_xlim()
    for name, value, ends, style, c in (
        ("critical batch", target.critical_batch, target.critical_interval, "-", ACCENT),
        ("noise scale", target.noise_scale, None, ":", WARM),
    ):
        if value is None:
            continue
        data.append({"kind": name, "global_size": float(value)})
        if ends:
            data += [
                {"kind": f"{name}, 95% {end}", "global_size": v} for end, v in zip(("low", "high"), ends, strict=True)
            ]
            axes.axvspan(max(ends[0], low), min(ends[1], high), color=c, alpha=0.12, linewidth=0)
        outside = "" if low < value < high else ", outside the figure"
        axes.axvline(
            min(max(value, low), high), color=c, linestyle=style, linewidth=1.4, label=f"{name} {value:,.3g}{outside}"
        )
    by_size = Counter[int]()
    for arm, count in missed.items():
        by_size[size_of[arm]] += count
        data.append({"kind": "missed", "arm": arm, "global_size": size_of[arm], "runs": count})
    for size, count in by_size.items():
        style = {"transform": axes.get_xaxis_transform(), "color": WARM, "ha": "center", "fontsize": 9}
        axes.text(size, 0.97, f"{count} missed", **style)
    axes.set_xlim(low, high)
    plain_tick_labels(axes.yaxis)
    axes.set_xlabel("global batch (samples per step)")
    axes.set_ylabel(f"updates to {target.accuracy:.1%} validation accuracy")
    axes.legend(fontsize=9)
    means = [f"{arm} {np.mean(list(seeds.values())):,.0f}" for arm, seeds in reached.items()]
    critical = f" Critical batch {target.critical_batch:,.0f}." if target.critical_batch else ""
    return ReportFigure(
        figure, f"Mean updates to {target.accuracy:.1%} validation accuracy: {listed(means)}.{critical}", data
    )


def explanations(_: StudyData, comparison: Comparison) -> ReportFigure | None:
    """Correlation of each measure with the score lost, as measured and given the number of updates."""
    shown = _strongest_first(comparison)[:MAX_EXPLANATIONS]
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 0.34 * len(shown) + 1.1))
    axes = figure.subplots()
    axes.axvline(0, color=SOFT, linestyle="--", linewidth=1.2)
    data: list[Row] = []
    for number, correlation in enumerate(shown):
        _correlation(axes, number - 0.14, correlation.r, correlation.interval, color=ACCENT, marker="o", mfc=ACCENT)
        if correlation.partial is not None:
            _correlation(
                axes,
                number + 0.14,
                correlation.partial,
                correlation.partial_interval,
                color=WARM,
                marker="D",
                mfc=PAPER,
            )
        low, high = correlation.interval or (None, None)
        partial_low, partial_high = correlation.partial_interval or (None, None)
        data.append(
            {
                "measure": correlation.measure,
                "r": correlation.r,
                "ci_low": low,
                "ci_high": high,
                "partial_r": correlation.partial,
                "partial_ci_low": partial_low,
                "partial_ci_high": partial_high,
                "p": correlation.p,
                "holm_p": correlation.holm,
                "num_runs": correlation.num_runs,
                "num_arms": correlation.num_arms,
                "smallest_r_without_an_arm": (correlation.leave_one_out or (None, None))[0],
                "largest_r_without_an_arm": (correlation.leave_one_out or (None, None))[1],
            }
        )
    row_axis(axes, [correlation.measure for correlation in shown], MAX_METRIC)
    axes.set_xlim(-1.05, 1.05)
    harm = comparison.metric.harm
    axes.set_xlabel(f"Spearman's correlation with test {harm}, over means of arms that trained")
    handles = [
        Line2D([], [], color=ACCENT, marker="o", label="r, 95% interval"),
        Line2D([], [], color=WARM, marker="D", mfc=PAPER, label="r given the number of updates"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9)
    strongest = listed([f"{correlation.measure} {correlation.r:+.2f}" for correlation in shown], 4)
    best = f"The strongest of them is the best of {len(comparison.correlations)}, and no evidence of a cause."
    if all(correlation.interval is None for correlation in shown):
        best = f"With {max(correlation.num_arms for correlation in shown)} arms they are too few to tell."
    return ReportFigure(figure, f"Correlation with test {harm}, strongest first: {strongest}. {best}", data)


def _strongest_first(comparison: Comparison) -> list[Correlation]:
    return sorted(comparison.correlations, key=lambda correlation: -abs(correlation.r))


def _correlation(axes: Axes, at: float, r: float, ends: Interval | None, *, color: str, **style: Any) -> None:
    if ends:
        axes.plot(ends, [at, at], color=color, linewidth=1.4)
    axes.plot(r, at, color=color, markersize=5.5, **style)


def gap_against_explanations(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """Score lost in each run against the most correlated measures, one panel each."""
    metric = study.metric
    lost = {arm: differences(study.scores(study.baseline), study.scores(arm)) for arm in study.arms}
    panels: dict[str, list[Row]] = {}
    for name in (correlation.measure for correlation in _strongest_first(comparison)):
        rows: list[Row] = [
            {"measure": name, "arm": arm, "seed": run.seed, "value": value, "sb_lb_gap": by_seed[run.seed]}
            for arm, by_seed in lost.items()
            for run in study.finished_runs(arm)
            if run.seed in by_seed and np.isfinite(value := run.explanation(name))
        ]
        if len({row["value"] for row in rows}) > 1:
            panels[name] = rows
        if len(panels) == MAX_SCATTERS:
            break
    if not panels:
        return None
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    one_colour_per_arm = len(study.arms) <= MAX_LINES
    figure = Figure(figsize=(2.9 * num_columns + 0.6, 2.5 * num_rows + (0.6 if one_colour_per_arm else 0.2)))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, (name, rows) in zip(grid.flatten(), panels.items(), strict=False):
        for arm in study.arms:
            of_arm = [row for row in rows if row["arm"] == arm]
            c = (colour if one_colour_per_arm else row_colour)(study, arm)
            x, y = [row["value"] for row in of_arm], [metric.scale * row["sb_lb_gap"] for row in of_arm]
            axes.plot(x, y, "o", color=c, alpha=0.6, markersize=5, mew=0)
        values = [row["value"] for row in rows]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_xscale("log")
            plain_tick_labels(axes.xaxis)
        axes.axhline(0, color=QUIET, linewidth=1, linestyle="--")
        axes.set_title(label_of(name, MAX_METRIC), fontsize=9)
    for axes in grid.flatten()[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(_harm_label(metric).lower(), fontsize=10, color=SOFT)
    named = (
        [(arm, colour(study, arm)) for arm in study.arms]
        if one_colour_per_arm
        else [(comparison.baseline, WARM), ("other arms", ACCENT)]
    )
    handles = [Line2D([], [], color=c, linestyle="", marker="o", label=label_of(arm)) for arm, c in named]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), fontsize=9)
    count = len(next(iter(panels.values())))
    alt_text = f"{metric.harm.capitalize()} by {count} runs against {listed(list(panels))}."
    return ReportFigure(figure, alt_text, [row for rows in panels.values() for row in rows])


def curves(study: StudyData) -> ReportFigure | None:
    """Training loss by step and epoch, validation metric by epoch: first seed in full colour, the others faint."""
    arms = [(arm, runs) for arm, runs in arms_with_runs(study) if any(len(run.series("train/loss")[0]) for run in runs)]
    if not arms:
        return None
    figure = Figure(figsize=(10.4, 3.4))
    panels = figure.subplots(1, 3)
    plots = (
        (panels[0], "train/loss", "step", "training loss", "optimizer step"),
        (panels[1], "train/loss", "epoch", "training loss", "epoch"),
        (panels[2], f"val/{study.metric.name}", "epoch", f"validation {study.metric.name}", "epoch"),
    )
    line_styles, data = _line_styles(study, [arm for arm, _ in arms]), []
    for axes, name, against, title, label in plots:
        for arm, runs in arms:
            for number, run in enumerate(runs):
                x, y = _smooth(*run.series(name, against))
                faint = {"linewidth": 0.7, "alpha": 0.35} if number else {}
                axes.plot(x, y, marker="." if len(x) < 12 else "", **line_styles[arm] | faint)
                if against == "epoch":
                    steps = _smooth(*run.series(name, "step"))[0]
                    of_run = {"arm": arm, "seed": run.seed, "metric": name}
                    data += [
                        of_run | {"step": round(float(step), 1), "epoch": float(epoch), "value": float(value)}
                        for step, epoch, value in zip(steps, x, y, strict=True)
                    ]
        axes.set_title(title)
        axes.set_xlabel(label)
    panels[0].set_xscale("log")
    plain_tick_labels(panels[0].xaxis)
    for axes in panels[:2]:
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
        plain_tick_labels(axes.yaxis)
    handles = {line_style["label"]: Line2D([], [], **line_style) for line_style in line_styles.values()}
    figure.legend(handles=[*handles.values()], loc="outside upper center", ncols=min(len(handles), 5), fontsize=9)
    last_losses = {arm: [y[-1] for run in runs if len(y := run.series("train/loss")[1])] for arm, runs in arms}
    means = [f"{arm} {mean_and_std(values)[0]:.3g}" for arm, values in last_losses.items()]
    alt_text = f"Last training loss: {listed(means)}."
    return ReportFigure(figure, alt_text, data)


def _line_styles(study: StudyData, arms: list[str]) -> dict[str, dict[str, Any]]:
    """Line style of each arm; of more than MAX_LINES arms, only the baseline, best and worst are highlighted."""
    if len(arms) <= MAX_LINES:
        return {arm: {"color": colour(study, arm), "linewidth": 1.6, "label": label_of(arm)} for arm in arms}
    means = {arm: mean_and_std([*values.values()])[0] for arm in arms if (values := study.scores(arm))}
    rest = sorted((arm for arm in means if arm != study.baseline), key=means.__getitem__)
    highlighted = {study.baseline: (WARM, "baseline")}
    if rest:
        highlighted |= {rest[-1]: (ACCENT, "best of the others"), rest[0]: (COLOURS[2], "worst of the others")}
    return {
        arm: {
            "color": highlighted[arm][0],
            "linewidth": 1.8,
            "zorder": 3,
            "label": f"{label_of(arm)} ({highlighted[arm][1]})",
        }
        if arm in highlighted
        else {"color": QUIET, "linewidth": 0.8, "alpha": 0.7, "label": "other arms"}
        for arm in arms
    }


def _harm_label(metric: MetricDescription) -> str:
    """What an arm lost, with its unit.

    >>> _harm_label(MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    'Percentage points of test accuracy lost'
    """
    unit = metric.difference_unit
    return f"{unit} of test {metric.harm}".capitalize() if unit else f"test {metric.harm}".capitalize()


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most MAX_POINTS consecutive intervals."""
    if len(x) <= MAX_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    width = np.diff(cuts)
    return tuple(np.add.reduceat(v, cuts[:-1]) / width for v in (x, y))  # type: ignore[return-value]


def _t_half(values: np.ndarray) -> float:
    ends = t_interval(values)
    return (ends[1] - ends[0]) / 2 if ends else 0.0
