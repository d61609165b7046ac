"""One writer per folder: starts at the same moment, owners that died, are elsewhere, or were suspended."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gengap_dist.distributed.preemption import Preempted, catching_signals, ending_on_signals
from gengap_dist.errors import UsageError
from gengap_dist.runs import lease
from gengap_dist.runs.run_folder import RunRecorder, close_abandoned, prepare_folder
from tests.conftest import FULL

NUM_ROUNDS = 200 if FULL else 5
ROUNDS = """
import fcntl, os, random, sys, time
from pathlib import Path
from gengap_dist.errors import UsageError
from gengap_dist.runs import lease

def no_locks(*args):
    raise OSError(37, "No locks available")

if sys.argv[3] == "no flock":
    fcntl.flock = fcntl.lockf = fcntl.fcntl = no_locks

def start(out, seconds):
    time.sleep(seconds)
    try:
        with lease.holding(out, print):
            if (out / "run.json").exists():
                return "was there"
            time.sleep(0.12)  # it trains
            with (out / "metrics.jsonl").open("a") as file:
                file.write("line\\n")
            (out / "run.json").touch()
            return "trained"
    except UsageError as error:
        return str(error)

def in_process(function, *args):
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, function(*args).encode())
        os._exit(0)
    os.close(write)
    return pid, os.fdopen(read)

def die(out):
    with lease.holding(out, print):
        os.kill(os.getpid(), 9)

refused = 0
for number in range(int(sys.argv[1])):
    out = Path(sys.argv[2]) / str(number)
    if number % 2:  # one before them was killed: both may take over
        in_process(die, out)[1].read()
        os.wait()
        assert [path.name for path in out.iterdir()] == [".lease.1"]
    started = [in_process(start, out, random.random() * 0.05) for _ in range(2)]
    said = {pid: file.read() for pid, file in started}
    for _ in started:
        os.wait()
    (winner,) = [pid for pid, text in said.items() if text.endswith("trained")]
    (other,) = [text for pid, text in said.items() if pid != winner]
    assert other == "was there" or f"is being written by process {winner} on " in other, said  # on a slow machine
    refused += other != "was there"
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "run.json"]
    assert (out / "metrics.jsonl").read_text() == "line\\n"
