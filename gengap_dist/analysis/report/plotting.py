"""Shared by all figures of a report: colours of both themes, batch axes and row axes, and saving."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from gengap_dist.analysis.study_data import RunData, StudyData
from gengap_dist.errors import shortened, visible
from gengap_dist.runs.run_folder import write_atomically

THEME = {  # CSS variable: light, dark. Figures are drawn in the light colours; the page replaces them by the variables.
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#586069", "#a3abb4"),
    "line": ("#dfe3e7", "#343b43"),
    "paper": ("#ffffff", "#14171b"),
    "card": ("#f5f7f9", "#1c2126"),
    "quiet": ("#8d949b", "#868e97"),
    "c0": ("#0072b2", "#5fb4ea"),  # Okabe & Ito; c0 is the accent
    "c1": ("#d55e00", "#f58b4c"),
    "c2": ("#009e73", "#35c79d"),
    "c3": ("#cc79a7", "#e3a1c6"),
    "c4": ("#e69f00", "#f2bd4b"),
    "c5": ("#56b4e9", "#97d5f7"),
    "c6": ("#5a5a5a", "#bdbdbd"),
    "c7": ("#8c510a", "#d19a5b"),
}
INK, SOFT, LINE, PAPER, QUIET = (THEME[name][0] for name in ("ink", "soft", "line", "paper", "quiet"))
COLOURS = [light for name, (light, _) in THEME.items() if re.fullmatch(r"c\d", name)]
ACCENT, WARM = COLOURS[:2]
UNTRAINED = QUIET
ROLES = {  # what an arm does to the rank: marker and, of many arms, colour
    "raised": ("^", COLOURS[2]),
    "lowered": ("v", COLOURS[3]),
    "trace": ("s", COLOURS[4]),
    "placebo": ("o", COLOURS[6]),
}
MAX_PANELS = 6  # layers in one figure; of a deeper network, evenly spaced layers are shown
MAX_COLOURS = 6  # arms with a colour each; more have labels, and names under the pointer
MAX_LABEL = 50  # characters of the name of an arm or a layer
MAX_METRIC = 60  # of a metric, which has that of a layer in its middle
WIDTH, COLUMN = 6.4, 3.2  # inches of a figure and of one of its panels: its text can be read on a telephone, too
TIP = "tip:"  # begins the id of what has a text under the pointer
ROW = 0.25  # inches
FORMULA = re.compile(r"(^|;|\t)(?=[=+\-@\t\r\uff1d\uff0b\uff0d\uff20])")  # its beginning in a spreadsheet's cell
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # a place found by matplotlib costs a sixth of a report, and is the same: no labels are above
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names of arms and layers are no formulas
    "svg.hashsalt": "gengap_dist",
    "pdf.fonttype": 42,
}
Row = dict[str, Any]
Item = TypeVar("Item")


class ReportFigure(NamedTuple):
    """A figure, its alternative text (one sentence), the numbers that it shows, one row per point, and its caption."""

    figure: Figure
    alt_text: str
    rows: Sequence[Row]
    caption: str = ""


def save(figure: ReportFigure, folder: Path, name: str, *, pdf: bool) -> tuple[str, str]:
    """Write NAME.svg, NAME.csv and, if `pdf`, NAME.pdf; returns the SVG for the page, and the CSV."""
    text, table = io.StringIO(), as_csv(figure.rows)
    for axis in (axis for axes in figure.figure.axes for axis in (axes.xaxis, axes.yaxis)):
        number_short_axis(axis)
        if not axis.label.get_text():  # it gets no place below the tick labels, which would be measured for it
            axis.set_label_coords(0, 0)
    if layout := figure.figure.get_layout_engine():  # once; savefig would draw the whole figure for the layout
        FigureCanvasSVG(figure.figure)
        layout.execute(figure.figure)
        figure.figure.set_layout_engine("none")
    figure.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = visible(text.getvalue())  # XML has no control characters
    svg = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", svg)
    write_atomically(folder / f"{name}.svg", svg)
    (folder / f"{name}.pdf").unlink(missing_ok=True)  # of an earlier report
    if pdf:
        data = io.BytesIO()
        figure.figure.savefig(data, format="pdf", metadata={"CreationDate": None})
        write_atomically(folder / f"{name}.pdf", data.getvalue())
    write_atomically(folder / f"{name}.csv", table)
    return inline(svg, name, figure.alt_text), table


def as_csv(rows: Sequence[Row]) -> str:
    r"""Rows as CSV; numbers with six digits, missing values empty, an apostrophe before text that begins as a formula.

    In many countries a spreadsheet ends cells at `;`, too.

    >>> as_csv([{"arm": "a", "x": 1 / 3}, {"arm": "=b", "x": float("nan")}, {"arm": "c;=d", "x": 1.0}])
    "arm,x\na,0.333333\n'=b,\nc;'=d,1\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(map(_cell, names))
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return visible(FORMULA.sub(r"\1'", value))
    return format(value, ".6g") if isinstance(value, float) else value


