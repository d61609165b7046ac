"""The two figures of scaling.py: measured speeds, and simulated speeds with their assumptions in the figure."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from predicted import (
    ACCELERATOR,
    ETHERNET,
    INFINIBAND,
    MAX_RANKS,
    MODES,
    STRONG_SIZE,
    TITLES,
    WEAK_SIZE,
    Links,
    Task,
    cores,
    curve,
    task,
)

from gengap_dist.analysis.report.plotting import COLOURS, INK, QUIET, SOFT, STYLE, plain_tick_labels
from gengap_dist.preflight.communication_model import Link
from gengap_dist.preflight.machine_constants import ComputeConstants

if TYPE_CHECKING:
    from scaling_data import Measurements

FAR = ("resnet56", "vgg16")  # networks simulated up to 4,096 ranks
Curve = dict[str, Any]


def save(figure: Figure, path: Path) -> None:
    """Save as SVG, with text as text; deterministic."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def measured(found: "Measurements", words: str) -> Figure:
    """Images per second of every network over ranks, measured and predicted."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * max(2, len(found.tasks)) + 0.4, 6.6))
        names: list[Any] = [[f"{mode} {model}" for model in found.tasks] for mode in MODES]
        panels = figure.subplot_mosaic([*names, ["words"] * len(found.tasks)], height_ratios=[1, 1, 0.32])
        for mode in MODES:
            for model in found.tasks:
                _measured_panel(panels[f"{mode} {model}"], found, mode, model)
        marks = [
            Line2D([], [], color=COLOURS[0], marker="o", label="measured: median, minimum and maximum"),
            Line2D([], [], color=COLOURS[1], marker="x", linestyle="--", label="predicted by gengap plan"),
            Line2D([], [], color=QUIET, linestyle=":", label="linear scaling from one rank"),
        ]
        figure.legend(handles=marks, loc="outside upper left", ncols=3, fontsize=9, columnspacing=1.2)
        write(panels["words"], words, width=50 * max(2, len(found.tasks)))
    return figure


def _measured_panel(axes: Axes, found: "Measurements", mode: str, model: str) -> None:
    points = [point for point in found.steps if (point.model, point.mode) == (model, mode)]
    ranks = [point.ranks for point in points]
    speeds = [[point.global_size / seconds for seconds in found.steps[point]] for point in points]
    medians = [statistics.median(each) for each in speeds]
    ends = [[m - min(s) for m, s in zip(medians, speeds, strict=True)]]
    ends += [[max(s) - m for m, s in zip(medians, speeds, strict=True)]]
    predicted = [point.global_size / statistics.median(found.predicted(point, found.beside)) for point in points]
    axes.plot(ranks, [medians[0] * number for number in ranks], color=QUIET, linestyle=":")
    axes.plot(ranks, predicted, color=COLOURS[1], marker="x", linestyle="--")
    axes.errorbar(ranks, medians, yerr=ends, color=COLOURS[0], marker="o", capsize=3)
    for point, speed in zip(points, medians, strict=True):
        ratio = found.efficiency(point)
        if point.ranks > 1:
            label = f"efficiency\n{ratio.median:.2f}" if ratio.is_conclusive else f"efficiency\n{ratio.doubt}"
            axes.annotate(label, (point.ranks, speed), (4, -30), textcoords="offset points", ha="right", fontsize=8.5)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    plain_tick_labels(axes.yaxis)
    axes.margins(x=0.12)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images per second")
    size = f"{points[0].global_size:,} images" + (" a step" if mode == "strong" else " a rank")
    axes.set_title(f"{TITLES[model]}, {mode}: {size}")
    axes.set_xlabel("ranks" if mode == MODES[-1] else "")


def simulation(
    computed: Mapping[str, ComputeConstants], tasks: Mapping[str, Task], inside: Link, machine: str
) -> tuple[list[Curve], list[str]]:
    """Curves of simulated clusters, and their assumptions.

    Args:
        computed: compute constants measured on this machine, by network.
        tasks: the tasks of these networks.
        inside: the measured link between two ranks.
        machine: its name.
    """
    curves: list[Curve] = []

    def add(model: str, what: Task, compute: ComputeConstants, links: Links) -> None:
        for mode in MODES:
            rows = curve(what, mode, compute, links)
            curves.append({"model": model, "mode": mode, "links": links.name, "rows": rows})

    micro_size = 64  # has no effect: gradients are all-reduced once per step
    for model in FAR:
        for links in (INFINIBAND, ETHERNET):
            add(model, task(model, micro_size), ACCELERATOR, links)
    measured_models = [model for model in FAR if model in computed]
    for model in measured_models:
        add(model, tasks[model], computed[model], cores(inside))
    num_train = (
        tasks[measured_models[0]].sizes.num_train if measured_models else task(FAR[0], micro_size).sizes.num_train
    )
    assumptions = [
        "Simulated, not measured: the alpha-beta model of gengap plan. A step is compute plus communication, without "
        "overlap; collectives are hierarchical, inside nodes and then between nodes, over a ring or two trees; "
        "gradients are float32, all-reduced once per step (" + _megabytes(micro_size) + "). No stragglers, no "
        "congestion between nodes; no evaluations, probes or checkpoints.",
        f"Accelerators: {1 / ACCELERATOR.seconds_per_sample:,.0f} images/s and "
        f"{ACCELERATOR.seconds_per_update * 1e3:g} ms per update, assumed for both networks and for any number of "
        "images: real accelerators are slower if a rank has few images.",
        f"{INFINIBAND.name}: {INFINIBAND.words}",
        f"{ETHERNET.name}: {ETHERNET.words}",
        f"Weak scaling past {num_train // WEAK_SIZE:,} ranks needs more images than CIFAR-10 has for "
        f"training ({num_train:,}): a larger data set is assumed. "
        f"Strong scaling ends at {STRONG_SIZE // MAX_RANKS} images a rank.",
    ]
    if measured_models:
        seconds = " and ".join(
            f"{TITLES[model]} {computed[model].seconds_per_sample * 1e3:.2f} ms an image" for model in measured_models
        )
        links = cores(inside)
        assumptions.insert(4, f"{links.name}: {seconds}, measured on this machine ({machine}); {links.words}")
    return curves, assumptions


def _megabytes(micro_size: int) -> str:
    return ", ".join(f"{TITLES[model]} {task(model, micro_size).gradient_bytes / 1e6:.1f} MB" for model in FAR)


def simulated(curves: Sequence[Curve], assumptions: Sequence[str]) -> Figure:
    """Images per second and efficiency to MAX_RANKS ranks."""
    colours = {model: COLOURS[number] for number, model in enumerate(FAR)}
    names = list(dict.fromkeys(each["links"] for each in curves))
    dashes = dict(zip(names, ("-", "--", ":"), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 10.2))
        figure.suptitle("Scaling to 4,096 ranks: simulated, not measured", x=0.01, ha="left", color=INK)
        rows = ("images_per_second", "efficiency")
        mosaic: list[Any] = [[f"{row} {mode}" for mode in MODES] for row in rows]
        panels = figure.subplot_mosaic([*mosaic, ["words", "words"]], height_ratios=[1, 1, 0.86])
        for row, names_of_row in zip(rows, mosaic, strict=True):
            for mode, panel in zip(MODES, names_of_row, strict=True):
                axes = panels[panel]
                for each in (one for one in curves if one["mode"] == mode):
                    points = [(at["ranks"], at[row]) for at in each["rows"]]
                    axes.plot(*zip(*points, strict=True), color=colours[each["model"]], linestyle=dashes[each["links"]])
                axes.set_xscale("log", base=2)
                axes.set_xticks([4**power for power in range(7)], [f"{4**power:,}" for power in range(7)])
                axes.minorticks_off()
                size = f"{STRONG_SIZE:,} images a step" if mode == "strong" else f"{WEAK_SIZE} images a rank"
                if row == "efficiency":
                    axes.set_ylim(0, 1.05)
                    axes.set_xlabel("ranks (GPUs, or cores)")
                    axes.set_ylabel("efficiency per rank")
                else:
                    axes.set_yscale("log")
                    plain_tick_labels(axes.yaxis)
                    axes.set_ylabel("images per second")
                    axes.set_title(f"{mode}: {size}")
        handles = [Line2D([], [], color=colour, label=TITLES[model]) for model, colour in colours.items()]
        handles += [Line2D([], [], color=SOFT, linestyle=dash, label=name) for name, dash in dashes.items()]
        panels["efficiency strong"].legend(handles=handles, loc="lower left", fontsize=8.5)
        write(panels["words"], "\n".join(textwrap.fill(each, 142) for each in assumptions))
    return figure


def write(axes: Axes, text: str, width: int | None = None) -> None:
    """Write text in place of a panel."""
    axes.axis("off")
    words = textwrap.fill(text, width) if width else text
    axes.text(0, 1, words, transform=axes.transAxes, va="top", fontsize=8.5, color=SOFT, linespacing=1.35)
