"""Slim copies: comparisons say the same of them, studies go on from them, and nothing can change unseen."""

import hashlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from gengap_dist.analysis.study_data import read_study
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import describe_damage, is_slim, read_info, read_metrics_table
from gengap_dist.runs.slim import SUMS, check_sums, write_slim_copy
from tests.conftest import ROOT
from tests.study import tiny

STUDY = {
    "question": "Is it the batch?",
    "seeds": [0, 1],
    "looks": [2, 4],
    "tolerance": 3,
    "arms": [
        {"name": "sb", "set": {"batch.global_size": 64}},
        {"name": "lb", "set": {"batch.global_size": 512}},
        {"name": "lb-again", "set": {"batch.global_size": 512, "optim.lr": 0.04}},
    ],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study, `out`, and of its slim copy, `copy`."""
    folder = tmp_path_factory.mktemp("slim")
    _, out = tiny.finish(folder, STUDY)
    assert write_slim_copy(out, folder / "copy") == 6
    return folder


def test_the_copy_says_what_the_study_says(study, gengap, tmp_path):
    whole, copy = read_study(study / "out"), read_study(study / "copy")
    assert tiny.table(study / "copy") == tiny.table(study / "out")
    assert copy.comparison == whole.comparison
    done = gengap("compare", study / "copy", "--out", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    compared = read_study(tmp_path / "compared")
    assert tiny.table(tmp_path / "compared") == tiny.table(study / "out")
    assert [claim.evidence for claim in compared.comparison.claims] == [
        claim.evidence for claim in whole.comparison.claims
    ]
    assert "look 1 of 2" in " ".join(compared.comparison.caveats)  # the looks of the study, not the defaults
    assert compared.question == "Is it the batch?"


def test_all_metrics_and_the_primary_spectra_are_there(study):
    for path in (study / "out").glob("runs/*/seed*"):
        copy = study / "copy" / path.relative_to(study / "out")
        before, after = read_metrics_table(path), read_metrics_table(copy)
        assert (before.num_lines, before.columns) == (after.num_lines, after.columns)
        assert all((one == other).all() for one, other in zip(before[2:], after[2:], strict=True))
        assert (copy / "test_correct.npy").read_bytes() == (path / "test_correct.npy").read_bytes()
        assert len(list((copy / "spectra").glob("*.npz"))) == 2
        assert is_slim(copy)
        assert not is_slim(path)
        assert sum(file.stat().st_size for file in copy.rglob("*") if file.is_file()) < 60_000


def test_no_folder_of_the_machine_is_in_it(study):
    written = [json.loads(path.read_text()) for path in (study / "copy").rglob("*.json")]
    assert len(written) == 7

    def texts(value):
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from texts(each)
        if isinstance(value, str):
            yield value

    said = [text for each in written for text in texts(each)]
    assert not [text for text in said if re.search(r"(^|[\s='\":])~?/\w", text) or str(ROOT) in text]


def test_checksums_are_those_of_sha256sum_and_find_every_change(study, tmp_path, gengap):
    copy = shutil.copytree(study / "copy", tmp_path / "copy")
    subprocess.run(["sha256sum", "--quiet", "--check", SUMS], cwd=copy, check=True)
    assert check_sums(copy) == []
    changed, lost = sorted(copy.glob("runs/*/*/metrics.npz"))[:2]
    changed.write_bytes(changed.read_bytes() + b"x")
    lost.unlink()
    new = changed.parent / "spectra" / "step_00000007.npz"
    shutil.copy(min(new.parent.iterdir()), new)
    (copy / "report.html").write_text("drawn by somebody who looked at it")
    assert check_sums(copy) == sorted(path.relative_to(copy).as_posix() for path in (changed, lost, new))
    for command in (("compare", copy, "--out", tmp_path / "out"), ("report", copy)):
        done = gengap(*command)
        assert done.returncode == 0, done.stderr
        assert "is not what its SHA256SUMS says" in done.stderr
    (copy / SUMS).unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        check_sums(copy)


def test_a_study_goes_on_from_its_copy(study, tmp_path):
    copy = shutil.copytree(study / "copy", tmp_path / "copy")
    more = tiny.write(tmp_path / "more.yaml", STUDY | {"seeds": [0, 1, 2, 3]})
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.glob("runs/*/*/metrics.npz")}
    done = tiny.start(more, copy)
    assert done.returncode == 0, done.stderr
    assert not (copy / "damaged").exists()
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before}
    assert after == before  # no finished run is run again
    found = read_study(copy)
    assert "look 2 of 2" in " ".join(found.comparison.caveats)
    assert [len(found.finished_runs(arm)) for arm in found.arms] == [4, 4, 4]
    assert write_slim_copy(copy, study / "both") == 12
    assert read_study(study / "both").comparison == found.comparison


def test_runs_that_have_not_ended_are_left_out_until_they_have(study, tmp_path):
    whole = shutil.copytree(study / "out", tmp_path / "study")
    path = whole / "runs" / "lb" / "seed0" / "run.json"
    ended = path.read_text()
    path.write_text(json.dumps(json.loads(ended) | {"status": "running"}))
    assert write_slim_copy(whole, tmp_path / "copy") == 5
    assert "nothing is judged" in " ".join(read_study(tmp_path / "copy").comparison.caveats)
    path.write_text(ended)
    assert write_slim_copy(whole, tmp_path / "copy") == 6
    assert check_sums(tmp_path / "copy") == []
    assert read_study(tmp_path / "copy").comparison == read_study(whole).comparison


def test_damage_is_seen(study, tmp_path):
    copy = shutil.copytree(study / "copy", tmp_path / "copy")
    run = next(copy.glob("runs/sb/*"))
    assert describe_damage(run) == ""
    whole = (run / "metrics.npz").read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, *rng.integers(len(whole), size=9)]:  # damage of any byte is damage of one run, and ends nothing
        (run / "metrics.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        found = read_study(copy)
        assert len(found.runs) + len(found.unreadable) == 6
    (run / "metrics.npz").write_bytes(b"")
    assert "metrics.npz does not end with step" in describe_damage(run)
    with pytest.raises(ValueError, match="is damaged"):
        read_metrics_table(run)
    (run / "metrics.npz").unlink()
    assert "its metrics are missing" in " ".join(read_study(copy).unreadable)


def test_a_copy_follows_its_study_and_no_other(study, tmp_path):
    whole = shutil.copytree(study / "out", tmp_path / "study")
    write_slim_copy(whole, tmp_path / "copy")
    (whole / "runs/lb/seed0/test_correct.npy").unlink()
    shutil.rmtree(whole / "runs/lb/seed1")
    info = json.loads((whole / "runs/sb/seed1/run.json").read_text())
    (whole / "runs/sb/seed1/run.json").write_text(json.dumps(info | {"status": "failed"}))  # an end, too
    assert write_slim_copy(whole, tmp_path / "copy") == 5
    assert check_sums(tmp_path / "copy") == []
    assert not (tmp_path / "copy/runs/lb/seed0/test_correct.npy").exists()
    assert not (tmp_path / "copy/runs/lb/seed1").exists()
    assert read_study(tmp_path / "copy").comparison == read_study(whole).comparison
    study_info = json.loads((whole / "study.json").read_text())
    (whole / "study.json").write_text(json.dumps(study_info | {"started": "2000-01-01T00:00:00+00:00"}))
    with pytest.raises(UsageError, match="a slim copy of another study"):
        write_slim_copy(whole, tmp_path / "copy")


def test_a_comparison_is_no_way_around_what_a_study_declared(study, gengap, tmp_path):
    """Some of its runs, others added, an unfinished study, a second study with other looks."""

    def said(*folders):
        done = gengap("compare", *folders, "--out", tmp_path / "out", "--question", "Mine?")
        assert done.returncode == 0, done.stderr
        found = read_study(tmp_path / "out")
        assert found.question == "Mine?"
        return " ".join(found.comparison.caveats)

    whole = shutil.copytree(study / "out", tmp_path / "study")
    assert "look 1 of 2" in said(whole / "runs" / "sb", whole / "runs" / "lb")
    assert "by e-values" in said(whole / "runs/sb/seed0", whole / "runs/lb/seed0")  # it was judged with both before
    other = shutil.copytree(study / "out", tmp_path / "other")
    info = json.loads((other / "study.json").read_text())
    info["config"]["study"]["looks"] = []
    info["declared"] = {"looks": [], "may_extend": False}
    (other / "study.json").write_text(json.dumps(info))
    assert "declared different looks: nothing is judged" in said(whole / "runs" / "sb", other / "runs" / "lb")
    shutil.rmtree(whole / "runs/lb/seed1")
    assert "have not ended (lb, seed 1): nothing is judged" in said(whole)


def test_a_single_run(study, tmp_path, gengap):
    run = study / "out" / "runs" / "sb" / "seed0"
    done = gengap("report", "slim", run, tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert "1 run that ended" in done.stdout
    assert read_info(tmp_path / "copy").result == read_info(run).result


def test_bad_input(study, tmp_path, gengap):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for words, says in (
        (("slim", study / "out", study / "out" / "copy"), "lies in the folder that it is a copy of"),
        (("slim", study / "out", tmp_path / "full"), "is not empty and no slim copy"),
        (("slim", tmp_path / "full", tmp_path / "out"), "contains neither run.json nor study.json"),
        (("sync", study / "copy"), "is a slim copy"),
    ):
        done = gengap("report", *words)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
