"""Figures of probe measurements, drawn from run folders. Each function returns None if there is nothing to draw."""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gengap_dist.analysis.report.plotting import (
    ACCENT,
    COLOURS,
    COLUMN,
    INK,
    PAPER,
    QUIET,
    SOFT,
    UNTRAINED,
    WARM,
    WIDTH,
    ReportFigure,
    Row,
    arm_handles,
    arms_with_runs,
    batch_axis,
    batch_axis_position,
    chosen_layers,
    colour,
    evenly_spaced,
    label_of,
    labels_width,
    legend_above,
    listed,
    mean_marker,
    one_per_batch,
    plain_tick_labels,
    row_axis,
    tip,
)
from gengap_dist.analysis.report.text import plain
from gengap_dist.analysis.study_data import RunData, StudyData
from gengap_dist.config.measures import MEASURES, OWN_BATCH, SUMMARY
from gengap_dist.config.metric_key import LayerKey, layer_metric

DIAGNOSTICS = {name: known.label for name, known in MEASURES.items() if known.label and not known.per_layer}
MAX_RIDGES = 7  # steps of one panel
MAX_SPECTRA = 12  # layers of which all spectra are drawn
MAX_VALUES = 128  # singular values of one spectrum in its CSV; spectra/*.npz have all
BANDWIDTH = 0.12  # of the density kernel of a ridge, in decades of singular value
NEAR = -2.0  # log10 of the relative near-rank threshold that is drawn


