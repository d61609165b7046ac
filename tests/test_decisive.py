"""docs/results/decisive.md: every number is what the slim folders give, and they are what was run."""

import sys

import pytest

from gengap_dist.analysis.study_data import read_study
from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.slim import check_sums
from tests.conftest import ROOT, thinned

sys.path.append(str(ROOT / "benchmarks"))
import decisive

STUDIES = sorted(path.parent.name for path in decisive.RESULTS.glob("decisive/*/study.json"))
ONE = "mlp_fashionmnist_secondary"


@pytest.fixture(scope="module")
def studies():
    return decisive.studies()


def test_there_are_results():
    assert ONE in STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_what_the_folders_give(studies, name):
    text = (decisive.RESULTS / decisive.PAGE).read_text()
    for title, body in decisive.bodies(studies[name]).items():
        mark = f"<!-- {name} {title} -->"
        assert mark in text, f"{mark} is missing: add it, and run python benchmarks/decisive.py"
        assert f"{mark}\n{body}\n" in text, f"{mark} is old: run python benchmarks/decisive.py"


@pytest.mark.parametrize("name", STUDIES)
def test_no_file_has_changed(name):
    assert check_sums(decisive.RESULTS / "decisive" / name) == []


@pytest.mark.parametrize("name", thinned(STUDIES, lambda name: name == ONE))
def test_comparing_the_folder_says_the_same(studies, name, gengap, tmp_path):
    done = gengap("compare", decisive.RESULTS / "decisive" / name, "--out", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    told, look = " ".join(done.stdout.split()), studies[name].look
    assert (f"are {look.confidence} ({look.name}); those in the table of arms and in figures are 95%" in told) is (
        len(decisive.looks(studies[name])) > 1
    )
    assert "sb_lb_gap" not in told
    whole, compared = studies[name].comparison, read_study(tmp_path / "compared").comparison
    assert [(each.outcome, each.evidence) for each in compared.claims] == [
        (each.outcome, each.evidence) for each in whole.claims
    ]
    assert compared.interventions == whole.interventions


@pytest.mark.parametrize("name", STUDIES)
def test_the_configuration_was_committed_before_the_first_run(studies, name):
    study = studies[name]
    assert "was committed before the first run" in study.registration
    registered = study.info["registration"]
    assert not registered["overridden"]
    config = resolve(StudyConfig, [ROOT / "configs" / f"decisive_{name}.yaml"], {})
    assert [arm.name for arm in config.arms] == study.arms
    seeds, looks = study.info["seeds"], list(config.study.looks)
    assert list(config.study.seeds) == seeds[: len(config.study.seeds)], "a later look adds seeds to those registered"
    assert looks == study.info["config"]["study"]["looks"]
    assert len(seeds) in (len(config.study.seeds), *looks)
