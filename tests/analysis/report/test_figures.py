"""Pictures show the numbers that were planted, where a reader looks for them, and their CSV says the same."""

import csv
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from gengap_dist.analysis.report import figures, plotting, probe_figures
from gengap_dist.analysis.report.figure_list import RUN_FIGURES, STUDY_FIGURES
from gengap_dist.analysis.report.plotting import ReportFigure
from gengap_dist.analysis.results import Comparison, Correlation, Target
from gengap_dist.analysis.study_data import StudyData, read_study
from gengap_dist.runs.metric import ACCURACY
from tests.analysis.report import folders
from tests.analysis.report.folders import ARMS, accuracy, write_study

NOTHING = Comparison(ACCURACY, "sb8", "", {}, {}, [], None, [], [], margin=0.01)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> StudyData:
    """Four arms of three batches, three seeds, the last run diverged."""
    return read_study(write_study(tmp_path_factory.mktemp("study")))


def means(figure: Figure) -> list[tuple[float, float]]:
    """Where the diamonds are."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    return [(float(np.round(line.get_xdata()[0], 9)), float(np.round(line.get_ydata()[0], 9))) for line in lines]


def drawn(picture: ReportFigure | None) -> ReportFigure:
    assert picture is not None
    return picture


def mean_accuracy(number: int, seeds=range(3)) -> float:
    return float(np.mean([accuracy(number, seed) for seed in seeds]))


def test_arms_of_one_batch_stand_side_by_side(study):
    picture = drawn(figures.test_values(study, NOTHING))
    found = means(picture.figure)
    assert [y for _, y in found] == [
        pytest.approx(100 * mean_accuracy(number, range(2 if number == 3 else 3))) for number in range(4)
    ]
    x = [x for x, _ in found]
    assert x == sorted(x)
    assert x[0] == 8
    assert x[1] < 64 < x[2]  # two arms of 64
    assert x[3] == 256
    rows = [row for row in picture.rows if row["kind"] == "mean"]
    assert [row["test/accuracy"] for row in rows] == [pytest.approx(y / 100) for _, y in found]
    assert len(picture.rows) == 11 + 4


def test_gaps_are_in_the_study_s_order_and_lost_runs_counted(study):
    said = study.comparison
    picture = drawn(figures.gap(study, said))
    expected = [100 * (mean_accuracy(0) - mean_accuracy(number)) for number in (1, 2)]
    expected.append(100 * (mean_accuracy(0, range(2)) - mean_accuracy(3, range(2))))
    assert means(picture.figure) == [(pytest.approx(gap), row) for row, gap in enumerate(expected)]
    (axes,) = picture.figure.axes
    filled = [line.get_markerfacecolor() == plotting.ACCENT for line in axes.lines if line.get_marker() == "D"]
    assert filled == [(said.gaps[arm].holm or 1) < 0.05 for arm in [*ARMS][1:]]
    assert {*filled} == {True, False}
    assert [label.get_text() for label in axes.get_yticklabels()] == [*ARMS][1:]
    assert [text.get_text() for text in axes.texts] == ["1 diverged"]
    bottom, top = axes.get_ylim()
    assert bottom > 2 > 0 > top  # the first arm is on top
    for row, number in zip([row for row in picture.rows if row["kind"] == "mean"], expected, strict=True):
        assert row["gap"] == pytest.approx(number / 100)
        if said.gaps[row["arm"]].p is None:  # equal differences have no interval
            assert row["ci_low"] is None
        else:
            assert row["ci_low"] <= row["gap"] <= row["ci_high"]
    assert f"lb64 {expected[0]:+.2f}" in picture.alt_text


def test_of_many_arms_the_extremes_are_named_and_the_others_under_the_pointer(tmp_path):
    found = read_study(write_study(tmp_path, {"sb8": {}} | {f"lb{n}": {"batch__global_size": 64} for n in range(7)}, 2))
    picture = drawn(figures.test_values(found, NOTHING))
    (axes,) = picture.figure.axes
    assert {text.get_text() for text in axes.texts} == {"sb8", "lb0", "lb5", "lb6"}
    lines = [line for line in axes.lines if line.get_marker() == "D"]
    assert len({line.get_color() for line in lines}) == 2
    x = [x for x, _ in means(picture.figure)][1:]
    assert x == sorted({*x})
    assert 45 < x[0] < 64 < x[-1] < 90
    with matplotlib.rc_context(plotting.STYLE):
        inline, _ = plotting.save(picture, tmp_path, "x", pdf=False)
    assert f"<title>lb3, batch 64: {100 * mean_accuracy(4, range(2)):.4g} [" in inline


def test_each_role_has_a_marker(tmp_path):
    penalty = {"batch__global_size": 64, "algorithm__rank_penalty": 0.01}
    arms = {"sb8": {}, "lb": {"batch__global_size": 64}, "raise": penalty}
    arms["lower"] = penalty | {"algorithm__rank_penalty": -0.01}
    arms["trace"] = penalty | {"algorithm__rank_measure": "trace"}
    arms["placebo"] = penalty | {"algorithm__rank_measure": "placebo", "algorithm__placebo_of": "logdet"}
    picture = drawn(figures.test_values(read_study(write_study(tmp_path, arms, 2)), NOTHING))
    entries = picture.figure.legends[0].get_lines()
    assert [line.get_marker() for line in entries] == ["D", "D", "^", "v", "s", "o"]
    assert [line.get_markerfacecolor() == plotting.PAPER for line in entries] == [False] * 5 + [True]
    assert "Triangles up raise the rank, triangles down lower the rank, squares" in picture.caption


def test_names_lie_over_no_point_and_no_other_name():
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    points = [(*rng.uniform(0.4, 0.6, 2).tolist(), f"lb-trace-{n}", "black") for n in range(14)]
    axes.plot([x for x, *_ in points], [y for _, y, *_ in points], "o")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    plotting.label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [text.get_tightbbox() if text.arrow_patch is None else Text.get_window_extent(text) for text in axes.texts]
    at = axes.transData.transform([point[:2] for point in points])
    assert not any(box.contains(*each) for box in boxes for each in at)
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert any(text.arrow_patch for text in axes.texts)


def test_equal_differences_have_a_stroke_for_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "accuracy", lambda number, seed: 0.9 - 0.02 * number)
    found = read_study(write_study(tmp_path, {"sb8": {}, "lb64": {"batch__global_size": 64}}, 3))
    picture = drawn(figures.gap(found, found.comparison))
    assert [line.get_xdata()[0] for line in picture.figure.axes[0].lines if line.get_marker() == "|"] == [
        pytest.approx(2)
    ]
    assert "A stroke across the diamond: all pairs have the same difference." in picture.caption


def test_intervals_end_where_values_do_and_the_band_is_the_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "accuracy", lambda number, seed: 1.0 - 0.02 * seed)
    found = read_study(write_study(tmp_path, {"sb8": {}}, 3))
    picture = drawn(figures.test_values(found, NOTHING))
    (row,) = [row for row in picture.rows if row["kind"] == "mean"]
    assert row["ci_high"] == 1.0
    assert row["ci_low"] < 0.95
    (band,) = picture.figure.axes[0].patches
    assert band.get_extents().transformed(picture.figure.axes[0].transData.inverted()).bounds[1::2] == (
        pytest.approx(97.0), pytest.approx(1.0),
    )  # fmt: skip
    assert "tolerance: 1.00 points" in [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_near_rank_loss_is_against_the_untrained_network(study):
    assert [change for _, change in means(drawn(figures.near_rank_by_batch(study, NOTHING)).figure)] == [
        pytest.approx(number / 8) for number in range(4)
    ]


@pytest.mark.parametrize("kind", ["study", "run"])
def test_panels_have_titles_of_their_own_and_no_text_is_cut(study, kind):
    shown = study if kind == "study" else read_study(study.runs[0].folder)
    for name, (_, draw) in (STUDY_FIGURES if kind == "study" else RUN_FIGURES).items():
        with matplotlib.rc_context(plotting.STYLE):
            if (picture := draw(shown, study.comparison)) is None:
                continue
            figure = picture.figure
            FigureCanvasAgg(figure).draw()
            titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
            assert len(titles) == len({*titles}), name
            assert picture.caption.endswith("."), name
            assert all(not axes.get_legend() for axes in figure.axes), name  # it would hide what is drawn
            edge = figure.bbox.padded(2)
            ticks = figure.findobj(Tick)
            of_ticks = {label for tick in ticks for label in (tick.label1, tick.label2)}  # also out of sight
            for text in figure.findobj(Text):
                if text.get_visible() and text.get_text() and text not in of_ticks:
                    box = text.get_window_extent()
                    assert edge.count_contains([box.min, box.max]) == 2, (name, text.get_text())


@pytest.mark.parametrize(("low", "high"), [(1.2, 1.9), (3.0, 8.0), (0.04, 0.3), (700.0, 2600.0), (1.0, 5000.0)])
def test_logarithmic_axes_have_numbers(low, high):
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plotting.plain_tick_labels(axes.yaxis)
    plotting.number_short_axis(axes.yaxis)
    FigureCanvasAgg(figure).draw()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    shown = [tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    assert len(shown) >= 2, shown


def test_near_rank_change_is_trained_minus_untrained(study):
    picture = drawn(probe_figures.near_rank_change(study))
    assert [(row["arm"], row["layer"], row["change"]) for row in picture.rows] == [
        (arm, layer, number / 8) for number, arm in enumerate(ARMS) for layer in ("fc1", "fc2")
    ]
    (axes,) = picture.figure.axes
    assert [text.get_text() for text in axes.texts] == ["0", "0", "+12.5", "+12.5", "+25.0", "+25.0", "+37.5", "+37.5"]
    strength = [patch.get_alpha() for patch in axes.patches]
    assert strength == sorted(strength)
    assert strength[0] == 0  # no change, no colour
    assert strength[-1] <= 0.6  # or its number could not be read


def test_ridges_peak_where_the_singular_values_are(study):
    picture = drawn(probe_figures.spectra_over_steps(study))
    axes = picture.figure.axes[-1]  # fc2 of lb256: 4 of 8 values at 0.001
    last = [line for line in axes.lines if len(line.get_xdata()) > 10][-1]
    x, height = np.asarray(last.get_xdata()), 3 - np.asarray(last.get_ydata())
    assert x[height.argmax()] == pytest.approx(-3, abs=0.05)
    assert height.max() == pytest.approx(1.9)
    values = [row["singular_value"] for row in picture.rows if row["arm"] == "lb256" and row["step"] == 20]
    assert values.count(0.001) == 8  # 4 of each of two layers


def test_the_curve_to_the_target_is_the_fitted_one(study):
    reached = {"sb8": {0: 300, 1: 310}, "lb64": {0: 90}, "lb256": {0: 40}}
    target = Target("80.0% validation accuracy", reached, {"lb256": 1}, 25.0, 1049.7, (600.0, 1200.0), 51.0)
    picture = drawn(figures.updates_to_target(study, NOTHING._replace(target=target)))
    fit = [row for row in picture.rows if row["kind"] == "fit"]
    assert all(row["updates_to_target"] == pytest.approx(25 * (1 + 1049.7 / row["global_size"])) for row in fit)
    axes = picture.figure.axes[0]
    labels = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert "critical batch 1,050, outside the figure" in labels
    assert "noise scale 51" in labels
    dashed = next(line for line in axes.lines if line.get_label() == "perfect scaling")
    assert np.asarray(dashed.get_xdata()) * np.asarray(dashed.get_ydata()) == pytest.approx(8 * 305)
    assert [text.get_text() for text in axes.texts] == ["1 missed"]
    assert {(row["arm"], row["runs"]) for row in picture.rows if row["kind"] == "missed"} == {("lb256", 1)}
    assert figures.updates_to_target(study, NOTHING) is None


def correlation(measure: str, r: float, without: tuple[float, float] | None, num_arms: int = 8) -> Correlation:
    interval = (r - 0.1, r + 0.1) if num_arms > 6 else None
    return Correlation(measure, r, interval, without, 0.3, (-0.4, 0.8), 0.01, 0.02, 11, num_arms)


def test_explanations_stand_strongest_first_and_none_hangs_on_one_arm(study):
    weak, strong = correlation("nc1", 0.2, (0.15, 0.3)), correlation("near_rank_loss/fc2/rel_1e-2", -0.9, (-0.95, -0.8))
    one_arm = correlation("noise_scale", 1.0, None)
    said = NOTHING._replace(correlations=[one_arm, weak, strong])
    picture = drawn(figures.explanations(study, said))
    assert [row["measure"] for row in picture.rows] == [strong.measure, weak.measure, one_arm.measure]
    assert [line.get_xdata()[0] for line in picture.figure.axes[0].lines if line.get_marker() == "o"] == [-0.9, 0.2, 0]
    assert "noise_scale" not in picture.alt_text
    assert "single arm" in picture.caption
    scatter = drawn(figures.gap_against_explanations(study, said))
    mine = [row for row in scatter.rows if row["measure"] == strong.measure]
    assert {row["arm"]: row["value"] for row in mine} == {arm: (1 + n) / 8 for n, arm in enumerate(ARMS)}
    base = {row["seed"]: row["gap"] for row in mine if row["arm"] == "sb8"}
    assert base == {0: 0.0, 1: 0.0, 2: 0.0}
    few = NOTHING._replace(correlations=[correlation(strong.measure, 1.0, (1.0, 1.0), 4)])
    assert figures.explanations(study, few) is None
    assert "no correlation is computed of 4 arms" in drawn(figures.gap_against_explanations(study, few)).caption


def test_files_are_the_same_each_time_and_csv_holds_the_rows(study, tmp_path):
    texts = []
    for again in range(2):
        with matplotlib.rc_context(plotting.STYLE):
            picture = drawn(figures.gap(study, study.comparison))
            folder = tmp_path / str(again)
            folder.mkdir()
            inline, table = plotting.save(picture, folder, "gap", pdf=True)
        texts.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert texts[0] == texts[1]
    assert sorted(path.name for path in folder.iterdir()) == ["gap.csv", "gap.pdf", "gap.svg"]
    read = list(csv.DictReader(table.splitlines()))
    assert len(read) == len(picture.rows)
    for row, cells in zip(picture.rows, read, strict=True):
        value = row.get("gap", math.nan)
        assert float(cells["gap"] or "nan") == pytest.approx(value, rel=1e-5, nan_ok=True)
    assert "<text" in inline  # text stays text
    assert "points of test accuracy lost" in inline
    assert not {light for light, _ in plotting.THEME.values() if light in inline}  # every colour follows the theme
    assert "var(--c0)" in inline
    assert (tmp_path / "0" / "gap.svg").read_text().count(plotting.ACCENT) > 2  # the file for a paper has colours


def test_ids_of_two_pictures_do_not_collide():
    parts = '<defs><path id="m1" d="M 1.23456 2"/></defs><g id="unused"/><use xlink:href="#m1"/>'
    svg = f'<svg viewBox="0 0 72 36">{parts}</svg>'
    one, two = (plotting.inline(svg, name, 'a "b" <c>') for name in ("one", "two"))
    assert 'id="one-m1"' in one
    assert '"#one-m1"' in one
    assert 'id="two-m1"' in two
    assert "unused" not in one
    assert 'd="M 1.23 2"' in one
    assert 'aria-label="a &quot;b&quot; &lt;c>"' in one
    assert "--width: 96px" in one
