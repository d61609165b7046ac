"""Pages of docs/results with a slim folder: every generated number is what the folder gives."""

import sys

import pytest

from gengap_dist.analysis.study_data import read_study
from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.slim import check_sums
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import result_page


@pytest.mark.parametrize("name", result_page.PAGES)
def test_the_page_is_what_the_folder_gives(name):
    text = (result_page.RESULTS / f"{name}.md").read_text()
    for title, body in result_page.bodies(read_study(result_page.RESULTS / name)).items():
        mark = f"<!-- {name} {title} -->"
        assert mark in text, f"{mark} is missing: add it, and run python benchmarks/result_page.py {name}"
        assert f"{mark}\n{body}\n" in text, f"{mark} is old: run python benchmarks/result_page.py {name}"


@pytest.mark.parametrize("name", result_page.PAGES)
def test_no_file_has_changed(name):
    assert check_sums(result_page.RESULTS / name) == []


@pytest.mark.parametrize("name", result_page.PAGES)
def test_the_folder_is_of_the_committed_configuration(name):
    study = read_study(result_page.RESULTS / name)
    assert "was committed before the first run" in study.registration
    config = resolve(StudyConfig, [ROOT / "configs" / f"{name}.yaml"], {})
    assert [arm.name for arm in config.arms] == study.arms
    assert list(config.study.seeds) == study.info["seeds"]
