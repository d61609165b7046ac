"""What study.json says of the configuration and of the looks at the study."""

import os
import subprocess
from pathlib import Path

import pytest

from gengap_dist.config.loading import resolve
from gengap_dist.config.study import Arm, StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_study_info, write_info
from gengap_dist.runs.schema import RunInfo, RunStatus
from gengap_dist.study import runner
from gengap_dist.study.registration import registration

BASE = "optim: {lr: 0.1}\n"
STUDY = """
extends: base.yaml
study:
  seeds: [0, 1]
  arms: [{name: sb, set: {batch.global_size: 8}}, {name: lb, set: {batch.global_size: 16}}]
"""


def git(folder: Path, *args: str) -> str:
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | identity | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", *args], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def committed(tmp_path):
    """A study that extends another file, both committed."""
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "plan")
    return path


def registered(path: Path, **overrides: object) -> dict:
    found = registration(resolve(StudyConfig, [path], dict(overrides)), [path])
    assert found is not None
    return found


def test_a_committed_configuration_is_named_with_its_commit_and_digest(committed):
    found = registered(committed)
    assert found["commit"] == git(committed.parent, "rev-parse", "HEAD")
    assert found["committed"].startswith("20")
    assert found["files"] == ["study.yaml", "base.yaml"]
    assert found["overridden"] == []
    same = registered(committed, launch={"num_processes": 2})  # a runtime setting
    assert same == found
    other = registered(committed, optim={"lr": 0.2})
    assert other["overridden"] == ["optim.lr"]
    assert other["sha256"] != found["sha256"]


@pytest.mark.parametrize("name", ["study.yaml", "base.yaml"])
def test_a_file_that_was_changed_since_is_not_committed(committed, name):
    path = committed.parent / name
    path.write_text(path.read_text() + "seed: 0\n")
    assert "commit" not in registered(committed)


def test_files_outside_a_repository_have_a_digest_only(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    assert {*registered(path)} == {"sha256", "files", "overridden"}
    assert registration(resolve(StudyConfig, [path], {}), []) is None


def test_each_list_of_seeds_that_was_judged_is_kept(committed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for seeds, judged in (([0, 1], [[0, 1]]), ([0, 1], [[0, 1]]), ([0, 1, 2], [[0, 1], [0, 1, 2]])):
        config = resolve(StudyConfig, [committed], {"study": {"seeds": seeds}})
        runner.prepare(config, out, pytest.fail, [committed])
        info = runner.conclude(out, RunStatus.FINISHED, {}, ["a verdict"])
        assert info.judged == judged
    runner.conclude(out, RunStatus.KILLED, {})  # not judged
    assert read_study_info(out).judged == judged


def test_a_study_is_registered_as_it_is_at_its_first_run(committed, tmp_path):
    """What was corrected before a run had begun could follow from nothing that was seen."""
    out = tmp_path / "out"
    out.mkdir()

    def prepare(*seeds: int) -> dict:
        config = resolve(StudyConfig, [committed], {"study": {"seeds": list(seeds)}})
        runner.prepare(config, out, pytest.fail, [committed])
        found = read_study_info(out).registration
        assert found
        return found

    first, second = prepare(0, 1), prepare(0, 1, 2)
    assert second["sha256"] != first["sha256"]
    assert "later" not in second
    run = resolve(StudyConfig, [committed], {}).run_config(Arm(name="lb", set={"batch.global_size": 16}), seed=0)
    folder = out / "runs" / "lb" / "seed_0"
    folder.mkdir(parents=True)
    write_info(folder, RunInfo(seed=0, status=RunStatus.KILLED, config=run.model_dump(mode="json")))
    third = prepare(0, 1, 2, 3)
    assert third["sha256"] == second["sha256"]
    assert [each["sha256"] != second["sha256"] for each in third["later"]] == [True]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"looks": [20, 10]}, "are not one or two increasing numbers"),
        ({"looks": [5, 10, 20]}, "are not one or two increasing numbers"),
        ({"looks": [1]}, "at least 2"),
        ({"looks": [10, 11]}, "fewer than two seeds"),
        ({"looks": [10, 20], "may_extend": True}, "exclude each other"),
        ({"tolerance": 0}, "tolerance"),
    ],
)
def test_looks_and_margins_that_make_no_sense_are_refused(committed, section, message):
    with pytest.raises(UsageError, match=message):
        resolve(StudyConfig, [committed], {"study": section})