assert refused
"""


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize("locks", ["flock", "no flock"])
def test_of_two_starts_within_50_ms_exactly_one_writes_and_the_other_says_who(locks):
    with tempfile.TemporaryDirectory() as folder:  # on a disk
        subprocess.run([sys.executable, "-c", ROUNDS, str(NUM_ROUNDS), folder, locks], check=True, timeout=200)


def left_by(out: Path, owner: lease.Owner) -> Path:
    out.mkdir(exist_ok=True)
    path = out / ".lease.3"
    path.write_text(f"{json.dumps(owner)}\n7\n")
    return path


def test_a_dead_owner_is_replaced_at_once_and_that_is_said(tmp_path):
    said: list[str] = []
    left_by(tmp_path, lease.this_process()._replace(started="1"))  # another process had this number
    with lease.holding(tmp_path, said.append):
        assert [path.name for path in tmp_path.iterdir()] == [".lease.4"]
    assert len(said) == 1
    assert f"process {os.getpid()} on " in said[0]
    assert "ended without a word: this process takes over" in said[0]
    assert not tmp_path.exists()  # nothing was written


def test_an_owner_on_another_machine_is_alive_while_it_counts(tmp_path, monkeypatch):
    far = lease.this_process()._replace(host="n7", machine="another", pid=12)
    path, over = left_by(tmp_path, far), threading.Event()

    def count():
        while not over.wait(0.2):
            path.write_text(f"{json.dumps(far)}\n{time.monotonic()}\n")

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(UsageError, match="is being written by process 12 on n7: wait until it has ended"):
            lease.holding(tmp_path, quiet).__enter__()
    finally:
        over.set()
        thread.join()
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.4)
    began, said = time.monotonic(), list[str]()
    with lease.holding(tmp_path, said.append):
        assert 0.4 < time.monotonic() - began < 5
    assert "process 12 on n7 may still write to" in said[0]
    assert "process 12 on n7, which was writing to" in said[1]


def test_a_suspended_owner_that_lost_its_lease_writes_no_more_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "COUNT_SECONDS", 0.05)

    def lose_it():
        with ending_on_signals(), catching_signals() as asked_to_stop, lease.holding(tmp_path, quiet):
            recorder = RunRecorder(tmp_path)
            recorder.log(1, 0.1, {"train/loss": 1.0})
            recorder.flush()
            left_by(tmp_path, lease.this_process()._replace(host="n8", pid=13))
            (tmp_path / ".lease.1").unlink()
            recorder.log(2, 0.2, {"train/loss": 1.0})
            with pytest.raises(
                UsageError, match=r"not belong to this run any more \(process 13 on n8 writes there now"
            ):
                recorder.flush()
            deadline = time.monotonic() + 10
            while not asked_to_stop() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert asked_to_stop()
            close_abandoned(tmp_path, RuntimeError())
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lease.3", "metrics.jsonl", "spectra"]
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1

    with pytest.raises(Preempted):  # the signal is passed on
        lose_it()


def test_a_study_and_a_single_run_in_it_exclude_each_other(tmp_path):
    run = tmp_path / "runs" / "b64" / "0"
    run.mkdir(parents=True)
    (tmp_path / "study.json").touch()
    RunRecorder(run)
    for first, second in ((tmp_path, run), (run, tmp_path)):
        with lease.holding(first, quiet):
            with pytest.raises(UsageError, match=f"--out \\({first}\\) is being written by process {os.getpid()} on "):
                lease.holding(second, quiet).__enter__()
            RunRecorder(run).flush()
    left_by(run, lease.this_process()._replace(started="1"))  # a single run that was killed
    with lease.holding(tmp_path, quiet):
        assert [path.name for path in run.iterdir()] == ["spectra"]


def test_the_owner_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "COUNT_SECONDS", 0.01)
    with lease.holding(tmp_path, quiet):
        path, deadline = tmp_path / ".lease.1", time.monotonic() + 10
        while int(path.read_text().splitlines()[1]) < 11 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert int(path.read_text().splitlines()[1]) > 10
        assert path.read_text().count("\n") == 2


def test_a_death_before_the_first_line_leaves_a_folder_that_can_be_started(tmp_path):
    out = tmp_path / "run"
    left_by(out, lease.this_process()._replace(started="1"))
    RunRecorder(out)
    for name in ("mlflow.log", "config.yaml", ".run.json.7.part", ".shared.7"):
        (out / name).touch()
    (out / "checkpoints").mkdir()
    (out / "ray" / ("0a" * 16)).mkdir(parents=True)
    prepare_folder(out, "run.json", resume=False)
    (out / "checkpoints" / "step_00000001").mkdir()
    with pytest.raises(UsageError, match="holds other files"):
        prepare_folder(out, "run.json", resume=False)
    (out / "checkpoints" / "step_00000001").rmdir()
    with lease.holding(out, quiet):
        close_abandoned(out, RuntimeError())
        assert (out / "config.yaml").exists()  # which may be a user's own, so the folder stays, and can be started
        prepare_folder(out, "run.json", resume=False)
        (out / "config.yaml").unlink()
        close_abandoned(out, RuntimeError())
        assert [path.name for path in out.iterdir()] == [".lease.4"]
    assert not out.exists()
    out.mkdir()
    (out / "config.yaml").touch()  # a user's own
    with pytest.raises(UsageError, match="holds other files"):
        prepare_folder(out, "run.json", resume=False)
    close_abandoned(out, RuntimeError())
    assert (out / "config.yaml").exists()


def test_a_lease_that_was_made_meanwhile_counts(tmp_path, monkeypatch):
    (tmp_path / ".lease.5").write_text(f"{json.dumps(lease.this_process()._replace(started='0'))}\n0\n")  # it has ended
    wait = lease._wait_until_left

    def other_starts(path, say):
        wait(path, say)
        if path.name == ".lease.5":  # its owner has removed it, and another process found none
            (tmp_path / ".lease.5").unlink()
            (tmp_path / ".lease.1").write_text(f"{json.dumps(lease.this_process())}\n0\n")

    monkeypatch.setattr(lease, "_wait_until_left", other_starts)
    with pytest.raises(UsageError, match="is being written by process"), lease.holding(tmp_path, lambda text: None):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lease.1"]


def test_a_pipe_in_the_place_of_a_lease_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / ".lease.1")
    assert lease._content(tmp_path / ".lease.1") == b""
    assert not lease.is_of_another(tmp_path)