def inline(svg: str, name: str, alt_text: str) -> str:
    """A saved SVG as part of a page: unique ids, colours and fonts of the page, two decimals."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda at: f' id="{name}-{at[1]}"' if at[1] in used else "", svg)
    svg = re.sub(r'((?:href="|url\()#)', rf"\1{name}-", svg)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), svg)
    svg = re.sub(r'( [xy]="-?\d+\.\d\d)\d+"', r'\1"', svg)
    svg = re.sub(r"font: ((?:bold|\d00) )?([\d.]+px)[^;\"]*", _font, svg)
    for variable, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{variable})")
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0]) * 4 / 3  # points to CSS pixels
    label = alt_text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r'<svg.*?(viewBox="[^"]*").*?>',
        lambda head: f'<svg role="img" aria-label="{label}" style="--width: {width:.0f}px" {head[1]}>',
        re.sub(r"\n\s*", "\n", svg),
        count=1,
        flags=re.S,
    )


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + (f"; font-weight: {match[1].strip()}" if match[1] else "")


def listed(words: Sequence[str], max_words: int = 6) -> str:
    """The first `max_words` words as a list, and the number of the others.

    >>> listed(["a 1", "b 2"]), listed(list("abcd"), 2)
    ('a 1, b 2', 'a, b and 2 more')
    """
    rest = len(words) - max_words
    return ", ".join(words[:max_words]) + (f" and {rest} more" if rest > 0 else "")


def label_of(name: str, max_length: int = MAX_LABEL) -> str:
    """The name of a layer, metric or arm as text in a figure: shortened, and not begun by `_`, which legends leave out.

    >>> label_of("fc2/pool"), label_of("_a"), len(label_of(300 * "x"))
    ('fc2/pool', ' _a', 50)
    """
    shown = shortened(visible(name), max_length)
    return f" {shown}" if shown.startswith("_") else shown


def colour(study: StudyData, arm: str) -> str:
    """The arm's colour, the same in every figure; of more than MAX_COLOURS arms that of its role."""
    if len(study.arms) <= MAX_COLOURS:
        return COLOURS[study.arms.index(arm)]
    if arm == study.baseline:
        return WARM
    return ROLES[study.rank_roles[arm]][1] if arm in study.rank_roles else ACCENT


def mean_marker(study: StudyData, arm: str) -> dict[str, Any]:
    """Style of the mean of an arm: a marker for each role, open for a placebo."""
    role = study.rank_roles.get(arm)
    marker = ROLES[role][0] if role else "D"
    is_open = {"mfc": PAPER, "mew": 1.6} if role == "placebo" else {}
    return {"marker": marker, "color": colour(study, arm), **is_open}


