"""Commands that are started twice, told to end in their first second, or that nobody listens to."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gengap_dist.cli import exit_codes, terminal, train
from gengap_dist.cli.exit_codes import continues_with, run_command
from gengap_dist.distributed.preemption import Preempted, catching_signals, ending_on_signals
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_metrics
from tests.ray_cluster import until

SHORT = ["--train.steps", "3", "--probe.num_samples", "32", "--mlflow.enabled", "false"]


def test_of_two_trainings_at_once_one_trains_and_the_other_says_who_does(tmp_path, gengap):
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(gengap, "train", *SHORT, "--out", "run") for _ in range(2)]
    refused, trained = sorted((each.result() for each in both), key=lambda done: -done.returncode)
    assert trained.returncode == 0, trained.stderr
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith(f"gengap train: --out ({tmp_path / 'run'}) is being written by process ")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert not list((tmp_path / "run").glob(".lease.*"))


def test_default_folders_are_never_shared(tmp_path):
    made = [train._new_folder(tmp_path / "runs", "digits") for _ in range(3)]
    assert [folder.name for folder in made] == ["digits", "digits-2", "digits-3"]
    assert all(folder.is_dir() for folder in made)


def test_a_folder_that_cannot_be_made_is_no_folder_that_is_there(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    assert train._new_folder(tmp_path / "runs", "digits") == tmp_path / "runs" / "digits"


def test_resume_needs_a_folder_and_names_the_last_run_that_fits(tmp_path, capsys):
    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            run_command("gengap train", train.command, ["--resume", *words])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert said() == "gengap train: --resume needs the folder of the run: give --out FOLDER\n"
    assert not [*tmp_path.iterdir()]
    for age, name in enumerate(
        ["b64-s0-20260102", "b64-s0-20260101-2", "b64-s01-20260103", "b128-s0-20260103", "none"]
    ):
        (folder := tmp_path / "runs" / f"digits-lenet5-{name}").mkdir(parents=True)
        if name != "none":
            (folder / "run.json").write_text("{}")
            os.utime(folder / "run.json", (0, -age))
    assert said() == (
        "gengap train: --resume needs the folder of the run: give --out runs/digits-lenet5-b64-s0-20260102\n"
    )
    assert "give --out runs/digits-lenet5-b128-s0-20260103\n" in said("--batch.global_size", "128")
    assert len([*(tmp_path / "runs").iterdir()]) == 5


def test_a_command_that_is_interrupted_says_how_it_continues_or_nothing(capsys):
    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt

    def preempted(argv: object) -> int:
        with continues_with("--resume --out runs/a"), ending_on_signals():
            signal.raise_signal(signal.SIGTERM)
        return 0

    def ended(argv: object) -> int:
        with continues_with("the same command"):
            return interrupted(argv)

    assert exit_codes._outcome("gengap report", interrupted, []) == exit_codes.INTERRUPTED
    assert exit_codes._outcome("gengap train", preempted, []) == exit_codes.PREEMPTED
    assert exit_codes._outcome("gengap study", ended, []) == exit_codes.INTERRUPTED
    assert capsys.readouterr().err.splitlines() == [
        "gengap report: interrupted",
        "gengap train: preempted before or after training. Continue with --resume --out runs/a.",
        "gengap study: interrupted. Continue with the same command.",
    ]


def test_a_signal_that_came_too_late_is_passed_on():
    def finish():
        with ending_on_signals(), catching_signals() as flag:
            signal.raise_signal(signal.SIGTERM)
            assert flag()

    with pytest.raises(Preempted):
        finish()


def test_a_command_that_ends_with_an_error_is_left_to_clean_up():
    def fail():
        with ending_on_signals():
            try:
                raise UsageError("a bad setting")
            finally:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(UsageError) as raised:
        fail()
    assert raised.value.was_told_to_end


def test_what_a_signal_interrupts_may_fail_in_its_own_way():
    """A package that is being imported tries another way after any exception, and fails for that."""

    def load():
        with ending_on_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                raise RuntimeError("half of it is loaded") from None

    with pytest.raises(Preempted):
        load()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_of_ranks_that_fail_together_the_first_of_a_machine_says_why(local_rank, monkeypatch, capsys):
    """Though the launcher's signal reached the others while they cleaned up, so that they live on."""

    def fail(argv):
        with ending_on_signals():
            try:
                raise UsageError("a bad setting")
            finally:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(exit_codes, "FIRST_RANK_SECONDS", 0.01)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": local_rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    assert exit_codes._outcome("gengap train", fail, []) == exit_codes.USAGE
    assert capsys.readouterr().err == ("gengap train: a bad setting\n" if local_rank == 0 else "")


