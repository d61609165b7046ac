"""The pictures of a report, drawn from run folders. Each function returns a figure, or None where there is no data."""

from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from gengap_dist.report.collect import RunData, StudyData, metric

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A", "#8C510A"]  # Okabe & Ito
LINES = ["-", "--", ":", "-."]
UNTRAINED = "#9A9A9A"
HIGHEST_LOSS = 20.0  # a diverging run leaves the picture here
MAX_PANELS = 9  # layers in one figure; a deeper network shows a spread of them, its tables show all
MAX_BESIDE = 3  # arms of one batch that fit side by side on the batch axis
ROW = 0.22  # inches
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


def colour(study: StudyData, arm: str) -> str:
    """The arm's colour, the same in every figure."""
    return COLOURS[study.arms.index(arm) % len(COLOURS)]


def line_style(study: StudyData, arm: str) -> str:
    """What tells apart the lines of arms that share a colour."""
    return LINES[study.arms.index(arm) // len(COLOURS) % len(LINES)]


def size_label(size: float) -> str:
    """A batch size as people say it.

    >>> size_label(16384), size_label(1294)
    ('16,384', '1,294')
    """
    return f"{size:,.0f}"


def _arms(study: StudyData) -> list[tuple[str, list[RunData]]]:
    return [(arm, runs) for arm in study.arms if (runs := study.of(arm))]


def batch_axis(axes: Axes, sizes: list[int]) -> None:
    """A base-2 axis with a tick at each of `sizes`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_label(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    if len(set(sizes)) > 4:
        axes.tick_params(axis="x", labelrotation=45)
    low, high = min(sizes), max(sizes)
    axes.set_xlim(low / 1.6, high * 1.6)


def in_rows(study: StudyData) -> bool:
    """Whether every arm has a row of its own, because too many share a batch to stand side by side on its axis."""
    sizes = [runs[0].global_size for _, runs in _arms(study)]
    return max(map(sizes.count, sizes), default=0) > MAX_BESIDE


def row_axis(axes: Axes, arms: list[str]) -> None:
    """A row for each of `arms`, the first on top."""
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.4, -0.6)


def _dots(axes: Axes, rows: bool, at: float, values: Any, **style: Any) -> None:
    """Marks of an arm's values: in its row, or over its place on the batch axis."""
    along = np.full(len(values), at)
    axes.plot(*((values, along) if rows else (along, values)), linestyle="", **style)


def accuracy(study: StudyData) -> Figure | None:
    """Test accuracy of every arm by its global batch, or in rows: seeds are dots, means have their t interval."""
    results = {arm: list(study.results(arm, "test/accuracy").values()) for arm, _ in _arms(study)}
    arms = [arm for arm, values in results.items() if values]
    if len(arms) < 2:
        return None
    rows = in_rows(study)
    figure = Figure(figsize=(7.2, ROW * len(arms) + 0.8 if rows else 4.2))
    axes = figure.subplots()
    sizes = [study.of(arm)[0].global_size for arm in arms]
    for number, arm in enumerate(arms):
        values, c = 100 * np.array(results[arm]), colour(study, arm)
        at, mean, half = number if rows else _beside(sizes, number, 1.09), values.mean(), _t_half(values)
        _dots(axes, rows, at, values, marker="o", color=c, alpha=0.45, markersize=5, mew=0)
        middle = [mean, at] if rows else [at, mean]
        bar = {"xerr" if rows else "yerr": half or None}
        axes.errorbar(*middle, **bar, fmt="D", color=c, capsize=4, markersize=6, label=arm)
    axis, limits = (axes.xaxis, axes.set_xlim) if rows else (axes.yaxis, axes.set_ylim)
    axis.set_label_text("test accuracy, %")
    low, high = axis.get_view_interval()
    limits(max(low, -3), min(high, 103))  # an interval may reach beyond what accuracies can be
    if rows:
        row_axis(axes, arms)
        if base := results.get(study.baseline):
            axes.axvline(float(100 * np.mean(base)), color=UNTRAINED, linestyle="--", linewidth=1.2)
    else:
        batch_axis(axes, sizes)
        axes.set_xlabel("global batch (samples per step)")
        axes.legend(loc="best", fontsize=9)
    return figure


def _beside(sizes: list[int], number: int, gap: float) -> float:
    """Where arm `number` stands on the batch axis: arms of one batch stand side by side.

    >>> [_beside([8, 64, 64], number, 2.0) for number in range(3)]
    [8.0, 32.0, 128.0]
    """
    twins = [i for i, size in enumerate(sizes) if size == sizes[number]]
    return sizes[number] * gap ** (2 * twins.index(number) - len(twins) + 1)


def _t_half(values: np.ndarray) -> float:
    from scipy import stats

    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def chosen_layers(study: StudyData, most: int = MAX_PANELS, *, centred: bool = False) -> list[str]:
    """Raw (or centred) layer keys, at most `most` of them, spread over the depth of the network."""
    keys = [key for key in study.layer_keys() if key.endswith("/centred") == centred]
    if len(keys) <= most:
        return keys
    return [keys[round(i * (len(keys) - 1) / (most - 1))] for i in range(most)]


def by_layer(study: StudyData, name: str, threshold: str, label: str) -> Figure | None:
    """A measure of every layer by global batch, or in rows: trained (means and seeds) beside untrained (dashed)."""
    keys, arms, rows = chosen_layers(study), _arms(study), in_rows(study)
    if not keys or not arms:
        return None
    num_columns = min(3, len(keys))
    num_rows = -(-len(keys) // num_columns)
    height = ROW * len(arms) + 0.5 if rows else 2.5
    figure = Figure(figsize=(3.1 * num_columns + 0.8 * rows, height * num_rows + 0.5))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey="row" if rows else "none")
    sizes = [runs[0].global_size for _, runs in arms]
    for panel, key in zip(grid.flatten(), keys, strict=False):
        untrained = [run.untrained_and_trained(metric(name, key, threshold))[0] for _, runs in arms for run in runs]
        if np.isfinite(untrained).any():
            line = panel.axvline if rows else panel.axhline
            line(np.nanmean(untrained), color=UNTRAINED, linestyle="--", linewidth=1.4)
        for number, (arm, _) in enumerate(arms):
            values = [run.untrained_and_trained(metric(name, key, threshold))[1] for run in study.finished(arm)]
            at, c = number if rows else _beside(sizes, number, 1.18), colour(study, arm)
            _dots(panel, rows, at, values, marker="o", color=c, alpha=0.45, markersize=4, mew=0)
            if np.isfinite(values).any():
                _dots(panel, rows, at, [np.nanmean(values)], marker="D", color=c, markersize=6)
        if rows:
            row_axis(panel, [arm for arm, _ in arms])
        else:
            batch_axis(panel, sizes)
        panel.set_title(key)
        limits = panel.set_xlim if rows else panel.set_ylim
        limits(*((-0.04, 1.04) if name == "near_rank_loss" else (0, None)))
    for panel in grid.flatten()[len(keys) :]:
        panel.set_visible(False)
    handles = [Line2D([], [], color=colour(study, arm), linestyle="", marker="D", label=arm) for arm, _ in arms]
    handles = [*([] if rows else handles), Line2D([], [], color=UNTRAINED, linestyle="--", label="untrained")]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 6), fontsize=9)
    figure.supxlabel(label if rows else "global batch", fontsize=10)
    figure.supylabel("" if rows else label, fontsize=10)
    return figure


