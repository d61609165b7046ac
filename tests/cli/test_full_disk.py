"""A full disk, at whatever file: the command ends with one sentence, and the run continues when there is space."""

import errno
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gengap_dist.analysis.report import html
from gengap_dist.analysis.report.process import ReportProcess
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.terminal import RunProgress
from gengap_dist.cli.train import command as train_command
from gengap_dist.runs.run_folder import read_info, read_metrics, write_atomically
from tests.conftest import Command, thinned, train

STEPS = 3
SETTINGS = {
    "mlflow.enabled": False, "train.steps": STEPS, "probe.num_samples": 32, "checkpoint.every_steps": 1,
    "probe.max_time_fraction": None,
}  # fmt: skip
WORDS = [word for name, value in SETTINGS.items() for word in (f"--{name}", "null" if value is None else str(value))]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`full_disk(words)`: from now on, files cannot be written if a regular expression is found in their path."""
    fsync = os.fsync

    def fill(words: str) -> None:
        def flush(descriptor: int) -> None:
            if words and re.search(words, str(Path(f"/proc/self/fd/{descriptor}").readlink())):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", flush)

    return fill


def steps(out: Path) -> list[int]:
    return [line["step"] for line in read_metrics(out)]


@pytest.mark.parametrize(
    ("file", "status"),
    thinned(
        [
            ("spectra/step_00000001.npz", "failed"),
            ("test_correct.npy", "failed"),
            ("run.json", "running"),
            ("figures/curves.svg", "finished"),
            ("report.html", "finished"),
        ],
        lambda file, status: file in ("spectra/step_00000001.npz", "run.json", "figures/curves.svg"),
    ),
)
def test_one_sentence_and_the_run_continues(tmp_path, monkeypatch, capsys, full_disk, file, status):
    monkeypatch.setattr(ReportProcess, "__enter__", lambda self: self)  # the report is written by this process
    monkeypatch.setattr(html, "RUN_FIGURES", {"curves": html.RUN_FIGURES["curves"]})
    out, started = tmp_path / "run", False

    def show(progress: RunProgress, done: int, total: int, note: str) -> None:
        nonlocal started
        if total and not started:
            started = True
            full_disk(rf"/\.?{file}" if "/" not in file else file.replace("/", r"/\.?"))

    monkeypatch.setattr(RunProgress, "__call__", show)
    with warnings.catch_warnings(record=True, action="always") as said, pytest.raises(SystemExit) as exit_:
        run_command("gengap train", train_command, [*WORDS, "--out", str(out)])
    full_disk("")
    assert exit_.value.code == 2
    (last,) = capsys.readouterr().err.strip().splitlines()
    sentence = f"{out / file} could not be written (No space left on device): free disk space, then continue with --res"
    assert last.startswith(f"gengap train: {sentence}")
    assert read_info(out).status == status
    warned = [
        str(each.message) for each in said if "the run is not running, as it says, but failed" in str(each.message)
    ]
    assert len(warned) == (status == "running")
    if status == "failed":
        assert sentence in (read_info(out).error or "")
    assert not list(out.rglob(".*.part"))
    train(out, resume=True, **{name.replace(".", "__"): value for name, value in SETTINGS.items()})
    assert read_info(out).status == "finished"
    assert steps(out) == [*range(STEPS + 1)]


def test_a_table_of_metrics_that_cannot_be_written_is_left_out(tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr("gengap_dist.runs.run_folder.MIN_TABLE_BYTES", 0)
    full_disk(r"metrics\.npz")
    with pytest.warns(
        UserWarning, match=r"metrics.npz could not be written \(No space left on device\): it is optional"
    ):
        train(tmp_path / "run", train__steps=2, probe__enabled=False)
    assert read_info(tmp_path / "run").status == "finished"
    assert not list((tmp_path / "run").glob(".*"))


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    out, settings = tmp_path / "run", {"train__steps": 2, "probe__num_samples": 32}
    train(out, **settings)
    own = [out / name for name in (".run.json.12.part", "spectra/.step_00000001.npz.12.part", "figures/.a.svg.3.part")]
    others = [out / name for name in (".mlflow.json.12.part", ".mine.part", "notes.12.part", "spectra/.x.part")]
    (out / "figures").mkdir()
    for path in (*own, *others):
        path.write_text("half")
    (out / ".dir.1.part").mkdir()
    train(out, resume=True, **settings)
    assert [path.exists() for path in own] == [False] * 3
    assert [path.exists() for path in (*others, out / ".dir.1.part")] == [True] * 5


def test_a_file_that_cannot_be_replaced_stays(tmp_path, full_disk):
    write_atomically(tmp_path / "a.json", "before")
    full_disk("json")
    with pytest.raises(OSError, match=r"a\.json") as caught:
        write_atomically(tmp_path / "a.json", "after")
    assert (caught.value.filename, caught.value.errno) == (str(tmp_path / "a.json"), errno.ENOSPC)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "before"}


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Callable[[], None]]:
    """A file system of a size; gives a function that makes it large."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.full
@pytest.mark.parametrize("kibibytes", [60, 500, 1500, 2500])
def test_real_disks_of_any_size(tmp_path, gengap: Command, kibibytes):
    with small_disk(tmp_path / "disk", kibibytes) as enlarge:
        out = tmp_path / "disk" / "run"
        done = gengap("train", *WORDS, "--out", out)
        print(done.stderr)
        assert done.returncode in (0, 2), done.stderr
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            assert re.search(r"could not be written.*(No space left on device).*free disk space.*with --resume$", last)
            assert "Traceback" not in done.stderr
        enlarge()
        again = gengap("train", *WORDS, "--out", out, "--resume")
        assert again.returncode == 0, again.stderr
        assert read_info(out).status == "finished"
        assert steps(out) == [*range(STEPS + 1)]
        assert not list(out.rglob(".*.part"))
