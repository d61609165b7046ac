"""Figures of a study's results and of training. Each function returns None if there is nothing to draw."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gengap_dist.analysis.report.plotting import (
    ACCENT,
    COLOURS,
    COLUMN,
    MAX_COLOURS,
    MAX_METRIC,
    PAPER,
    QUIET,
    ROW,
    SOFT,
    WARM,
    WIDTH,
    ReportFigure,
    Row,
    arm_handles,
    arms_with_runs,
    batch_axis,
    batch_axis_position,
    colour,
    label_of,
    label_points,
    legend_above,
    listed,
    mean_marker,
    plain_tick_labels,
    roles_sentence,
    row_axis,
    tip,
)
from gengap_dist.analysis.report.text import plain
from gengap_dist.analysis.results import Comparison, Correlation
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Interval, differences, mean_and_std, t_interval

HIGHEST_LOSS = 20.0  # upper limit of the axis; a diverging run may exceed it
MAX_POINTS = 80  # of a curve: thousands of noisy steps hide the trend
MAX_EXPLANATIONS, MAX_SCATTERS = 20, 6
SIGNIFICANT = 0.05
INTERVALS = "Dots are seeds, larger marks their mean, bars the 95% t interval of the mean"


class _Band(NamedTuple):
    """Values that count as those of the baseline: from its mean to the tolerance on the side that is worse."""

    tolerance: float
    """With the sign of that side, in the units of the axis."""
    text: str


def test_values(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """The metric on the test samples, by global batch: dots are seeds, means have t intervals."""
    metric, margin = study.metric, comparison.margin
    band = None
    if margin is not None:
        shown = metric.format_difference(margin, signed=False)
        unit = " points" if metric.unit == "share" else f" {metric.unit}".rstrip()
        worse = -1 if metric.higher_is_better else 1
        band = _Band(worse * metric.scale * margin, f"tolerance: {shown}{unit}")
    values = {arm: study.test_values(arm) for arm, _ in arms_with_runs(study)}
    limits = (0.0, 100.0) if metric.unit == "share" else (-np.inf, np.inf)
    return _by_batch(study, values, f"test/{metric.name}", f"test {metric.axis_label}", metric.scale, limits, band)


def near_rank_by_batch(study: StudyData, _: Comparison) -> ReportFigure | None:
    """Change of near-rank loss of the last hidden layer by training, by global batch."""
    values: dict[str, dict[int, float]] = {}
    names = set[str]()
    for arm in study.arms:
        for run in study.finished_runs(arm):
            if run.primary_measure:
                untrained, trained = run.untrained_and_trained(run.primary_measure)
                if np.isfinite(trained - untrained):
                    values.setdefault(arm, {})[run.seed] = trained - untrained
                    names.add(MetricKey.parse(run.primary_measure).layer)
    band = _Band(NEAR_RANK_MARGIN, f"tolerance: {NEAR_RANK_MARGIN:g}")
    found = _by_batch(study, values, "change", "change of near-rank loss", 1.0, (-1.0, 1.0), band)
    return found and found._replace(
        caption="Share of the singular values of centred activations below 0.01 s1, in the last hidden layer "
        f"({listed(sorted(names), 1)}): trained minus untrained. {found.caption}"
    )


def _by_batch(
    study: StudyData,
    values: Mapping[str, Mapping[int, float]],
    name: str,
    label: str,
    scale: float,
    limits: Interval,
    band: _Band | None,
) -> ReportFigure | None:
    """A result of each arm by global batch.

    Args:
        study: the arms.
        values: arm to seed to value.
        name: of the value in the CSV.
        label: of the axis.
        scale: factor from values to the axis.
        limits: between which values on the axis must be: intervals are cut.
        band: around the baseline.
    """
    arms = [arm for arm, by_seed in values.items() if by_seed]
    if not arms:
        return None
    figure = Figure(figsize=(5.2, 3.9))
    axes = figure.subplots()
    sizes = [study.runs_of(arm)[0].global_size for arm in arms]
    data: list[Row] = []
    means: dict[str, tuple[float, float]] = {}
    drawn: list[tuple[float, float]] = []
    for number, arm in enumerate(arms):
        shown = scale * np.array([*values[arm].values()])
        at, mean, c = batch_axis_position(sizes, number), float(shown.mean()), colour(study, arm)
        interval = t_interval(shown)
        low, high = np.clip(interval or (mean, mean), *limits).tolist()
        text = tip(f"{label_of(arm)}, batch {sizes[number]:,}: {plain(mean, 4)} [{plain(low, 4)}, {plain(high, 4)}]")
        axes.plot([at] * len(shown), shown, "o", color=c, alpha=0.45, markersize=5, mew=0)
        cap = 8 if low < high else 12 * (len(shown) > 1)  # beyond the mean of seeds that are all the same
        axes.plot([at, at], [low, high], color=c, linewidth=1.5, marker="_", markersize=cap)
        axes.plot(at, mean, linestyle="", markersize=6, gid=text, **mean_marker(study, arm))
        drawn += [(at, float(y)) for y in (*shown, *np.linspace(low, high, 9))]
        means[arm] = (at, mean)
        of_arm = {"arm": arm, "global_size": sizes[number]}
        data += [of_arm | {"kind": "seed", "seed": seed, name: value} for seed, value in values[arm].items()]
        ends = {"ci_low": low / scale, "ci_high": high / scale} if interval else {}
        data.append(of_arm | {"kind": "mean", name: mean / scale} | ends)
    handles: list[Line2D | Patch] = [*arm_handles(study, arms, by_role=True, linestyle="")]
    caption = f"{INTERVALS}." if len(data) > 2 * len(arms) else "Each mark is a run."
    caption += roles_sentence(study, arms)
    if band and study.baseline in means:
        middle = means[study.baseline][1]
        axes.axhline(middle, color=QUIET, linewidth=1, linestyle="--", zorder=0)
        axes.axhspan(*sorted((middle, middle + band.tolerance)), color=QUIET, alpha=0.18, linewidth=0, zorder=0)
        handles.append(Patch(color=QUIET, alpha=0.3, label=band.text))
        caption += f" Means in the grey band are worse than that of {study.baseline} by less than the tolerance."
    axes.set_ylabel(label)
    axes.margins(y=0.08)
    batch_axis(axes, sizes)
    named: dict[str, None] = {}
    if len(arms) > MAX_COLOURS:
        order = sorted(means, key=lambda arm: means[arm][1])
        named = dict.fromkeys([study.baseline, *order[:2], *order[-2:]])
        caption += f" The baseline and the extremes of {len(arms)} arms are named; the others under the pointer."
    axes.set_xlabel("global batch (samples per step)")
    legend_above(figure, handles)
    if named:
        label_points(axes, [(*means[arm], arm, colour(study, arm)) for arm in named if arm in means], drawn)
    texts = [f"{arm} {plain(mean, 4)}" for arm, (_, mean) in means.items()]
    return ReportFigure(figure, f"{label[0].upper()}{label[1:]}, means: {listed(texts)}.", data, caption)


def gap(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """What arms lost against the baseline, one row per arm: seeds, means, t intervals; unfinished runs are counted."""
    arms = [arm for arm, _ in arms_with_runs(study) if arm != comparison.baseline]
    if not any(arm in comparison.gaps for arm in arms):
        return None
    figure = Figure(figsize=(WIDTH, ROW * len(arms) + 1.3))
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
            axes.plot(
                [scale * d for d in paired.differences.values()],
                [number] * len(paired.differences),
                "o",
                color=c,
                alpha=0.4,
                mew=0,
            )
            if paired.student is None and len(paired.differences) > 1:  # all the same
                axes.plot(scale * paired.mean, number, "|", color=c, markersize=14, mew=1.8)
            if paired.student:
                axes.plot([scale * end for end in paired.student], [number] * 2, color=c, linewidth=1.8)
            axes.plot(
                scale * paired.mean, number, "D", color=c, markersize=6.5, mfc=c if significant else PAPER, mew=1.6
            )
            data += [row | {"kind": "seed", "seed": s, "gap": d} for s, d in paired.differences.items()]
            low, high = paired.student or (None, None)
            mean = {"kind": "mean", "gap": paired.mean, "ci_low": low, "ci_high": high, "holm_p": arm_gap.holm}
            data.append(row | mean)
        if notes:
            axes.text(1.01, number, ", ".join(notes), transform=row_transform, va="center", color=WARM, fontsize=9)
    row_axis(axes, arms)
    points = "points of " if metric.unit == "share" else ""
    figure.supxlabel(f"{points}test {metric.harm} against {label_of(comparison.baseline, 24)}", fontsize=10, color=SOFT)
    handles = [
        Line2D([], [], color=ACCENT, marker="D", label=f"differs (Holm p < {SIGNIFICANT:g})"),
        Line2D([], [], color=SOFT, marker="D", mfc=PAPER, mew=1.6, label="not significant"),
        Line2D([], [], color=SOFT, marker="o", alpha=0.4, mew=0, linestyle="", label="one seed"),
    ]
    legend_above(figure, handles)
    means = [
        f"{row['arm']} {metric.format_difference(row['gap'])}" for row in data if row["kind"] == "mean" and "gap" in row
    ]
    caption = (
        "Above 0 the arm is worse than the baseline. Differences are paired by seed: dots are seeds, diamonds their "
        "mean, bars its 95% t interval; filled: significant after Holm's correction for all arms."
    )
    if any(each.paired.student is None and len(each.paired.differences) > 1 for each in comparison.gaps.values()):
        caption += " A stroke across the diamond: all pairs have the same difference."
    if any(row["lost"] for row in data if row["kind"] == "mean"):
        caption += " On the right: runs without a result."
    return ReportFigure(figure, f"{_harm_label(metric)} against {comparison.baseline}: {listed(means)}.", data, caption)


def updates_to_target(study: StudyData, comparison: Comparison) -> ReportFigure | None:
    """Updates to the target by batch (Shallue et al. 2019), with fitted curve, critical batch and perfect scaling."""
    target = comparison.target
    reached = {arm: seeds for arm, seeds in target.updates.items() if seeds and study.runs_of(arm)} if target else {}
    if target is None or not reached:
        return None
    size_of = {arm: runs[0].global_size for arm, runs in arms_with_runs(study)}
    sizes = [size_of[arm] for arm in reached]
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.subplots()
    data: list[Row] = []
    handles: list[Line2D | Patch] = [*arm_handles(study, [*reached], linestyle="", marker="o")]
    for number, (arm, seeds) in enumerate(reached.items()):
        at, text = (
            batch_axis_position(sizes, number, 1.06),
            tip(f"{label_of(arm)}: {plain(float(np.mean([*seeds.values()])))}"),
        )
        axes.plot([at] * len(seeds), [*seeds.values()], "o", color=colour(study, arm), alpha=0.7, mew=0, gid=text)
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
    perfect = {"color": QUIET, "linestyle": "--", "linewidth": 1.2, "label": "perfect scaling"}
    handles += axes.plot(x, mean_at_smallest * smallest / x, **perfect)
    caption = (
        "Updates until validation reached the target (Shallue et al. 2019); dots are seeds. Along the dashed line "
        "twice the batch halves the updates."
    )
    if target.least_updates is not None and target.critical_batch is not None:
        curve = target.least_updates * (1 + target.critical_batch / x)
        handles += axes.plot(x, curve, color=ACCENT, linewidth=1.8, label="S = S_min (1 + B_crit / B)")
        caption += " The fitted curve leaves it at the critical batch"
        caption += " (band: its 95% interval)." if target.critical_interval else "."
        data += [
            {"kind": "fit", "global_size": float(b), "updates_to_target": float(s)}
            for b, s in zip(x, curve, strict=True)
        ]
    if target.noise_scale is not None:
        caption += " The gradient noise scale of the baseline predicts the critical batch (McCandlish et al. 2018)."
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
        label = f"{name} {plain(value)}{outside}"
        handles.append(axes.axvline(min(max(value, low), high), color=c, linestyle=style, linewidth=1.4, label=label))
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
    axes.set_ylabel(f"updates to {target.score}")
    legend_above(figure, handles)
    means = [f"{arm} {np.mean(list(seeds.values())):,.0f}" for arm, seeds in reached.items()]
    critical = f" Critical batch {plain(target.critical_batch)}." if target.critical_batch else ""
    return ReportFigure(figure, f"Mean updates to {target.score}: {listed(means)}.{critical}", data, caption)


def explanations(_: StudyData, comparison: Comparison) -> ReportFigure | None:
    """Correlation of each measure with the score lost, as measured and given the number of updates.

    None with too few arms, of which a single one makes any correlation. Of one that hangs on a single arm, what is left
    without it is drawn.
    """
    shown = [each for each in _strongest_first(comparison) if each.interval is not None][:MAX_EXPLANATIONS]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, 0.34 * len(shown) + 1.3))
    axes = figure.subplots()
    axes.axvline(0, color=SOFT, linestyle="--", linewidth=1.2)
    hanging = [each for each in shown if _hangs_on_one_arm(each)]
    data: list[Row] = []
    for number, correlation in enumerate(shown):
        if correlation in hanging:
            _correlation(axes, number, correlation.robust_r, None, color=QUIET, marker="o", mfc=PAPER)
        else:
            _correlation(axes, number - 0.14, correlation.r, correlation.interval, color=ACCENT, marker="o", mfc=ACCENT)
        if correlation.partial is not None and correlation not in hanging:
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
    figure.supxlabel(f"Spearman's correlation with test {harm}", fontsize=10, color=SOFT)
    handles = [
        Line2D([], [], color=ACCENT, marker="o", label="r, 95% interval"),
        Line2D([], [], color=WARM, marker="D", mfc=PAPER, label="r given the number of updates"),
    ]
    if hanging:
        handles.append(Line2D([], [], color=QUIET, marker="o", mfc=PAPER, linestyle="", label="r without one arm"))
    legend_above(figure, handles)
    strongest = listed([f"{each.measure} {each.r:+.2f}" for each in shown if each not in hanging], 4) or "none"
    num_arms = max(each.num_arms for each in shown)
    caption = (
        f"Spearman's correlation over the means of the {num_arms} arms that trained: as measured, and given the number "
        "of updates; bars are 95% intervals. The strongest is the best of "
        f"{len(comparison.correlations)}, and no evidence of a cause."
    )
    if hanging:
        caption += (
            " Hollow: a correlation that a single arm makes or changes by more than half; what is left without that "
            "arm is drawn."
        )
    return ReportFigure(figure, f"Correlation with test {harm}, strongest first: {strongest}.", data, caption)


def _hangs_on_one_arm(correlation: Correlation) -> bool:
    return abs(correlation.robust_r) < 0.5 * abs(correlation.r)


def _strongest_first(comparison: Comparison) -> list[Correlation]:
    """By what is left of them without any one arm."""
    return sorted(comparison.correlations, key=lambda correlation: -abs(correlation.robust_r))


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
            {"measure": name, "arm": arm, "seed": run.seed, "value": value, "gap": by_seed[run.seed]}
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
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(COLUMN * num_columns, 2.4 * num_rows + 0.6))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, (name, rows) in zip(grid.flatten(), panels.items(), strict=False):
        for arm in study.arms:
            of_arm = [row for row in rows if row["arm"] == arm]
            x, y = [row["value"] for row in of_arm], [metric.scale * row["gap"] for row in of_arm]
            axes.plot(x, y, "o", color=colour(study, arm), alpha=0.6, markersize=5, mew=0, gid=tip(label_of(arm)))
        values = [row["value"] for row in rows]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_xscale("log")
            plain_tick_labels(axes.xaxis)
        axes.axhline(0, color=QUIET, linewidth=1, linestyle="--")
        axes.set_title(label_of(name, 42), fontsize=9)
    for axes in grid.flatten()[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(_harm_label(metric).lower(), fontsize=10, color=SOFT)
    legend_above(figure, [*arm_handles(study, study.arms, linestyle="", marker="o")])
    most = max(correlation.num_arms for correlation in comparison.correlations)
    caption = (
        f"Every finished run: test {metric.harm} against the baseline run of its seed, by the value of the measure at "
        "the end of training; "
    )
    if any(correlation.interval for correlation in comparison.correlations):
        caption += "the measures with the strongest correlation."
    else:
        caption += f"no correlation is computed of {most} arms, because a single one would make it: seven are needed."
    count = len(next(iter(panels.values())))
    alt_text = f"{metric.harm.capitalize()} by {count} runs against {listed(list(panels))}."
    return ReportFigure(figure, alt_text, [row for rows in panels.values() for row in rows], caption)


def curves(study: StudyData, _: Comparison) -> ReportFigure | None:
    """Training loss by step and epoch, validation metric and near-rank loss by epoch; the first seed in full colour."""
    arms = [(arm, runs) for arm, runs in arms_with_runs(study) if any(len(run.series("train/loss")[0]) for run in runs)]
    if not arms:
        return None
    figure = Figure(figsize=(WIDTH, 5.4))
    panels = figure.subplots(2, 2).flatten()
    primary = next((run.primary_measure for _, runs in arms for run in runs if run.primary_measure), None)
    plots = [
        ("train/loss", "step", "training loss by step"),
        ("train/loss", "epoch", "training loss by epoch"),
        (f"val/{study.metric.name}", "epoch", f"validation {study.metric.name}"),
    ]
    if primary:
        plots.append((primary, "epoch", f"near-rank loss of {label_of(MetricKey.parse(primary).layer, 20)}"))
    panels[3].set_visible(primary is not None)
    line_styles, data = _line_styles(study, [arm for arm, _ in arms]), []
    for axes, (name, against, title) in zip(panels, plots, strict=False):
        for arm, runs in arms:
            for number, run in enumerate(runs):
                x, y = _smooth(*run.series(name, against))
                faint = {"linewidth": 0.7, "alpha": 0.35} if number else {}
                text = tip(f"{label_of(arm)}, seed {run.seed}")
                axes.plot(x, y, marker="." if len(x) < 12 else "", gid=text, **line_styles[arm] | faint)
                if against == "epoch":
                    steps = _smooth(*run.series(name, "step"))[0]
                    of_run = {"arm": arm, "seed": run.seed, "metric": name}
                    data += [
                        of_run | {"step": round(float(step), 1), "epoch": float(epoch), "value": float(value)}
                        for step, epoch, value in zip(steps, x, y, strict=True)
                    ]
        axes.set_title(title)
        axes.set_xlabel("optimizer step" if against == "step" else "epoch")
    panels[0].set_xscale("log")
    plain_tick_labels(panels[0].xaxis)
    for axes in panels[:2]:
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
        plain_tick_labels(axes.yaxis)
    handles = {line_style["label"]: Line2D([], [], **line_style) for line_style in line_styles.values()}
    legend_above(figure, [*handles.values()])
    last_losses = {arm: [y[-1] for run in runs if len(y := run.series("train/loss")[1])] for arm, runs in arms}
    means = [f"{arm} {mean_and_std(values)[0]:.3g}" for arm, values in last_losses.items()]
    sentences = ["All runs by step and by epoch."]
    if any(len(runs) > 1 for _, runs in arms):
        sentences.append("The first seed of an arm is in full colour, the others are faint.")
    if any(len(run.series("train/loss")[0]) > MAX_POINTS for _, runs in arms for run in runs):
        sentences.append(f"Long curves are means over {MAX_POINTS} consecutive intervals.")
    return ReportFigure(figure, f"Last training loss: {listed(means)}.", data, " ".join(sentences))


def _line_styles(study: StudyData, arms: list[str]) -> dict[str, dict[str, Any]]:
    """Line style of each arm; of more than MAX_COLOURS arms, only the baseline, best and worst are highlighted."""
    if len(study.arms) <= MAX_COLOURS:
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
