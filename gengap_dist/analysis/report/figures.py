"""Pictures of a study's answer, and of training. Each function returns None where there is nothing to draw."""

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gengap_dist.analysis.report.plotting import (
    ACCENT,
    COLOURS,
    PAPER,
    QUIET,
    ROW,
    SOFT,
    WARM,
    ReportFigure,
    Row,
    arms_with_runs,
    batch_axis,
    beside,
    colour,
    dots,
    in_rows,
    listed,
    plain,
    row_axis,
    row_colour,
)
from gengap_dist.analysis.results import Comparison, Correlation
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.statistics.paired import Interval, differences, spread, t_interval

HIGHEST_LOSS = 20.0  # a diverging run leaves the picture here
MAX_POINTS = 80  # of a curve: thousands of noisy steps hide its course
MAX_EXPLANATIONS, MAX_SCATTERS, MAX_LINES = 20, 6, 8
SIGNIFICANT = 0.05


def accuracy(study: StudyData) -> ReportFigure | None:
    """Test accuracy of every arm by its global batch, or in rows: seeds are dots, means have their t interval."""
    results = {arm: study.results(arm, "test/accuracy") for arm, _ in arms_with_runs(study)}
    arms = [arm for arm, values in results.items() if values]
    if not arms:
        return None
    rows = in_rows(study)
    figure = Figure(figsize=(7.2, ROW * len(arms) + 0.8 if rows else 4.0))
    axes = figure.subplots()
    sizes = [study.of(arm)[0].global_size for arm in arms]
    data: list[Row] = []
    for number, arm in enumerate(arms):
        values, c = 100 * np.array(list(results[arm].values())), (row_colour if rows else colour)(study, arm)
        at, mean, half = number if rows else beside(sizes, number, 1.09), float(values.mean()), _t_half(values)
        dots(axes, rows, at, values, marker="o", color=c, alpha=0.45, markersize=5, mew=0)
        middle = [mean, at] if rows else [at, mean]
        bar = {"xerr" if rows else "yerr": half or None}
        axes.errorbar(*middle, **bar, fmt="D", color=c, capsize=4, markersize=6, label=arm)
        data += [
            {"arm": arm, "global_size": sizes[number], "kind": "seed", "seed": seed, "test/accuracy": value}
            for seed, value in results[arm].items()
        ]
        ends = {"ci_low": (mean - half) / 100, "ci_high": (mean + half) / 100} if half else {}
        data.append({"arm": arm, "global_size": sizes[number], "kind": "mean", "test/accuracy": mean / 100} | ends)
    axis, limits = (axes.xaxis, axes.set_xlim) if rows else (axes.yaxis, axes.set_ylim)
    axis.set_label_text("test accuracy, %")
    low, high = axis.get_view_interval()
    limits(max(low, -3), min(high, 103))  # an interval may reach beyond what accuracies can be
    if rows:
        row_axis(axes, arms)
    else:
        batch_axis(axes, sizes)
        axes.set_xlabel("global batch (samples per step)")
        axes.legend(loc="best", fontsize=9)
    means = [f"{row['arm']} {row['test/accuracy']:.2%}" for row in data if row["kind"] == "mean"]
    return ReportFigure(figure, f"Mean test accuracy: {listed(means)}.", data)