def by_layer(study: StudyData, name: str) -> ReportFigure | None:
    """A measure of every layer, by global batch: trained (means, seeds) and untrained (dashed)."""
    label = MEASURES[name].label
    keys, arms = chosen_layers(study), arms_with_runs(study)
    if not keys or not arms:
        return None
    num_columns = min(2, len(keys))
    num_rows = -(-len(keys) // num_columns)
    figure = Figure(figsize=(max(5.2, COLUMN * num_columns), 2.4 * num_rows + 1.2))
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    sizes = [runs[0].global_size for _, runs in arms]
    data: list[Row] = []
    means = []
    for panel, key in zip(grid, keys, strict=False):
        untrained = [run.untrained_and_trained(layer_metric(name, key))[0] for _, runs in arms for run in runs]
        if np.isfinite(untrained).any():
            panel.axhline(np.nanmean(untrained), color=UNTRAINED, linestyle="--", linewidth=1.4)
        for number, (arm, _) in enumerate(arms):
            runs = study.finished_runs(arm)
            ends = [run.untrained_and_trained(layer_metric(name, key)) for run in runs]
            values = [trained for _, trained in ends]
            at, c = batch_axis_position(sizes, number, 1.18), colour(study, arm)
            panel.plot([at] * len(values), values, "o", color=c, alpha=0.45, markersize=4, mew=0)
            if np.isfinite(values).any():
                mean = float(np.nanmean(values))
                text = tip(f"{label_of(arm)}: {plain(mean)}")
                panel.plot(at, mean, linestyle="", markersize=6, gid=text, **mean_marker(study, arm))
                means += [f"{arm} {mean:.3g}"] if key == keys[-1] else []
            of_arm = {"arm": arm, "global_size": sizes[number], "layer": key}
            data += [
                of_arm | {"seed": run.seed, "untrained": untrained_value, name: trained_value}
                for run, (untrained_value, trained_value) in zip(runs, ends, strict=True)
            ]
        batch_axis(panel, sizes)
        panel.set_title(label_of(key))
        top = panel.dataLim.y1 * 1.08
        panel.set_ylim(*((-0.04, 1.04) if MEASURES[name].is_share else (0, top if top > 0 else None)))
    for panel in grid[len(keys) :]:
        panel.set_visible(False)
    handles = arm_handles(study, [arm for arm, _ in arms], by_role=True, linestyle="")
    legend_above(figure, [*handles, Line2D([], [], color=UNTRAINED, linestyle="--", label="untrained")])
    figure.supxlabel("global batch", fontsize=10, color=SOFT)
    figure.supylabel(label.partition(" (")[0], fontsize=10, color=SOFT)
    alt_text = f"{label[0].upper()}{label[1:]} of {len(keys)} layers; of {keys[-1]}: {listed(means)}."
    source = (
        "Share of singular values below 1% of the largest"
        if MEASURES[name].is_share
        else ("Effective rank (Roy & Vetterli 2007) of the raw activations")
    )
    caption = f"{source}, on the probe set{_of_layers(study, keys)}. Dots are finished runs, larger marks their mean; "
    return ReportFigure(figure, alt_text, data, caption + "the dashed line is the same networks before training.")


def _of_layers(study: StudyData, keys: list[str]) -> str:
    """Which of the layers are drawn, if not all are."""
    number = len(study.layer_keys())
    return f", of {len(keys)} of {number} layers, evenly spaced" if len(keys) < number else ""


def near_rank_change(study: StudyData) -> ReportFigure | None:
    """Arm x layer: change of near-rank loss from the untrained to the trained network; means over finished runs."""
    keys = chosen_layers(study)
    arms = [arm for arm in study.arms if study.finished_runs(arm)]
    table = np.full((len(arms), len(keys)), np.nan)
    data: list[Row] = []
    for i, arm in enumerate(arms):
        for j, key in enumerate(keys):
            runs = study.finished_runs(arm)
            ends = np.array([run.untrained_and_trained(layer_metric("near_rank_loss/rel_1e-2", key)) for run in runs])
            if not (has_both := np.isfinite(ends).all(axis=1)).any():
                continue
            untrained, trained = ends[has_both].mean(axis=0)
            table[i, j] = trained - untrained
            data.append(
                {
                    "arm": arm,
                    "global_size": runs[0].global_size,
                    "layer": key,
                    "num_runs": int(has_both.sum()),
                    "untrained": float(untrained),
                    "near_rank_loss/rel_1e-2": float(trained),
                    "change": float(trained - untrained),
                }
            )
    if not data:
        return None
    heads = [label_of(key) for key in keys]
    longest = max(map(len, heads))
    column_width = max(0.8, 0.1 + 0.085 * longest)  # inches
    labels_rotated = column_width * len(keys) > 8
    head_height = max(1.5, 0.3 + 0.06 * longest) if labels_rotated else 0.5
    width = max(2, labels_width(arms)) + min(column_width * len(keys), 8)
    figure = Figure(figsize=(width, 0.3 * len(arms) + head_height))
    axes = figure.subplots()
    largest = max(np.nanmax(np.abs(table)), 0.01)
    for (i, j), change in np.ndenumerate(table):
        if np.isfinite(change):
            # transparency over the page background, so that 0 has no colour in both themes
            shade = {"facecolor": WARM if change > 0 else ACCENT, "alpha": 0.6 * abs(change) / largest}
            axes.add_patch(Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, linewidth=0, **shade))
        text = f"{100 * change:+.1f}" if np.isfinite(change) else "-"
        axes.text(j, i, "0" if text in ("+0.0", "-0.0") else text, ha="center", va="center", fontsize=9, color=INK)
    row_axis(axes, arms)
    axes.set_xlim(-0.55, len(keys) - 0.45)
    axes.set_xticks(
        range(len(heads)), heads, rotation=40 if labels_rotated else 0, ha="left" if labels_rotated else "center"
    )
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    largest_change = max(data, key=lambda row: abs(row["change"]))
    alt_text = (
        f"Change of near-rank loss by training, percentage points, {len(arms)} arms by {len(keys)} layers; largest: "
        f"{largest_change['arm']}, {largest_change['layer']}: {100 * largest_change['change']:+.1f}."
    )
    caption = (
        f"Share of singular values below 0.01 s1 on the probe set, trained minus untrained, in percentage points"
        f"{_of_layers(study, keys)}; means over finished runs. Orange: training lost rank; blue: training gained it."
    )
    return ReportFigure(figure, alt_text, data, caption)