def arm_handles(study: StudyData, arms: Sequence[str], *, by_role: bool = False, **style: Any) -> list[Line2D]:
    """Entries of a legend: one for each arm, or for the baseline, the others, and each role.

    Args:
        study: the arms.
        arms: those of the figure.
        by_role: whether the figure has the markers of `mean_marker`.
        style: of all entries.
    """
    named = {label_of(arm): arm for arm in arms}
    if len(study.arms) > MAX_COLOURS:
        named = {f"{label_of(study.baseline)} (baseline)": study.baseline}
        for arm in (each for each in arms if each != study.baseline):
            named.setdefault(study.rank_roles.get(arm, "other arms"), arm)
    out = []
    for label, arm in named.items():
        of_arm: dict[str, Any] = mean_marker(study, arm) if by_role else {"color": colour(study, arm)}
        out.append(Line2D([], [], label=label, **style, **of_arm))
    return out


def roles_sentence(study: StudyData, arms: Sequence[str]) -> str:
    """What the markers of roles mean, with a space before it; empty if no arm has one."""
    words = {
        "raised": "triangles up raise the rank",
        "lowered": "triangles down lower the rank",
        "trace": "squares hold the trace",
        "placebo": "open circles are placebos",
    }
    shown = {study.rank_roles.get(arm) for arm in arms}
    text = ", ".join(words[role] for role in words if role in shown)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def legend_above(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """A legend above all panels, with as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() / (0.55 + 0.085 * longest))))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=9)


def tip(text: str) -> str:
    """A `gid` that shows a text under the pointer."""
    return TIP + text


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    avoid: Sequence[tuple[float, float]] = (),
    fontsize: float = 9,
) -> None:
    """Names beside points, over no point and no other name: a name that is far from its point has a line to it.

    Each name takes the nearest free place, the lowest points first.

    Args:
        axes: with their final limits, in a figure with its legend.
        points: x, y, name and colour.
        avoid: other points that are drawn.
        fontsize: of the names.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    if layout := figure.get_layout_engine():
        layout.execute(figure)
    to_points = 72 / figure.dpi
    drawn = axes.transData.transform([*((x, y) for x, y, _, _ in points), *avoid]) * to_points  # [num_points, 2]
    (left, bottom), (right, top) = axes.bbox.get_points() * to_points
    taken: list[Box] = []

    def is_free(box: Box) -> bool:
        is_inside = left <= box[0] and box[2] <= right + 2 and bottom <= box[1] and box[3] <= top + 4
        return is_inside and not _covers(box, drawn) and not any(_overlap(box, other) for other in taken)

    order = sorted(range(len(points)), key=lambda at: (drawn[at][1], drawn[at][0]))
    for at in order:
        x, y, name, c = points[at]
        text = label_of(name, 24)
        places = _places(drawn[at], 0.62 * fontsize * len(text) + 2, fontsize + 2)
        free = (place for place in places if is_free(place[2]))
        dx, dy, box = next(free, (8.0, 0.0, (0.0, 0.0, 0.0, 0.0)))
        taken.append(box)
        line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
        label = axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset points", ha="right" if dx < 0 else "left", va="center",
            color=c, fontsize=fontsize, arrowprops=line if math.hypot(dx, dy) > 12 else None,
        )  # fmt: skip
        label.set_in_layout(False)


Box = tuple[float, float, float, float]


def _places(point: np.ndarray, width: float, height: float) -> Iterator[tuple[float, float, Box]]:
    """Offsets of a name from a point [2], the nearest first, and the box that the name then fills."""
    for distance in range(8, 200, 6):
        for angle in (0, 180, 25, 155, -25, -155, 50, 130, -50, -130, 75, 105, -75, -105):
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            start = point[0] + dx - (width if dx < 0 else 0)
            yield dx, dy, (start, point[1] + dy - height / 2, start + width, point[1] + dy + height / 2)


def _covers(box: Box, points: np.ndarray, distance: float = 3.0) -> bool:
    """Whether one of the points [n, 2] is in a box or nearer to it than `distance`."""
    x, y = points.T
    inside = (x > box[0] - distance) & (x < box[2] + distance) & (y > box[1] - distance) & (y < box[3] + distance)
    return bool(inside.any())


