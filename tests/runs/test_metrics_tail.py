"""Reading metrics.jsonl from where the last reader stopped, while a real record grows and is resumed."""

import pytest

from gengap_dist.runs.metrics_tail import Position, read_after
from gengap_dist.runs.run_folder import RunRecorder


def record(out, steps, *, seconds: float = 0.0) -> None:
    book = RunRecorder(out)
    book.resume(steps[0], seconds, {})
    for step in steps:
        book.log(step, 0.0, {"x": float(step)})
    book.flush()


def read(out, position: Position) -> tuple[list[int], Position]:
    found = list(read_after(out / "metrics.jsonl", position))
    return [line["step"] for line, _ in found], found[-1][1] if found else position


def test_only_new_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read(tmp_path, Position()) == ([], Position())
    record(tmp_path, range(3))
    steps, position = read(tmp_path, Position())
    assert steps == [0, 1, 2]
    assert position.end == path.stat().st_size
    assert read(tmp_path, position) == ([], position)
    path.write_bytes(b"#" * position.start + path.read_bytes()[position.start :])  # what was read is not read again
    with path.open("a") as file:
        file.write('{"step": 3, "x": "nan"}\n{"step": 4, ')
    ((line, after),) = read_after(path, position)
    assert (line["step"], line["x"] != line["x"]) == (3, True)
    assert after == (position.end, position.end + 24, 3)


@pytest.mark.parametrize("rerun", [[2], [2, 3], [2, 3, 4], [2, 3, 4, 5]])
def test_a_resumed_record_is_read_again_where_its_line_has_moved(tmp_path, rerun):
    record(tmp_path, range(5))
    _, position = read(tmp_path, Position())
    record(tmp_path, rerun, seconds=1e6)  # other times, so that lines have other lengths
    steps, _ = read(tmp_path, position)
    assert steps == [0, 1, *rerun]


def test_a_record_that_was_written_again_as_it_was_is_read_on(tmp_path):
    record(tmp_path, range(5))
    first = (tmp_path / "metrics.jsonl").read_bytes()
    _, position = read(tmp_path, Position())
    RunRecorder(tmp_path).resume(3, 0.0, {})
    assert read(tmp_path, position)[0] == [0, 1, 2]
    (tmp_path / "metrics.jsonl").write_bytes(first + b'{"step": 5}\n')
    assert read(tmp_path, position)[0] == [5]
