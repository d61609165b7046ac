"""Studies of many arms: work grows with the number of runs and not with its square, and the page can be read."""

import cProfile
import csv
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gengap_dist.analysis import study_data
from gengap_dist.analysis.group_runs import gather
from gengap_dist.analysis.report import html
from gengap_dist.analysis.report.tables import arm_tables, run_table
from gengap_dist.analysis.report.text import study_rows
from gengap_dist.analysis.study_data import StudyData, read_study
from gengap_dist.errors import UsageError
from gengap_dist.runs.schema import RunInfo
from gengap_dist.tracking.mlflow.importer import SourceNames
from tests.analysis.report.folders import write_study

SIZES = (5, 10, 15)  # arms


def write_arms(folder: Path, num: int) -> Path:
    """A baseline and larger batches of several rates, and lengths: what all claims ask for."""
    arms: dict[str, dict[str, Any]] = {"sb8": {"batch__global_size": 8}}
    for n in range(1, num):
        kind = ({}, {"optim__scaling": "sqrt", "optim__base_size": 8}, {"train__epochs": 7})[n % 3]
        arms[f"lb{n}"] = {"batch__global_size": 64, "optim__lr": 0.01 * (1 + n // 3)} | kind
    return write_study(folder, arms, 2)


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[int, Path]:
    return {num: write_arms(tmp_path_factory.mktemp(f"arms{num}"), num) for num in SIZES}


def compared(folder: Path, out: Path) -> StudyData:
    study, _ = gather([str(folder)], out, SourceNames(), None, "")
    study_rows(study, None)
    arm_tables(study, study.comparison)
    run_table(study)
    return study


def test_runs_without_what_is_optional_have_a_dash(studies):
    study = read_study(studies[SIZES[0]])
    for run in study.runs:
        run.info.pop("num_steps")
    rows = study_rows(study, None)
    assert [row[2] for row in rows] == ["-"] * SIZES[0]
    assert [row[2].text for row in arm_tables(study, study.comparison)[0].rows] == ["-"] * SIZES[0]


def test_calls_grow_with_the_number_of_arms(studies, tmp_path):
    counts = []
    for folder in (studies[SIZES[0]], *studies.values()):  # the first fills the caches
        profile = cProfile.Profile()
        profile.runcall(compared, folder, tmp_path)
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    first, second = counts[2] - counts[1], counts[3] - counts[2]
    assert second < 1.15 * first


class CountedList(list):
    """A list that counts how often one goes through it."""

    num_loops = 0

    def __iter__(self):
        self.num_loops += 1
        return super().__iter__()


def test_one_goes_through_all_runs_equally_often_for_any_number_of_arms(studies, tmp_path):
    loops = []
    for folder in studies.values():
        study = read_study(folder)
        study.runs[:], runs = [], CountedList(study.runs)
        object.__setattr__(study, "runs", runs)
        study_rows(study, None)
        arm_tables(study, study.comparison)
        run_table(study)
        loops.append(runs.num_loops)
    assert len({*loops}) == 1


def test_every_file_is_read_once(studies, tmp_path, monkeypatch):
    read = Counter[Path]()
    original, metrics = RunInfo.read.__func__, study_data.read_metrics_table
    monkeypatch.setattr(RunInfo, "read", classmethod(lambda cls, path: read.update([path]) or original(cls, path)))
    monkeypatch.setattr(study_data, "read_metrics_table", lambda out: read.update([out]) or metrics(out))
    compared(studies[SIZES[0]], tmp_path)
    assert len(read) == 2 * 2 * SIZES[0]
    assert {*read.values()} == {1}


def test_the_page_of_many_arms_shows_the_extremes_and_says_so(studies, monkeypatch):
    monkeypatch.setattr(html, "MAX_ARMS", 4)
    study = read_study(studies[SIZES[1]])
    page = html.write_report(study).read_text(encoding="utf-8")
    said = f"Of {SIZES[1]} arms 5 are drawn: the baseline, and those that lose most and least"
    assert page.count(said) == page.count("<figcaption>") - 1  # correlations are over all arms
    gaps = study.comparison.gaps
    order = sorted(gaps, key=lambda arm: gaps[arm].paired.mean)
    with (study.folder / "figures" / "gap.csv").open(encoding="utf-8") as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {*order[:2], *order[-2:]}
    table = page[page.index('<table id="arm-table"') :]
    assert re.findall(r'<th scope="row">([^<]+)', table[: table.index("</table>")]) == study.arms


def test_run_folders_may_change_while_one_looks_for_them(tmp_path, monkeypatch):
    """Checkpoints come and go in a run that trains; a folder that has vanished is left out."""
    folder = write_study(tmp_path / "study", {"sb8": {"batch__global_size": 8}, "lb64": {"batch__global_size": 64}}, 1)
    for run in folder.glob("runs/*/*"):
        (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    entered: list[str] = []
    scandir = os.scandir

    def scan(path: Any) -> Any:
        entered.append(os.fspath(path))
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    study, problems = gather([str(tmp_path)], tmp_path / "out", SourceNames(), None, "")
    assert len(study.runs) == 2
    assert not problems
    assert any(path.endswith("gone") for path in entered)
    assert not any("checkpoints" in path for path in entered)


def test_a_named_pipe_in_the_place_of_a_file_is_not_opened(tmp_path):
    folder = write_study(tmp_path / "study", {"sb8": {"batch__global_size": 8}, "lb64": {"batch__global_size": 64}}, 2)
    run = folder / "runs" / "lb64" / "seed0"
    (run / "run.json").unlink()
    os.mkfifo(run / "run.json")
    with pytest.raises(UsageError, match=r"run\.json is a named pipe or device"):
        gather([str(tmp_path)], tmp_path / "out", SourceNames(), None, "")
    (line,) = read_study(folder).unreadable
    assert "run.json cannot be read (it is not a regular file)" in line
