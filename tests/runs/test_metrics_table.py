"""Columns against the lines they were made of."""

import io
import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs import metrics_table as module
from gengap_dist.runs.json_lines import read_lines
from gengap_dist.runs.metrics_table import NO_LINES, MetricsTable, dump, load, to_table
from gengap_dist.runs.run_folder import RunRecorder, read_metrics_table
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
    assert found.num_lines == len(lines)
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
    selected = found.select_columns(["b", "absent", "step"])
    assert (list(selected.columns), selected.num_lines) == (["step", "b"], 3)
    assert [values.tolist() for values in selected.series("b")] == [[3.0, 5.0, 9.0], [2.0, 4.0, 6.0]]
    assert len(selected.series("a")[1]) == 0


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
    with pytest.raises(UsageError, match=r"metrics.jsonl is damaged in line 1: "):
        read_metrics_table(tmp_path)


def test_a_run_without_metrics_has_none(tmp_path):
    found = read_metrics_table(tmp_path)
    assert (found.num_lines, found.columns) == (0, {})
    assert [len(values) for values in found.series("a")] == [0, 0]
    assert list(read_lines(tmp_path / "metrics.jsonl")) == []


def check_equal(found: MetricsTable, expected: MetricsTable) -> None:
    assert (found.num_lines, found.columns) == (expected.num_lines, expected.columns)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other, equal_nan=True)


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
    check_equal(read_metrics_table(tmp_path), to_table(read_lines(tmp_path / "metrics.jsonl")))


@pytest.mark.parametrize("harm", ["lines changed", "columns cut short", "columns are something else"])
def test_lines_count_and_columns_are_only_their_copy(tmp_path, harm):
    long_run(tmp_path).finish(RunStatus.FINISHED, {})
    lines, columns = tmp_path / "metrics.jsonl", tmp_path / "metrics.npz"
    if harm == "lines changed":
        lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:5]))
    else:
        columns.write_bytes(columns.read_bytes()[:1000] if "short" in harm else b"no archive")
    assert read_metrics_table(tmp_path).num_lines == (5 if harm == "lines changed" else 401)


def test_only_a_long_run_that_has_ended_has_columns(tmp_path):
    book = long_run(tmp_path)
    book.finish(RunStatus.FAILED, {})
    assert not (tmp_path / "metrics.npz").exists()
    book.finish(RunStatus.FINISHED, {})
    RunRecorder(tmp_path).resume(3, 1.0, {})
    assert not (tmp_path / "metrics.npz").exists()
    assert read_metrics_table(tmp_path).num_lines == 3
    (tmp_path / "short").mkdir()
    short = long_run(tmp_path / "short", num_lines=2)
    short.finish(RunStatus.FINISHED, {})
    assert not (tmp_path / "short" / "metrics.npz").exists()


def dump_dense(lines: list[dict[str, float]], size: int) -> bytes:
    """metrics.npz as earlier versions wrote it: a value for each line and each name."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    values = np.array([[line.get(name, math.nan) for name in names] for line in lines])
    known = np.packbits(np.array([[name in line for name in names] for line in lines]))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, size=size, columns=np.array(json.dumps(names)), values=values, known=known)
    return buffer.getvalue()


def test_the_table_of_a_slim_copy_of_an_earlier_version_is_read(tmp_path):
    lines = [{"step": 0, "a": 1.5}, {"step": 2, "b": math.nan, "a": 3.0}, {"step": 5}, {"step": 7, "b": 2.0, "é": 0.0}]
    path = tmp_path / "metrics.npz"
    path.write_bytes(dump_dense(lines, NO_LINES))
    check_equal(read_metrics_table(tmp_path), to_table(lines))
    path.write_bytes(dump_dense(lines, size=31))  # beside its lines, which are read instead
    assert load(path, size=31) is None
    path.write_bytes(dump(to_table(lines), size=31, compress=True))
    found = load(path, size=31)
    assert found is not None
    check_equal(found, to_table(lines))


def test_many_metrics_that_few_lines_have_take_little_memory(tmp_path):
    """As of a deep network: a dense table of this run would take 60 MB."""
    num_steps, layers = 3000, [f"near_rank_loss/layer{i}.conv/centred/rel_1e-2" for i in range(2500)]
    rng = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(num_steps):
            line = {"step": step, "seconds": step / 7, "train/loss": rng.random()}
            line |= {"val/accuracy": rng.random()} if step % 100 == 0 else {}
            line |= {name: rng.random() for name in layers} if step % 1000 == 0 else {}
            file.write(json.dumps(line) + "\n")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    try:
        data = dump(to_table(read_lines(tmp_path / "metrics.jsonl")), size)
        (tmp_path / "metrics.npz").write_bytes(data)
        table = read_metrics_table(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) < size
    assert peak < 12 * size
    assert len(table.columns) == 4 + len(layers)
    assert len(table.line(1000)) == len(table.columns)
    assert table.series(layers[-1])[0].tolist() == [0, 1000, 2000]