def spectra_over_steps(study: StudyData) -> Figure | None:
    """Singular values of a few layers, one line per measured step, with the numerical floor; one arm per batch."""
    keys = chosen_layers(study, 3)
    arms = [(arm, runs[0]) for arm, runs in _arms(study) if runs[0].spectra_steps()]
    if not keys or not arms:
        return None
    arms = [arm for at, arm in enumerate(arms) if arm[1].global_size not in {a[1].global_size for a in arms[:at]}][:4]
    figure = Figure(figsize=(2.9 * len(arms) + 1.2, 2.4 * len(keys) + 0.4))
    grid = figure.subplots(len(keys), len(arms), squeeze=False, sharey="row")
    scheme = colormaps["viridis"]
    most = max(run.spectra_steps()[-1] for _, run in arms)
    for column, (arm, run) in enumerate(arms):
        for step in run.spectra_steps():
            spectra = run.spectra(step)
            shade = scheme(np.log1p(step) / max(np.log1p(most), 1e-9))
            for row, key in enumerate(keys):
                if key not in spectra:
                    continue
                values, facts = spectra[key]
                index = np.arange(1, len(values) + 1)
                seen = values > facts["floor"]
                first = {"color": UNTRAINED, "linestyle": "--"} if step == 0 else {"color": shade}
                grid[row, column].plot(index[seen], values[seen], linewidth=1.2, **first)
                if step == run.spectra_steps()[-1]:
                    grid[row, column].axhline(facts["floor"], color="#777777", linewidth=1, linestyle=":")
        for row, key in enumerate(keys):
            grid[row, column].set_yscale("log")
            if row == 0:
                grid[row, column].set_title(f"{arm}, seed {run.seed}")
            if column == 0:
                grid[row, column].set_ylabel(key)
            if row == len(keys) - 1:
                grid[row, column].set_xlabel("index of singular value")
    norm = SymLogNorm(1, vmin=0, vmax=max(most, 1))
    bar = figure.colorbar(ScalarMappable(norm, scheme), ax=grid, fraction=0.025, pad=0.02)
    bar.set_label("step (dashed grey: untrained; dotted: floor)", fontsize=9)
    return figure


