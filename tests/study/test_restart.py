"""A study that was killed, whose folder was damaged, or whose folder holds something else."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest

from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs import lease
from gengap_dist.runs.run_folder import TEST_CORRECT
from gengap_dist.study import runner
from tests import slow_model
from tests.ranks import start_module
from tests.ray_cluster import until
from tests.study import tiny

pytestmark = pytest.mark.processes

STUDY = {"question": "How much?", "seeds": [0, 1, 2], "axes": {"batch.global_size": [64, 256, 1000]}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of 3 arms x 3 seeds that nobody disturbed: config, folder."""
    return tiny.finish(tmp_path_factory.mktemp("whole"), STUDY, model={"name": slow_model.NAME})


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "copy")


def test_a_killed_study_goes_on_and_ends_as_if_nothing_had_happened(whole, tmp_path):
    config, undisturbed = whole
    out = tmp_path / "out"
    env = tiny.environment(**slow_model.slow_after(out, f"runs/*/*/{TEST_CORRECT}"))  # as soon as a run is at its end
    process = subprocess.Popen(tiny.command(config, out), cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    until(lambda: tiny.ended(out))
    process.kill()
    process.wait()
    time.sleep(0.5)  # until its ranks have found out; the run they are at may come to its end
    before = tiny.ended(out)
    num_before = len({path for path in before if path.name == "run.json"})
    assert 0 < num_before < 9
    done = tiny.start(config, out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already there") == num_before
    assert before.items() <= tiny.ended(out).items()
    assert tiny.scores(out) == tiny.scores(undisturbed)
    assert tiny.table(out) == tiny.table(undisturbed)
    assert len(tiny.table(out)) == 3


def test_damaged_runs_are_set_aside_and_run_again(whole, copy):
    runs = copy / "runs"
    (runs / "b64/seed0/run.json").write_text((runs / "b64/seed0/run.json").read_text()[:100])
    (runs / "b64/seed1/run.json").write_text("")
    (runs / "b256/seed0/run.json").unlink()
    lines = (runs / "b256/seed1/metrics.jsonl").read_text()
    (runs / "b256/seed1/metrics.jsonl").write_text(lines[:-40])
    (runs / "b1000/seed2/run.json").write_text("[]")
    shutil.rmtree(runs / "b1000/seed1")
    (runs / "b1000/seed1/spectra").mkdir(parents=True)  # what a kill before run.json leaves
    (copy / "study.json").write_text('{"name": "ti')
    kept = tiny.ended(runs / "b64/seed2"), tiny.ended(runs / "b256/seed2")
    done = tiny.start(whole[0], copy)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"warning: .*runs/(\w+/\w+) is damaged \((.*)\): moved to (\S+); it is run again", done.stderr)
    assert {run: why for run, why, _ in said} == {
        "b64/seed0": "its run.json is not valid",
        "b64/seed1": "its run.json is not valid",
        "b256/seed0": "it holds files and no run.json",
        "b256/seed1": "its metrics.jsonl does not end with step 12, the last",
        "b1000/seed2": "its run.json is not valid",
        "b1000/seed1": "it holds files and no run.json",
    }
    assert (copy / "damaged/b256-seed1-1/metrics.jsonl").read_text() == lines[:-40]
    assert "study.json is damaged: it is written again" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tiny.ended(runs / "b64/seed2"), tiny.ended(runs / "b256/seed2")) == kept
    assert tiny.scores(copy) == tiny.scores(whole[1])
    assert tiny.table(copy) == tiny.table(whole[1])


def prepare(config, out) -> list[str]:
    warnings: list[str] = []
    runner.prepare(config, out, warnings.append)
    return warnings


def study(whole, **changes) -> StudyConfig:
    return resolve(StudyConfig, [whole[0]], {"study": changes})


def test_what_another_study_left_is_told_or_refused(whole, copy):
    assert prepare(study(whole), copy) == []
    (orphan,) = prepare(study(whole, axes={"batch.global_size": [64, 1000]}), copy)
    assert "runs/b256 belongs to no arm of this study" in orphan
    (question,) = prepare(study(whole, question="Why?"), copy)
    assert "study.question has changed since" in question
    assert "(How much?)" in question
    with pytest.raises(UsageError, match="contains the study tiny, not other: choose another folder"):
        prepare(study(whole, name="other"), copy)


def test_two_starts_at_once_are_refused(whole, copy):
    with lease.holding(copy, print):
        done = tiny.start(whole[0], copy)
        words = ["--resume", "--model.name", slow_model.NAME, "--out", next(copy.glob("runs/b64/*"))]
        resumed = start_module("gengap_dist", "train", *words, cwd=copy, env=tiny.environment())
    for one in (done, resumed):
        assert one.returncode == 2
        assert f"--out ({copy}) is being written by process {os.getpid()} on " in one.stderr


@pytest.mark.full  # else: analysis/report/test_html.py, from folders
def test_a_baseline_without_a_result_leaves_a_study_without_gaps(tmp_path):
    wild = {"name": "wild", "set": {"optim.lr": 1e9}}
    tiny.finish(tmp_path, {"seeds": [0, 1], "arms": [wild, {"name": "tame"}]})
    assert [row[:1] + row[3:5] + row[8:9] for row in tiny.table(tmp_path / "out")] == [
        ["wild", "0 + 2 diverged", "-", "baseline"],
        ["tame", "2", tiny.table(tmp_path / "out")[1][4], "-"],
    ]
    assert json.loads((tmp_path / "out/study.json").read_text())["status"] == "finished"
