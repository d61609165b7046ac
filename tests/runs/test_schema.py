"""run.json and study.json: what an earlier version wrote is read, what a later one wrote is refused and kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gengap_dist.analysis.group_runs import gather
from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.report import command as report_command
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.arm_means import read_means, read_sources
from gengap_dist.runs.run_folder import RunRecorder, describe_damage, read_info, read_study_info, write_info
from gengap_dist.runs.schema import MetricDescription, NewerSchema, RunStatus
from gengap_dist.study import runner
from gengap_dist.study.means import update_means
from gengap_dist.tracking.mlflow.importer import SourceNames

SCHEMA_1 = Path(__file__).parent / "schema_1" / "study"  # written before run.json had a metric; metrics left out
ACCURACIES = {"sb32": {0: 0.10277777777777777, 1: 0.14444444444444443},
              "lb128": {0: 0.10555555555555556, 1: 0.17222222222222222}}  # fmt: skip


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(SCHEMA_1, tmp_path / "old"))


def edit(folder: Path, name: str = "run.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_of_schema_1_is_read_and_written_as_schema_2(old):
    folder = old / "runs/sb32/seed0"
    before = json.loads((folder / "run.json").read_text())
    assert before["schema"] == 1
    info = read_info(folder)
    assert info.metric == MetricDescription(name="accuracy", unit="share", higher_is_better=True, chance=0.1)
    assert (info.status, info.result["test/accuracy"]) == ("finished", ACCURACIES["sb32"][0])
    assert info.status.has_result
    write_info(folder, info.with_fields(status=RunStatus.FAILED, error="by hand"))
    after = json.loads((folder / "run.json").read_text())
    assert after.pop("metric")["chance"] == 0.1
    assert after == before | {"schema": 2, "status": "failed", "error": "by hand"}


def test_a_run_of_schema_1_is_reported(old, capsys):
    """Its speed has another name."""
    run = old / "runs/lb128/seed1"
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap report", report_command, [str(run)])
    assert exit_.value.code == 0
    assert "16,966 samples/s" in capsys.readouterr().out
    assert "16,966" in (run / "report.html").read_text()


def test_a_study_of_schema_1_is_read_and_compared(old):
    study = read_study(old)
    assert {arm: study.results(arm, "test/accuracy") for arm in study.arms} == ACCURACIES
    again, problems = gather([str(old)], old.parent / "out", SourceNames(), None, "")
    assert not problems
    assert again.comparison == study.comparison
    assert not update_means(old)
    assert read_sources(old / "runs/lb128").keys() == {f"{arm}/seed{seed}" for arm in ACCURACIES for seed in (0, 1)}
    *_, last = read_means(old / "runs/lb128")
    assert last["sb_lb_gap/mean"] == study.gap("lb128").mean


def test_fields_of_the_facts_are_written_and_others_kept(tmp_path):
    metric = MetricDescription(name="test/perplexity", unit="", higher_is_better=False, chance=256.0)
    RunRecorder(tmp_path).start(RunConfig(), {"metric": metric, "data": {"num_classes": 4}, "of_a_task": [1, 2]})
    RunRecorder(tmp_path).finish(RunStatus.DIVERGED, {"a": float("nan")}, "lost")
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["schema"] == 2
    assert written["metric"] == metric.model_dump()
    assert (written["status"], written["result"], written["error"]) == ("diverged", {"a": "nan"}, "lost")
    assert read_info(tmp_path).content()["of_a_task"] == [1, 2]
    RunRecorder(tmp_path).start(RunConfig(), {})
    assert read_info(tmp_path).metric.chance is None
    assert len(read_info(tmp_path).resumed) == 1


NEWER = {"schema": 3, "status": "paused", "versions": {"gengap_dist": "7.1.0"}}  # a status that is not known yet


def test_a_newer_run_is_refused_with_the_version_that_reads_it(old, capsys):
    folder = old / "runs/sb32/seed0"
    edit(folder, **NEWER)
    with pytest.raises(NewerSchema) as refused:
        read_info(folder)
    assert str(refused.value) == (
        f"{folder}/run.json has schema 3, and this version of gengap_dist reads up to 2: install gengap_dist 7.1.0, "
        "or a later one"
    )
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap report", report_command, [str(folder)])
    assert exit_.value.code == 2
    assert "install gengap_dist 7.1.0" in capsys.readouterr().err
    assert [text for text in read_study(old).unreadable if "install gengap_dist 7.1.0" in text]


@pytest.mark.parametrize("name", ["run.json", "study.json"])
def test_a_study_neither_moves_nor_overwrites_what_a_newer_version_wrote(old, name):
    edit(old / ("runs/sb32/seed0" if name == "run.json" else "."), name, **NEWER)
    files = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    config = validate(StudyConfig, json.loads((SCHEMA_1 / "study.json").read_text())["config"])
    with pytest.raises(NewerSchema, match=r"install gengap_dist 7\.1\.0"):
        runner.prepare(config, old, pytest.fail)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == files


TENSOR = {"dtype": "float32", "shape": [-1, 10]}
MODEL = {"file": "model/model.pt2", "torch": "2.9.0+cu128", "input": TENSOR, "output": TENSOR, "metadata": {}}
DAMAGES = [
    ({"status": "finis"}, "status ('finis') is not valid: input should be 'running', 'finished'"),
    ({"seed": "x"}, "seed ('x') is not valid: input should be a valid integer"),
    ({"config": None}, "config (None) is not valid: input should be a valid dictionary"),
    ({"metric": {"name": "a", "unit": ""}}, "metric.higher_is_better is missing"),
    ({"schema": "1"}, "schema ('1') must be an integer"),
    ({"seconds": [1]}, "seconds ([1]) is not valid: input should be a valid number"),
    ({"versions": {"python": "3\n-e ."}}, r"versions.python ('3\n-e .') is not valid: string should match"),
    ({"model": MODEL | {"torch": "2.0\nother"}}, r"model.torch ('2.0\nother') is not valid: string should match"),
    ({"model": MODEL | {"torch": "2.0\n"}}, r"model.torch ('2.0\n') is not valid: string should match"),
]


@pytest.mark.parametrize(("changes", "says"), DAMAGES, ids=[next(iter(changes)) for changes, _ in DAMAGES])
def test_a_damaged_run_costs_one_sentence_with_file_field_and_rule(old, changes, says):
    folder = old / "runs/sb32/seed0"
    edit(folder, **changes)
    with pytest.raises(UsageError) as refused:
        read_info(folder)
    assert str(refused.value).startswith(f"{folder}/run.json is damaged: {says}")
    assert "\n" not in str(refused.value)
    assert describe_damage(folder) == "its run.json is not valid"


@pytest.mark.parametrize("version", ["2.9.0+cu128", "2.6.0a0+ecf3bae40a.nv25.01", "3.14.0rc1+", "3"])
def test_versions_of_builds_are_read(old, version):
    folder = old / "runs/sb32/seed0"
    edit(folder, versions={"python": version, "platform": "Linux x"}, model=MODEL | {"torch": version})
    info = read_info(folder)
    assert info.model
    assert (info.model.torch, info.versions["python"]) == (version, version)


def test_a_damaged_study_is_named(old):
    edit(old, "study.json", arms="sb32")
    with pytest.raises(
        UsageError, match=r"study.json is damaged: arms \('sb32'\) is not valid: input should be a valid"
    ):
        read_study_info(old)