def spectra_over_steps(study: StudyData) -> ReportFigure | None:
    """Ridgelines: density of the singular values of a few layers on a logarithmic axis, one ridge per measured step."""
    kept = study.layer_keys(with_spectra=True)
    keys = evenly_spaced(kept, 3)
    runs = one_per_batch(study, RunData.spectra_steps)
    if not keys or not runs:
        return None
    figure = Figure(figsize=(max(4.0, min(2.1 * len(runs) + 0.8, WIDTH)), 2.4 * len(keys) + 0.8))
    grid = figure.subplots(len(keys), len(runs), squeeze=False, sharex="row")
    data: list[Row] = []
    for column, (arm, run) in enumerate(runs.items()):
        steps = run.spectra_steps()
        if len(steps) > MAX_RIDGES:
            steps = [steps[round(i * (len(steps) - 1) / (MAX_RIDGES - 1))] for i in range(MAX_RIDGES)]
        spectra = {step: run.spectra(step) for step in steps}
        for row, key in enumerate(keys):
            axes = grid[row, column]
            for number, (step, by_layer_key) in enumerate(spectra.items()):
                if key in by_layer_key and by_layer_key[key][0].max() > by_layer_key[key][1]["floor"]:
                    _ridge(axes, number, len(steps), *by_layer_key[key])
                    of_run = {"arm": arm, "global_size": run.global_size, "seed": run.seed, "layer": key, "step": step}
                    data += [of_run | point for point in _thinned(*by_layer_key[key])]
            axes.axvline(NEAR, color=WARM, linewidth=1.1, linestyle="--", zorder=9)
            axes.set_yticks(range(len(steps)), [f"{step:,}" for step in steps])
            axes.set_ylim(len(steps) - 0.8, -2.1)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            if row == 0:
                axes.set_title(f"{label_of(arm, 20)}, seed {run.seed}")
        grid[-1, column].set_xlabel("log10 of value / largest")
    for axes, key in zip(grid[:, 0], keys, strict=True):
        axes.set_ylabel(f"{label_of(key, 28)}, step")
    handles = [
        Line2D([], [], color=WARM, linestyle="--", label="0.01 s1: values to the left are near-rank loss"),
        Line2D([], [], color=QUIET, marker="|", linestyle="", label="numerical floor"),
    ]
    legend_above(figure, handles)
    last = layer_metric("near_rank_loss/rel_1e-2", keys[-1])
    ends = [(arm, run.untrained_and_trained(last)) for arm, run in runs.items()]
    shares = listed([f"{arm} {first:.1%} to {last_share:.1%}" for arm, (first, last_share) in ends])
    alt_text = f"Share of the singular values of {keys[-1]} below 0.01 s1, from the first step to the last: {shares}."
    which = "one run" if len(runs) == 1 else f"the first arms of {len(runs)} batch sizes"
    is_cleaned = len(kept) < len(study.layer_keys())
    some = f", of layers that gengap clean has kept ({listed(keys)})" if is_cleaned else _of_layers(study, keys)
    caption = (
        f"Distribution of the singular values of {which}{some}, from the first measured step (grey, "
        f"top) to the last: one ridge for each of at most {MAX_RIDGES} steps, all of equal height. Values below "
        f"the numerical floor are not drawn. The CSV has at most {MAX_VALUES} values of each; spectra/*.npz have all."
    )
    return ReportFigure(figure, alt_text, data, caption)