def gap(study: StudyData, said: Comparison) -> ReportFigure | None:
    """What each arm loses against the baseline, in rows: seeds, means, t intervals; runs without a result counted."""
    arms = [arm for arm, _ in arms_with_runs(study) if arm != said.baseline]
    if not any(arm in said.gaps for arm in arms):
        return None
    figure = Figure(figsize=(7.2, ROW * len(arms) + 1.1))
    axes = figure.subplots()
    data: list[Row] = []
    axes.axvline(0, color=SOFT, linestyle="--", linewidth=1.2)
    edge = axes.get_yaxis_transform()
    for number, arm in enumerate(arms):
        found, lost = said.gaps.get(arm), study.not_finished(arm)
        row: Row = {"arm": arm, "global_size": study.of(arm)[0].global_size, "lost": lost}
        words = [f"{lost}"] if lost else []
        if found is None:
            data.append(row | {"kind": "mean"})
            words.append("no pair")
        else:
            known, inner = found.paired, found.holm is not None and found.holm < SIGNIFICANT
            c = ACCENT if inner else SOFT
            dots(
                axes, True, number, [100 * d for d in known.differences.values()], marker="o", color=c, alpha=0.4, mew=0
            )
            if known.student:
                axes.plot([100 * end for end in known.student], [number] * 2, color=c, linewidth=1.8)
            axes.plot(100 * known.mean, number, "D", color=c, markersize=6.5, mfc=c if inner else PAPER, mew=1.6)
            data += [row | {"kind": "seed", "seed": s, "sb_lb_gap": d} for s, d in known.differences.items()]
            low, high = known.student or (None, None)
            mean = {"kind": "mean", "sb_lb_gap": known.mean, "ci_low": low, "ci_high": high, "holm_p": found.holm}
            data.append(row | mean)
        if words:
            axes.text(1.01, number, ", ".join(words), transform=edge, va="center", color=WARM, fontsize=9)
    row_axis(axes, arms)
    axes.set_xlabel(f"points of test accuracy lost against {said.baseline} (right of 0: the arm is worse)")
    handles = [
        Line2D([], [], color=ACCENT, marker="D", label=f"differs (Holm p < {SIGNIFICANT:g})"),
        Line2D([], [], color=SOFT, marker="D", mfc=PAPER, mew=1.6, label="not told apart"),
        Line2D([], [], color=SOFT, marker="o", alpha=0.4, mew=0, linestyle="", label="one seed"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    means = [
        f"{row['arm']} {100 * row['sb_lb_gap']:+.2f}" for row in data if row["kind"] == "mean" and "sb_lb_gap" in row
    ]
    return ReportFigure(figure, f"Points of test accuracy lost against {said.baseline}: {listed(means)}.", data)


def updates_to_target(study: StudyData, said: Comparison) -> ReportFigure | None:
    """Updates to the validation target by batch (Shallue et al. 2019), with the curve, its bend and perfect scaling."""
    target = said.target
    reached = {arm: seeds for arm, seeds in target.updates.items() if seeds and study.of(arm)} if target else {}
    if target is None or not reached:
        return None
    size_of = {arm: runs[0].global_size for arm, runs in arms_with_runs(study)}
    sizes = [size_of[arm] for arm in reached]
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    data: list[Row] = []
    for number, (arm, seeds) in enumerate(reached.items()):
        at = beside(sizes, number, 1.06)
        label = arm if len(reached) <= MAX_LINES else None
        dots(axes, False, at, list(seeds.values()), marker="o", color=colour(study, arm), alpha=0.7, mew=0, label=label)
        data += [
            {"kind": "seed", "arm": arm, "global_size": size_of[arm], "seed": s, "updates_to_target": updates}
            for s, updates in seeds.items()
        ]
    least = min(sizes)
    first = float(np.mean([u for arm, seeds in reached.items() if size_of[arm] == least for u in seeds.values()]))
    missed = {arm: count for arm, count in target.missed.items() if count and arm in size_of}
    every_size = [*sizes, *(size_of[arm] for arm in missed)]
    x = np.geomspace(least / 1.3, max(every_size) * 1.3, 60)
    axes.plot(x, first * least / x, color=QUIET, linestyle="--", linewidth=1.2, label="perfect scaling")
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
        outside = "" if low < value < high else ", outside the picture"
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
    plain(axes.yaxis)
    axes.set_xlabel("global batch (samples per step)")
    axes.set_ylabel(f"updates to {target.accuracy:.1%} validation accuracy")
    axes.legend(fontsize=9)
    said_of = [f"{arm} {np.mean(list(seeds.values())):,.0f}" for arm, seeds in reached.items()]
    bend = f" Critical batch {target.critical_batch:,.0f}." if target.critical_batch else ""
    return ReportFigure(
        figure, f"Mean updates to {target.accuracy:.1%} validation accuracy: {listed(said_of)}.{bend}", data
    )


def explanations(_: StudyData, said: Comparison) -> ReportFigure | None:
    """Correlation of each explanation with accuracy lost, as it is and given the number of updates."""
    known = _strongest_first(said)[:MAX_EXPLANATIONS]
    if not known:
        return None
    figure = Figure(figsize=(7.2, 0.34 * len(known) + 1.1))
    axes = figure.subplots()
    axes.axvline(0, color=SOFT, linestyle="--", linewidth=1.2)
    data: list[Row] = []
    for number, one in enumerate(known):
        _correlation(axes, number - 0.14, one.r, one.interval, color=ACCENT, marker="o", mfc=ACCENT)
        if one.partial is not None:
            _correlation(axes, number + 0.14, one.partial, one.partial_interval, color=WARM, marker="D", mfc=PAPER)
        low, high = one.interval or (None, None)
        partial_low, partial_high = one.partial_interval or (None, None)
        data.append(
            {
                "measure": one.measure,
                "r": one.r,
                "ci_low": low,
                "ci_high": high,
                "partial_r": one.partial,
                "partial_ci_low": partial_low,
                "partial_ci_high": partial_high,
                "p": one.p,
                "holm_p": one.holm,
                "num_runs": one.num_runs,
                "num_arms": one.num_arms,
            }
        )
    row_axis(axes, [one.measure for one in known])
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("correlation with test accuracy lost, over runs, seeds removed")
    handles = [
        Line2D([], [], color=ACCENT, marker="o", label="r, 95% interval"),
        Line2D([], [], color=WARM, marker="D", mfc=PAPER, label="r given the number of updates"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9)
    strongest = listed([f"{one.measure} {one.r:+.2f}" for one in known], 4)
    return ReportFigure(figure, f"Correlation with test accuracy lost, strongest first: {strongest}.", data)


def _strongest_first(said: Comparison) -> list[Correlation]:
    return sorted(said.correlations, key=lambda one: -abs(one.r))


def _correlation(axes: Axes, at: float, r: float, ends: Interval | None, *, color: str, **style: Any) -> None:
    if ends:
        axes.plot(ends, [at, at], color=color, linewidth=1.4)
    axes.plot(r, at, color=color, markersize=5.5, **style)


def gap_against_explanations(study: StudyData, said: Comparison) -> ReportFigure | None:
    """Accuracy lost in each run against its strongest explanations, a panel each."""
    lost = {
        arm: differences(study.results(said.baseline, "test/accuracy"), study.results(arm, "test/accuracy"))
        for arm in study.arms
    }
    panels: dict[str, list[Row]] = {}
    for name in (one.measure for one in _strongest_first(said)):
        rows: list[Row] = [
            {"measure": name, "arm": arm, "seed": run.seed, "value": value, "sb_lb_gap": by_seed[run.seed]}
            for arm, by_seed in lost.items()
            for run in study.finished(arm)
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
    few = len(study.arms) <= MAX_LINES
    figure = Figure(figsize=(2.9 * num_columns + 0.6, 2.5 * num_rows + (0.6 if few else 0.2)))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, (name, rows) in zip(grid.flatten(), panels.items(), strict=False):
        for arm in study.arms:
            mine = [row for row in rows if row["arm"] == arm]
            c = (colour if few else row_colour)(study, arm)
            x, y = [row["value"] for row in mine], [100 * row["sb_lb_gap"] for row in mine]
            axes.plot(x, y, "o", color=c, alpha=0.6, markersize=5, mew=0)
        values = [row["value"] for row in rows]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_xscale("log")
            plain(axes.xaxis)
        axes.axhline(0, color=QUIET, linewidth=1, linestyle="--")
        axes.set_title(name, fontsize=9)
    for axes in grid.flatten()[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("points of test accuracy lost", fontsize=10, color=SOFT)
    named = (
        [(arm, colour(study, arm)) for arm in study.arms] if few else [(said.baseline, WARM), ("other arms", ACCENT)]
    )
    handles = [Line2D([], [], color=c, linestyle="", marker="o", label=arm) for arm, c in named]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), fontsize=9)
    count = len(next(iter(panels.values())))
    says = f"Accuracy lost by {count} runs against {listed(list(panels))}."
    return ReportFigure(figure, says, [row for rows in panels.values() for row in rows])


def curves(study: StudyData) -> ReportFigure | None:
    """Training loss by step and by epoch, validation accuracy by epoch: the first seed strong, the others faint."""
    arms = [(arm, runs) for arm, runs in arms_with_runs(study) if any(len(run.series("train/loss")[0]) for run in runs)]
    if not arms:
        return None
    figure = Figure(figsize=(10.4, 3.4))
    panels = figure.subplots(1, 3)
    plots = (
        (panels[0], "train/loss", "step", "training loss", "optimizer step"),
        (panels[1], "train/loss", "epoch", "training loss", "epoch"),
        (panels[2], "val/accuracy", "epoch", "validation accuracy", "epoch"),
    )
    looks, data = _looks(study, [arm for arm, _ in arms]), []
    for axes, name, against, title, label in plots:
        for arm, runs in arms:
            for number, run in enumerate(runs):
                x, y = _smooth(*run.series(name, against))
                faint = {"linewidth": 0.7, "alpha": 0.35} if number else {}
                axes.plot(x, y, marker="." if len(x) < 12 else "", **looks[arm] | faint)
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
    plain(panels[0].xaxis)
    for axes in panels[:2]:
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
        plain(axes.yaxis)
    handles = {look["label"]: Line2D([], [], **look) for look in looks.values()}
    figure.legend(handles=[*handles.values()], loc="outside upper center", ncols=min(len(handles), 5), fontsize=9)
    ends = {arm: [y[-1] for run in runs if len(y := run.series("train/loss")[1])] for arm, runs in arms}
    says = f"Last training loss: {listed([f'{arm} {spread(values)[0]:.3g}' for arm, values in ends.items()])}."
    return ReportFigure(figure, says, data)


def _looks(study: StudyData, arms: list[str]) -> dict[str, dict[str, Any]]:
    """How each arm's lines look; of more than MAX_LINES arms the baseline, the best and the worst stand out."""
    if len(arms) <= MAX_LINES:
        return {arm: {"color": colour(study, arm), "linewidth": 1.6, "label": arm} for arm in arms}
    means = {arm: spread([*found.values()])[0] for arm in arms if (found := study.results(arm, "test/accuracy"))}
    rest = sorted((arm for arm in means if arm != study.baseline), key=means.__getitem__)
    marked = {study.baseline: (WARM, "baseline")}
    if rest:
        marked |= {rest[-1]: (ACCENT, "best of the others"), rest[0]: (COLOURS[2], "worst of the others")}
    return {
        arm: {"color": marked[arm][0], "linewidth": 1.8, "zorder": 3, "label": f"{arm} ({marked[arm][1]})"}
        if arm in marked
        else {"color": QUIET, "linewidth": 0.8, "alpha": 0.7, "label": "other arms"}
        for arm in arms
    }


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over consecutive stretches, MAX_POINTS of them at most."""
    if len(x) <= MAX_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    width = np.diff(cuts)
    return tuple(np.add.reduceat(v, cuts[:-1]) / width for v in (x, y))  # type: ignore[return-value]


def _t_half(values: np.ndarray) -> float:
    ends = t_interval(values)
    return (ends[1] - ends[0]) / 2 if ends else 0.0
