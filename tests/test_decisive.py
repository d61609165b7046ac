"""docs/results/decisive.md: every number is what the slim folders give, and they are what was run."""

import sys

import pytest

from gengap_dist.analysis.study_data import read_study
from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.slim import check_sums
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import decisive

STUDIES = sorted(path.parent.name for path in decisive.RESULTS.glob("decisive/*/study.json"))


def test_there_are_results():
    assert STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_what_the_folders_give(name):
    text = (decisive.RESULTS / decisive.PAGE).read_text()
    for title, body in decisive.bodies(decisive.studies()[name]).items():
        mark = f"<!-- {name} {title} -->"
        assert mark in text, f"{mark} is missing: add it, and run python benchmarks/decisive.py"
        assert f"{mark}\n{body}\n" in text, f"{mark} is old: run python benchmarks/decisive.py"


@pytest.mark.parametrize("name", STUDIES)
def test_no_file_has_changed(name):
    assert check_sums(decisive.RESULTS / "decisive" / name) == []


@pytest.mark.parametrize("name", STUDIES)
def test_comparing_the_folder_says_the_same(name, gengap, tmp_path):
    folder = decisive.RESULTS / "decisive" / name
    done = gengap("compare", folder, "--out", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    whole, compared = read_study(folder).comparison, read_study(tmp_path / "compared").comparison
    assert [(each.outcome, each.evidence) for each in compared.claims] == [
        (each.outcome, each.evidence) for each in whole.claims
    ]
    assert compared.interventions == whole.interventions


@pytest.mark.parametrize("name", STUDIES)
def test_the_configuration_was_committed_before_the_first_run(name):
    study = read_study(decisive.RESULTS / "decisive" / name)
    assert "was committed before the first run" in study.registration
    registered = study.info["registration"]
    assert not registered["overridden"]
    config = resolve(StudyConfig, [ROOT / "configs" / f"decisive_{name}.yaml"], {})
    assert [arm.name for arm in config.arms] == study.arms
    assert list(config.study.seeds) == study.info["seeds"]
    assert list(config.study.looks) == study.info["config"]["study"]["looks"]