def curves(study: StudyData) -> Figure | None:
    """Training loss by step and by epoch, validation accuracy by epoch: the first seed strong, the others faint."""
    arms = [(arm, runs) for arm, runs in _arms(study) if len(runs[0].series("train/loss")[0])]
    if not arms:
        return None
    figure = Figure(figsize=(12.5, 3.4))
    panels = figure.subplots(1, 3)
    plots = (
        (panels[0], "train/loss", "step", "training loss", "optimizer step"),
        (panels[1], "train/loss", "epoch", "training loss", "epoch"),
        (panels[2], "val/accuracy", "epoch", "validation accuracy", "epoch"),
    )
    for axes, name, against, title, label in plots:
        for arm, runs in arms:
            for number, run in enumerate(runs):
                x, y = run.series(name, against)
                x, y = _smooth(x, y, 80)
                strong = {"linewidth": 1.6, "label": arm} if number == 0 else {"linewidth": 0.8, "alpha": 0.35}
                marker = "." if len(x) < 12 else ""
                style = {"color": colour(study, arm), "linestyle": line_style(study, arm), "marker": marker}
                axes.plot(x, y, **style, **strong)
        axes.set_title(title)
        axes.set_xlabel(label)
    panels[0].set_xscale("log")
    for axes in panels[:2]:
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
    figure.legend(
        *panels[2].get_legend_handles_labels(), loc="outside right upper", fontsize=9 if len(arms) < 16 else 6
    )
    return figure


def _smooth(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over consecutive stretches, `most` of them at most: thousands of noisy steps hide the course."""
    if len(x) <= most:
        return x, y
    cuts = np.linspace(0, len(x), most + 1).astype(int)
    width = np.diff(cuts)
    return tuple(np.add.reduceat(v, cuts[:-1]) / width for v in (x, y))  # type: ignore[return-value]


def measures_over_steps(study: StudyData) -> Figure | None:
    """One run: near-rank loss and effective rank of every layer while it trains."""
    run, keys = study.runs[0], chosen_layers(study)
    if not keys:
        return None
    figure = Figure(figsize=(9.5, 3.4))
    panels = figure.subplots(1, 2)
    measures = (
        ("near_rank_loss", "rel_1e-2", "near-rank loss (share < 0.01 s1)"),
        ("effective_rank", "", "effective rank"),
    )
    for axes, (name, threshold, label) in zip(panels, measures, strict=True):
        for number, key in enumerate(keys):
            x, y = run.series(metric(name, key, threshold))
            axes.plot(x, y, marker=".", color=COLOURS[number % len(COLOURS)], label=key)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_title(label)
        axes.set_xlabel("step")
    panels[1].legend(fontsize=8)
    return figure
