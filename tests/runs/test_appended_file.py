"""Files to which lines are appended by processes that end anywhere, on disks that fill up."""

import resource

import pytest

from gengap_dist.runs.appended_file import BLOCK_BYTES, append_lines
from gengap_dist.runs.json_lines import SYSTEM, read_lines
from gengap_dist.runs.run_folder import RunRecorder, read_metrics
from gengap_dist.runs.system_metrics import sampling

HALF_LINES = ["", '{"a": 1', "x" * BLOCK_BYTES, "x" * (3 * BLOCK_BYTES - 1)]


@pytest.mark.parametrize("half", HALF_LINES)
@pytest.mark.parametrize("whole", ["", '{"a": 0}\n', "y" * 2 * BLOCK_BYTES + "\n"])
def test_the_next_append_removes_half_a_line(tmp_path, whole, half):
    path = tmp_path / "file"
    path.write_text(whole + half)
    append_lines(path, "1\n2\n")
    append_lines(path, "3\n")
    assert path.read_text() == whole + "1\n2\n3\n"


def test_a_full_disk_gets_whole_lines_or_nothing(tmp_path):
    path = tmp_path / "file"
    append_lines(path, "1\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"space|too large"):
            append_lines(path, "2345\n6789\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "1\n"


def test_samples_and_metrics_follow_half_a_line(tmp_path):
    for name in ("system.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text('{"time": 1, "step": 1}\n{"time": 2, "st')
    with sampling(tmp_path, 60.0, num_nodes=1):
        pass
    first, *others = read_lines(tmp_path / "system.jsonl", SYSTEM)
    assert first["time"] == 1
    assert len(others) == 1
    recorder = RunRecorder(tmp_path)
    recorder.log(2, 0.0, {"x": 1.0})
    recorder.flush()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