def _overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have a point in common.

    >>> _overlap((0, 0, 2, 2), (1, 1, 3, 3)), _overlap((0, 0, 2, 2), (3, 0, 4, 1))
    (True, False)
    """
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def size_label(size: float) -> str:
    """A batch size with thousands separators.

    >>> size_label(16384), size_label(1294)
    ('16,384', '1,294')
    """
    return f"{size:,.0f}"


def plain_tick_labels(axis: Any) -> None:
    """Labels of a logarithmic axis as plain numbers; small marks at 2 and 5 only, because all eight double the time."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    if not isinstance(locator := axis.get_minor_locator(), NullLocator):  # `batch_axis` removes the small marks
        locator.set_params(subs=(2, 5))
    axis.set_minor_formatter(NullFormatter())


def number_short_axis(axis: Any) -> None:
    """Numbers on a logarithmic axis of less than a decade and a half, which has hardly a power of ten."""
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log" and not isinstance(axis.get_major_locator(), FixedLocator) and 0 < high < 30 * low:
        if high < 5 * low:
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axis.set_minor_locator(FixedLocator([]))
        else:
            axis.set_minor_formatter(axis.get_major_formatter())


def batch_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """A base-2 axis with a tick at each of `sizes`."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_label(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    if len(set(sizes)) > 4:
        axes.tick_params(axis="x", labelrotation=45, labelsize=9)
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)


def row_axis(axes: Axes, names: Sequence[str], max_length: int = MAX_LABEL) -> None:
    """One row for each of `names`, the first at the top."""
    axes.set_yticks(range(len(names)), [label_of(name, max_length) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def labels_width(names: Sequence[str]) -> float:
    """Width of the labels of a `row_axis`, in inches, about."""
    return 0.3 + 0.075 * max(len(label_of(name)) for name in names)


def batch_axis_position(sizes: Sequence[int], number: int, gap: float = 1.09) -> float:
    """Position of arm `number` on the batch axis: arms of one batch size are side by side, within a third of its place.

    >>> [batch_axis_position([8, 64, 64], number, 2.0) for number in range(3)]
    [8.0, 32.0, 128.0]
    """
    same_size = [i for i, size in enumerate(sizes) if size == sizes[number]]
    gap = min(gap, 1.2 ** (2 / len(same_size))) if len(same_size) > 3 else gap
    return sizes[number] * gap ** (2 * same_size.index(number) - len(same_size) + 1)


def arms_with_runs(study: StudyData) -> list[tuple[str, list[RunData]]]:
    """Arms that have a run, in the study's order."""
    return [(arm, runs) for arm in study.arms if (runs := study.runs_of(arm))]


def evenly_spaced(items: Sequence[Item], number: int) -> list[Item]:
    """At most `number` of the items, the first and the last among them.

    >>> evenly_spaced("abcdefg", 3)
    ['a', 'd', 'g']
    """
    if len(items) <= number:
        return [*items]
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def chosen_layers(study: StudyData, max_layers: int = MAX_PANELS) -> list[str]:
    """Raw layer keys, at most `max_layers` of them, evenly spaced over the depth of the network."""
    return evenly_spaced(study.layer_keys(), max_layers)


def one_per_batch(study: StudyData, has: Callable[[RunData], object]) -> Mapping[str, RunData]:
    """The first arm of the smallest, the middle and the largest batch, with its first run for which `has` is true."""
    by_size: dict[int, tuple[str, RunData]] = {}
    for arm, runs in arms_with_runs(study):
        if (run := next(filter(has, runs), None)) is not None:
            by_size.setdefault(run.global_size, (arm, run))
    sizes = sorted(by_size)
    return dict(by_size[size] for size in dict.fromkeys([*sizes[:1], *sizes[len(sizes) // 2 :][:1], *sizes[-1:]]))
