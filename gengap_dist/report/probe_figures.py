"""Pictures of what probes found, drawn from run folders; None where there is nothing to draw."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gengap_dist.report.collect import RunData, StudyData, metric
from gengap_dist.report.figures import COLOURS, UNTRAINED, batch_axis, chosen_layers, colour

MEASURES = (
    ("near_rank_loss", "rel_1e-2", "near-rank loss (share < 0.01 s1)"),
    ("effective_rank", "", "effective rank"),
)
RIVALS = {  # metric: what it is called on its axis
    "noise_scale": "gradient noise scale (samples)",
    "distance_from_init": "distance from initialisation",
    "train/update_norm": "norm of the update",
    "nc1": "NC1",
    "hessian/eigenvalue_1": "largest Hessian eigenvalue",
    "hessian/trace": "Hessian trace",
    "keskar_sharpness": "sharpness (Keskar), %",
}


def all_spectra(study: StudyData) -> Figure | None:
    """Every layer of a run at its last measurement, raw and centred, with its floor and its untrained control."""
    run = study.runs[0]
    steps = run.spectra_steps()
    if not steps:
        return None
    first, last = run.spectra(steps[0]), run.spectra(steps[-1])
    keys = [key for key in last if not key.endswith("/centred")]
    num_columns = min(len(keys), 4 if len(keys) <= 24 else 6)
    num_rows = -(-len(keys) // num_columns)
    figure = Figure(figsize=(2.6 * num_columns + 0.4, 2.1 * num_rows + 0.6))
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel, key in zip(panels, keys, strict=False):
        values, facts = last[key]
        if len(steps) > 1 and key in first:
            _line(panel, *first[key], color=UNTRAINED, linestyle="--", linewidth=1.2)
        if f"{key}/centred" in last:
            _line(panel, *last[f"{key}/centred"], color=COLOURS[1], linewidth=0.9)
        _line(panel, values, facts, color=COLOURS[0], linewidth=1.6)
        panel.axhline(facts["floor"], color="#777777", linewidth=1, linestyle=":")
        panel.set_yscale("log")
        panel.set_title(key, fontsize=8)
        note = f"N {facts['num_samples']:,}, D {facts['num_units']:,}"
        panel.annotate(note, (0.97, 0.93), xycoords="axes fraction", ha="right", va="top", fontsize=7, color="#555555")
        panel.tick_params(labelsize=7)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    handles = [
        Line2D([], [], color=COLOURS[0], linewidth=1.6, label="raw"),
        Line2D([], [], color=COLOURS[1], linewidth=0.9, label="centred"),
        Line2D([], [], color="#777777", linewidth=1, linestyle=":", label="floor"),
    ]
    if len(steps) > 1:
        handles.append(Line2D([], [], color=UNTRAINED, linestyle="--", label="untrained, raw"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9)
    figure.supxlabel("index of singular value", fontsize=9)
    return figure


def _line(panel: Axes, values: np.ndarray, facts: dict, **style: object) -> None:
    seen = values > facts["floor"]
    marker = "." if seen.sum() < 3 else ""
    panel.plot(np.arange(1, len(values) + 1)[seen], values[seen], marker=marker, **style)  # pyright: ignore[reportArgumentType]


def rank_by_samples(study: StudyData) -> Figure | None:
    """Two measures of three layers against N, trained and untrained, for every arm that has control probe sets."""
    keys = chosen_layers(study, 3)
    arms = [arm for arm in study.arms if any(len(_sets(run)) > 1 for run in study.of(arm))]
    if not keys or not arms:
        return None
    figure = Figure(figsize=(3.1 * len(keys) + 0.6, 5.2))
    grid = figure.subplots(2, len(keys), squeeze=False, sharex=True)
    every_size: set[int] = set()
    for row, (name, threshold, label) in enumerate(MEASURES):
        for panel, key in zip(grid[row], keys, strict=True):
            for arm in arms:
                points: dict[str, list[tuple[int, float, float]]] = {}
                for run in study.of(arm):
                    for probe_set, size in _sets(run).items():
                        key_of_set = "/".join(filter(None, (key, probe_set)))
                        ends = run.untrained_and_trained(metric(name, key_of_set, threshold))
                        points.setdefault(probe_set, []).append((size, *ends))
                means = {which: np.nanmean(np.array(values), axis=0) for which, values in points.items()}
                every_size |= {int(mean[0]) for mean in means.values()}
                own = means.pop("own_batch", None)
                size, untrained, trained = np.array(sorted(map(tuple, means.values()))).T
                panel.plot(size, untrained, color=colour(study, arm), linestyle="--", linewidth=1, marker=".")
                panel.plot(size, trained, color=colour(study, arm), marker="o", markersize=4)
                if own is not None:
                    panel.plot(own[0], own[1], "*", color=colour(study, arm), markersize=9, markerfacecolor="none")
                    panel.plot(own[0], own[2], "*", color=colour(study, arm), markersize=9)
            panel.set_title(key if row == 0 else "")
            if name == "near_rank_loss":
                panel.set_ylim(-0.04, 1.04)
            else:
                panel.set_ylim(0, 1.1 * panel.dataLim.y1)
        grid[row, 0].set_ylabel(label)
    for panel in grid[1]:
        batch_axis(panel, sorted(every_size))
        panel.set_xlabel("probe samples N")
    handles = [Line2D([], [], color=colour(study, arm), marker="o", label=arm) for arm in arms]
    handles.append(Line2D([], [], color=UNTRAINED, linestyle="--", marker=".", label="untrained"))
    if any("own_batch" in _sets(run) for arm in arms for run in study.of(arm)):
        handles.append(Line2D([], [], color=UNTRAINED, linestyle="", marker="*", label="own batch"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=9)
    return figure


def _sets(run: RunData) -> dict[str, int]:
    """Probe sets of a run and their sizes: the fixed one is ""."""
    names = {path.parent.name for path in (run.folder / "spectra").glob("*/step_*.npz")}
    sizes = {name: int(name[1:]) for name in names if name[0] == "n" and name[1:].isdigit()}
    if "own_batch" in names:
        sizes["own_batch"] = run.global_size
    return ({"": known} if (known := run.info.get("num_probe_samples")) else {}) | sizes


def rivals_over_steps(study: StudyData) -> Figure | None:
    """One run: every rival explanation that was measured more than once."""
    series = {name: study.runs[0].series(name) for name in RIVALS}
    series = {name: (x, y) for name, (x, y) in series.items() if len(x) > 1}
    if not series:
        return None
    num_columns = min(4, len(series))
    num_rows = -(-len(series) // num_columns)
    figure = Figure(figsize=(3.1 * num_columns, 2.5 * num_rows))
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for number, (panel, (name, (x, y))) in enumerate(zip(panels, series.items(), strict=False)):
        panel.plot(x, y, color=COLOURS[number % len(COLOURS)], marker="." if len(x) < 30 else "")
        panel.set_xscale("symlog", linthresh=1)
        if y.min() > 0 and y.max() > 20 * y.min():
            panel.set_yscale("log")
        panel.set_title(RIVALS[name], fontsize=9)
        panel.set_xlabel("step")
    for panel in panels[len(series) :]:
        panel.set_visible(False)
    return figure
