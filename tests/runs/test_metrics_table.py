"""Columns against the lines they were made of."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.config.sections import RunConfig
from gengap_dist.runs import metrics_table as module
from gengap_dist.runs.metrics_table import to_table
from gengap_dist.runs.run_folder import RunRecorder, read_metrics_table, read_raw
from gengap_dist.runs.schema import RunStatus

NAMES = st.sampled_from(["train/loss", "val/accuracy", "near_rank_loss/fc2/rel_1e-2", "nc1"])
VALUES = st.floats(allow_nan=False) | st.sampled_from(["nan", "inf", "-inf"]) | st.integers(-(2**53), 2**53)
LINES = st.lists(st.dictionaries(NAMES, VALUES), max_size=12)


@given(LINES, st.integers(1, 5))
def test_every_line_comes_back(lines, batch):
    lines = [{"step": step, **line} for step, line in enumerate(lines)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LINES_PER_BATCH", batch)
        found = to_table(iter(lines))
    assert len(found.values) == len(lines)
    for row, line in enumerate(lines):
        assert found.line(row) == pytest.approx({name: float(v) for name, v in line.items()}, rel=0, abs=0, nan_ok=True)
    for name in {name for line in lines for name in line}:
        steps, values = found.series(name)
        expected = [(line["step"], float(line[name])) for line in lines if name in line]
        assert np.array_equal(np.stack([steps, values], axis=1), expected, equal_nan=True)


def test_at_gives_the_asked_steps_and_names_in_their_order():
    found = to_table([{"step": 3, "a": 1.0, "b": 2.0}, {"step": 5, "b": 4.0}, {"step": 9, "a": 5.0, "b": 6.0}])
    values, known = found.values_at(np.array([5.0, 9.0]), ["b", "a"])
    assert known.tolist() == [[True, False], [True, True]]
    assert values[known].tolist() == [4.0, 6.0, 5.0]
    assert list(found.select_columns(["b", "absent"]).columns) == ["b"]


def test_a_file_is_read_to_the_last_bit_and_to_its_last_whole_line(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64).view(np.float64)
    lines = [{"step": step, "x": value if math.isfinite(value) else str(value)} for step, value in enumerate(values)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5000, "x"')
    _, found = read_metrics_table(tmp_path).series("x")
    assert np.array_equal(found, values, equal_nan=True)


@pytest.mark.parametrize(
    "line", ["[1]", '{"step": 1', '{"a": 1.0}', '{"step": 1, "a": "word"}', '{"step": 1, "a": []}']
)
def test_a_damaged_line_is_no_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, TypeError)):
        read_metrics_table(tmp_path)


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics_table(tmp_path).values.shape == (0, 0)
    assert list(read_raw(tmp_path / "metrics.jsonl")) == []


def long_run(out, num_lines=400):
    book = RunRecorder(out)
    book.start(RunConfig(), {})
    rng = np.random.default_rng(0)
    for step in range(num_lines):
        book.log(step, step / 10, {f"effective_rank/layer{i}": rng.normal() for i in range(100 if step % 2 else 99)})
    book.log(num_lines, 1.0, {"train/loss": float("nan")})
    return book


def test_a_long_run_leaves_columns_that_say_what_its_lines_say(tmp_path):
    long_run(tmp_path).finish(RunStatus.FINISHED, {})
    assert (tmp_path / "metrics.npz").exists()
    found, expected = read_metrics_table(tmp_path), to_table(read_raw(tmp_path / "metrics.jsonl"))
    assert found.columns == expected.columns
    assert np.array_equal(found.known, expected.known)
    assert np.array_equal(found.values, expected.values, equal_nan=True)


@pytest.mark.parametrize("harm", ["lines changed", "columns cut short", "columns are something else"])
def test_lines_count_and_columns_are_only_their_copy(tmp_path, harm):
    long_run(tmp_path).finish(RunStatus.FINISHED, {})
    lines, columns = tmp_path / "metrics.jsonl", tmp_path / "metrics.npz"
    if harm == "lines changed":
        lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:5]))
    else:
        columns.write_bytes(columns.read_bytes()[:1000] if "short" in harm else b"no archive")
    assert len(read_metrics_table(tmp_path).values) == (5 if harm == "lines changed" else 401)


def test_only_a_long_run_that_has_ended_has_columns(tmp_path):
    book = long_run(tmp_path)
    book.finish(RunStatus.FAILED, {})
    assert not (tmp_path / "metrics.npz").exists()
    book.finish(RunStatus.FINISHED, {})
    RunRecorder(tmp_path).resume(3, 1.0, {})
    assert not (tmp_path / "metrics.npz").exists()
    assert len(read_metrics_table(tmp_path).values) == 3
    (tmp_path / "short").mkdir()
    short = long_run(tmp_path / "short", num_lines=2)
    short.finish(RunStatus.FINISHED, {})
    assert not (tmp_path / "short" / "metrics.npz").exists()