def _ridge(axes: Axes, number: int, count: int, values: np.ndarray, facts: dict) -> None:
    """One spectrum as a ridge on row `number` of `count`: the density of log10 of its values over its largest."""
    floor = float(np.log10(facts["floor"] / values[0]))
    above_floor = np.log10(values[values > facts["floor"]] / values[0])
    x = np.linspace(min(above_floor.min(), NEAR) - 0.6, 0.45, 110)
    height = np.exp(-(((x[:, None] - above_floor) / BANDWIDTH) ** 2) / 2).sum(axis=1)
    height *= 1.9 / height.max()
    colour, zorder = QUIET if number == 0 else ACCENT, 2 + number / count
    axes.fill_between(x, number - height, number, color=PAPER, alpha=0.85, linewidth=0, zorder=zorder)
    axes.fill_between(
        x, number - height, number, color=colour, alpha=0.25 + 0.4 * number / count, linewidth=0, zorder=zorder
    )
    axes.plot(x, number - height, color=colour, linewidth=1.1, zorder=zorder + 0.5 / count)
    if len(above_floor) < len(values):  # values below the floor are lost in rounding: mark the floor
        axes.plot(floor, number, "|", color=QUIET, markersize=8, zorder=zorder)


def _thinned(values: np.ndarray, facts: dict) -> Iterator[Row]:
    for i in np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_VALUES)).astype(int)):
        yield {
            "index": int(i) + 1,
            "singular_value": float(f"{values[i]:.4g}"),
            "floor": float(f"{facts['floor']:.3g}"),
        }


