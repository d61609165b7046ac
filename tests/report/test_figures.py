"""Where the figures put arms: on the axis of batches, or in rows where too many share a batch."""

import json

import numpy as np
from matplotlib.figure import Figure

from gengap_dist.report import figures
from gengap_dist.report.collect import StudyData, read_run


def study(tmp_path, sizes: dict[str, int]) -> StudyData:
    """Two runs of each arm, of accuracies 0.5 and 0.7 in the first arm and 0.1 more in each that follows."""
    runs = []
    for number, (arm, size) in enumerate(sizes.items()):
        for seed, value in enumerate((0.5, 0.7)):
            folder = tmp_path / arm / str(seed)
            folder.mkdir(parents=True)
            info = {"status": "finished", "seed": seed, "config": {"batch": {"global_size": size}}}
            (folder / "run.json").write_text(json.dumps(info | {"result": {"test/accuracy": value + number / 10}}))
            line = {"step": 0, "probe_seconds/near_rank_loss": 1.0, "near_rank_loss/fc/rel_1e-2": value}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            runs.append(read_run(folder, arm))
    return StudyData(tmp_path, "s", "", next(iter(sizes)), list(sizes), runs, {})


def means(figure: Figure | None) -> list[tuple[float, float]]:
    """Where the diamonds are."""
    assert figure is not None
    lines = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "D"]
    return [tuple(np.round([line.get_xdata()[0], line.get_ydata()[0]], 9)) for line in lines]  # pyright: ignore


def test_arms_of_one_batch_stand_side_by_side(tmp_path):
    found = study(tmp_path, {"sb": 8, "one": 64, "two": 64, "three": 64})
    assert not figures.in_rows(found)
    (first, *others) = means(figures.accuracy(found))
    assert first == (8, 60)
    assert [y for _, y in others] == [70, 80, 90]
    x = [x for x, _ in others]
    assert x == sorted(x)
    assert x[1] == 64
    figure = figures.accuracy(found)
    low, high = figure.axes[0].get_xlim()
    assert low < 8 < max(x) < high


def test_more_than_three_arms_of_one_batch_have_rows(tmp_path, monkeypatch):
    found = study(tmp_path, {"sb": 8, **{f"lb{number}": 64 for number in range(4)}})
    assert figures.in_rows(found)
    figure = figures.accuracy(found)
    assert means(figure) == [(60, 0), (70, 1), (80, 2), (90, 3), (100, 4)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == found.arms
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > 4 > 0 > top  # the first arm is on top
    monkeypatch.setattr(StudyData, "layer_keys", lambda self: ["fc"])
    figure = figures.by_layer(found, "near_rank_loss", "rel_1e-2", "share")
    assert means(figure) == [(0.6, row) for row in range(5)]


def test_arms_that_share_a_colour_differ_in_their_lines(tmp_path):
    found = study(tmp_path, {f"lb{number}": 64 for number in range(20)})
    looks = {(figures.colour(found, arm), figures.line_style(found, arm)) for arm in found.arms}
    assert len(looks) == 20