@pytest.mark.processes
def test_a_result_that_cannot_be_printed_is_a_failure(tmp_path):
    words = "-m gengap_dist plan --print_config > /dev/full"
    end = subprocess.run(f"{sys.executable} {words}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (
        1, "gengap plan: the output could not be written (No space left on device)\n"
    )  # fmt: skip


def test_signals_end_a_command_before_it_trains_but_ignored_ones_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
            with pytest.raises(Preempted, match="Continue with --resume"), ending_on_signals():  # noqa: PT012
                os.kill(os.getpid(), number)
                time.sleep(10)
    finally:
        signal.signal(signal.SIGHUP, before)


def started(out: Path, *words: str, **streams: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gengap_dist", "train", *SHORT, "--out", str(out), *words]
    return subprocess.Popen(command, text=True, **({"stderr": subprocess.PIPE} | streams))  # pyright: ignore


@pytest.mark.full  # else: distributed/test_worker_pool.py, without torch
@pytest.mark.processes
@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_the_first_seconds_is_an_orderly_end(tmp_path, ranks, number):
    for seconds in (0.0, random.Random(number).uniform(0, 4)):
        out = tmp_path / f"{seconds:.3f}"
        words = ["--launch.num_processes", ranks, "--mlflow.enabled", "true", "--checkpoint.every_steps", "1"]
        process = started(out, *words)
        until(out.exists)
        time.sleep(seconds)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (75, 130) or (process.returncode == 0 and seconds), said
        assert "Traceback" not in said
        assert not list(out.glob(".lease.*"))
        again = started(out, *words, "--resume")
        _, said = again.communicate(timeout=100)
        assert again.returncode == 0, said
        assert [line["step"] for line in read_metrics(out)] == [0, 1, 2, 3]


@pytest.mark.full  # else: compat/test_streams.py, without torch
@pytest.mark.processes
@pytest.mark.parametrize(
    ("streams", "ranks"),
    [*itertools.product(["2>&1 | head -c1", "| head -c1", ">&-", "2>&-", ">&- 2>&-"], ["1", "2"])],
)
def test_a_training_that_nobody_listens_to_comes_to_its_end(tmp_path, streams, ranks):
    words = " ".join([*SHORT, "--launch.num_processes", ranks, "--out", "run"])
    line = f"set -o pipefail; {sys.executable} -W always -m gengap_dist train {words} {streams}"
    assert subprocess.run(["bash", "-c", line], timeout=100).returncode == 0
    assert read_info(tmp_path / "run").status == "finished"
    assert (tmp_path / "run" / "report.html").exists()


def test_what_a_resumed_run_says(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "QUIET_SECONDS", -1.0)  # a line for each step
    with terminal.RunProgress("mine", stages=True) as progress:
        progress(0, 0, "continuing after 420 of 840 steps")
        progress(421, 840, "")
        progress(430, 840, "val 91.2%")
        progress(431, 840, "")
    lines = capsys.readouterr().err.splitlines()
    assert "mine: continuing after 420 of 840 steps" in lines
    assert [line for line in lines if "step 4" in line] == [
        "mine: step 421/840",
        "mine: step 430/840 val 91.2%",
        "mine: step 431/840 val 91.2%",
    ]