def all_spectra(study: StudyData) -> ReportFigure | None:
    """Every layer of a run at its last measurement, raw and centred, with the floor and the untrained network."""
    run = study.runs[0]
    steps = run.spectra_steps()
    if not steps:
        return None
    first, last = (
        {LayerKey.parse(key): spectrum for key, spectrum in run.spectra(step).items()} for step in (steps[0], steps[-1])
    )
    every = [key for key in last if not key.centred]
    keys = evenly_spaced(every, MAX_SPECTRA)
    if not keys:  # a damaged file
        return None
    num_columns = min(len(keys), 2)
    num_rows = -(-len(keys) // num_columns)
    figure = Figure(figsize=(COLUMN * num_columns, 2.1 * num_rows + 0.7))
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    data: list[Row] = []
    for panel, key in zip(panels, keys, strict=False):
        facts = last[key][1]
        drawn = {"trained": (last[key], {"color": ACCENT, "linewidth": 1.6})}
        if centred := last.get(key._replace(centred=True)):
            drawn["centred"] = (centred, {"color": WARM, "linewidth": 0.9})
        if len(steps) > 1 and key in first:
            drawn["untrained"] = (first[key], {"color": UNTRAINED, "linestyle": "--", "linewidth": 1.2})
        for which, (spectrum, style) in drawn.items():
            _line(panel, *spectrum, **style)
            data += [{"layer": key.format(), "which": which} | point for point in _thinned(*spectrum)]
        if any((values > of["floor"]).any() for (values, of), _ in drawn.values()):  # else the scale has no range
            panel.axhline(facts["floor"], color=QUIET, linewidth=1, linestyle=":")
            panel.set_yscale("log")
        plain_tick_labels(panel.yaxis)
        panel.set_title(label_of(key.format(), 42), fontsize=9)
        note = f"N {facts['num_samples']:,}, D {facts['num_units']:,}"
        panel.annotate(note, (0.97, 0.93), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=SOFT)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    handles = [
        Line2D([], [], color=ACCENT, linewidth=1.6, label="raw"),
        Line2D([], [], color=WARM, linewidth=0.9, label="centred"),
        Line2D([], [], color=QUIET, linewidth=1, linestyle=":", label="floor"),
    ]
    if len(steps) > 1:
        handles.append(Line2D([], [], color=UNTRAINED, linestyle="--", label="untrained, raw"))
    legend_above(figure, handles)
    figure.supxlabel("index of singular value", fontsize=9, color=SOFT)
    names = listed([key.format() for key in keys])
    some = f"{len(keys)} of {len(every)} layers, evenly spaced," if len(keys) < len(every) else "every layer"
    if len(every) < sum(not LayerKey.parse(key).centred for key in run.layer_facts(steps[-1])):
        some = "the layers that gengap clean has kept"
    caption = f"Singular values of {some} at the last measurement; values below the numerical floor are not drawn."
    return ReportFigure(figure, f"Singular values of {len(keys)} layers at step {steps[-1]:,}: {names}.", data, caption)


def _line(panel: Axes, values: np.ndarray, facts: dict, **style: object) -> None:
    above_floor = values > facts["floor"]
    marker = "." if above_floor.sum() < 3 else ""
    panel.plot(np.arange(1, len(values) + 1)[above_floor], values[above_floor], marker=marker, **style)  # pyright: ignore[reportArgumentType]


def rank_by_samples(study: StudyData) -> ReportFigure | None:
    """Two measures of three layers against N, trained and untrained, for every arm with probe sets of other sizes."""
    keys = chosen_layers(study, 3)
    arms = [arm for arm in study.arms if any(len(_probe_set_sizes(run)) > 1 for run in study.runs_of(arm))]
    if not keys or not arms:
        return None
    figure = Figure(figsize=(WIDTH, 2.3 * len(keys) + 0.9))
    grid = figure.subplots(len(keys), 2, squeeze=False, sharex=True)
    data: list[Row] = []
    for column, name in enumerate(SUMMARY):
        for row, (panel, key) in enumerate(zip(grid[:, column], keys, strict=True)):
            for arm in arms:
                points: dict[str, list[tuple[int, float, float]]] = {}
                for run in study.runs_of(arm):
                    for probe_set, size in _probe_set_sizes(run).items():
                        ends = run.untrained_and_trained(layer_metric(name, key, probe_set))
                        if np.isfinite(ends).any():
                            points.setdefault(probe_set, []).append((size, *ends))
                means = {which: _mean(values) for which, values in points.items()}
                data += [
                    {
                        "arm": arm,
                        "layer": key,
                        "measure": name,
                        "probe_set": which or "fixed",
                        "num_samples": int(size),
                        "untrained": untrained,
                        "trained": trained,
                    }
                    for which, (size, untrained, trained) in means.items()
                ]
                own = means.pop(OWN_BATCH, None)
                if means:
                    size, untrained, trained = np.array(sorted(means.values())).T
                    panel.plot(size, untrained, color=colour(study, arm), linestyle="--", linewidth=1, marker=".")
                    panel.plot(size, trained, color=colour(study, arm), marker="o", markersize=4)
                if own is not None:
                    panel.plot(own[0], own[1], "*", color=colour(study, arm), markersize=9, markerfacecolor="none")
                    panel.plot(own[0], own[2], "*", color=colour(study, arm), markersize=9)
            panel.set_title(MEASURES[name].label.partition(" (")[0] if row == 0 else "")
            panel.set_ylim(*((-0.04, 1.04) if MEASURES[name].is_share else (0, None)))
    for panel, key in zip(grid[:, 0], keys, strict=True):
        panel.set_ylabel(label_of(key, 28))
    if not data:
        return None
    for panel in grid[-1]:
        batch_axis(panel, sorted({row["num_samples"] for row in data}))
        panel.set_xlabel("probe samples N")
    handles = arm_handles(study, arms, marker="o")
    handles.append(Line2D([], [], color=UNTRAINED, linestyle="--", marker=".", label="untrained"))
    has_own_batch = any(OWN_BATCH in _probe_set_sizes(run) for arm in arms for run in study.runs_of(arm))
    if has_own_batch:
        handles.append(Line2D([], [], color=UNTRAINED, linestyle="", marker="*", label="own batch"))
    legend_above(figure, handles)
    sizes = sorted({row["num_samples"] for row in data})
    alt_text = (
        f"Near-rank loss and effective rank of {listed(keys)} against {sizes[0]:,} to {sizes[-1]:,} probe samples."
    )
    caption = (
        f"Rank against the number of probe samples{_of_layers(study, keys)}, for the trained network (solid) and the "
        "untrained one (dashed), which shows the effect of the sample size alone."
    )
    if has_own_batch:
        caption += " Stars: the probe set is as large as the arm's own batch."
    return ReportFigure(figure, alt_text, data, caption)


def _mean(values: list[tuple[int, float, float]]) -> tuple[float, ...]:
    """Column means without nan; nan for a column of nan only."""
    columns = [[v for v in column if v == v] for column in zip(*values, strict=True)]
    return tuple(float(np.mean(column)) if column else float("nan") for column in columns)


def _probe_set_sizes(run: RunData) -> dict[str, int]:
    """Probe sets of a run and their sizes; the name of the fixed one is ""."""
    names = {path.parent.name for path in (run.folder / "spectra").glob("*/step_*.npz")}
    sizes = {name: int(name[1:]) for name in names if name[0] == "n" and name[1:].isdigit()}
    if OWN_BATCH in names:
        sizes[OWN_BATCH] = run.global_size
    return ({"": fixed_size} if (fixed_size := run.info.get("num_probe_samples")) else {}) | sizes


def measures_over_steps(study: StudyData) -> ReportFigure | None:
    """One run: near-rank loss and effective rank of every layer during training."""
    keys = chosen_layers(study)
    if not keys:
        return None
    recorded = study.runs[0].history()
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, 2)
    data: list[Row] = []
    for axes, name in zip(panels, SUMMARY, strict=True):
        for number, key in enumerate(keys):
            x, y = recorded.series(layer_metric(name, key))
            axes.plot(x, y, marker=".", color=COLOURS[number], gid=tip(label_of(key)))
            of_layer = {"measure": name, "layer": key}
            data += [of_layer | {"step": int(at), "value": float(v)} for at, v in zip(x, y, strict=True)]
        axes.set_xscale("symlog", linthresh=1)
        plain_tick_labels(axes.xaxis)
        axes.set_title(MEASURES[name].label.partition(" (")[0])
        axes.set_xlabel("step")
    handles = [
        Line2D([], [], marker=".", color=COLOURS[number], label=label_of(key)) for number, key in enumerate(keys)
    ]
    legend_above(figure, handles)
    caption = f"Share of singular values below 1% of the largest, and effective rank{_of_layers(study, keys)}."
    return ReportFigure(figure, f"Near-rank loss and effective rank of {listed(keys)} over steps.", data, caption)


def diagnostics_over_steps(study: StudyData) -> ReportFigure | None:
    """One run: every metric of DIAGNOSTICS that was measured more than once."""
    recorded = study.runs[0].history()
    series = {name: recorded.series(name) for name in DIAGNOSTICS}
    series = {name: (x, y) for name, (x, y) in series.items() if len(x) > 1}
    if not series:
        return None
    num_columns = min(2, len(series))
    num_rows = -(-len(series) // num_columns)
    figure = Figure(figsize=(COLUMN * num_columns, 2.5 * num_rows))
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    data: list[Row] = []
    for number, (panel, (name, (x, y))) in enumerate(zip(panels, series.items(), strict=False)):
        panel.plot(x, y, color=COLOURS[number % len(COLOURS)], marker="." if len(x) < 30 else "")
        panel.set_xscale("symlog", linthresh=1)
        plain_tick_labels(panel.xaxis)
        if y.min() > 0 and y.max() > 20 * y.min():
            panel.set_yscale("log")
            plain_tick_labels(panel.yaxis)
        panel.set_title(DIAGNOSTICS[name], fontsize=9)
        panel.set_xlabel("step")
        data += [{"measure": name, "step": int(at), "value": float(v)} for at, v in zip(x, y, strict=True)]
    for panel in panels[len(series) :]:
        panel.set_visible(False)
    ends = [f"{DIAGNOSTICS[name]} {y[-1]:.3g}" for name, (_, y) in series.items()]
    caption = "Other measures of the same run, over its steps; formulas: docs/measures.md."
    return ReportFigure(figure, f"Other measures at the last step: {listed(ends)}.", data, caption)
