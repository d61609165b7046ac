"""The process that writes a run's report: the same page, and the command goes on without it."""

import pytest

from gengap_dist.analysis.report import html, process
from gengap_dist.analysis.report.html import write_report
from gengap_dist.analysis.report.process import ReportProcess
from gengap_dist.analysis.study_data import read_study
from gengap_dist.distributed.cores import Cores
from tests.analysis.report.folders import write_run

pytestmark = pytest.mark.processes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "available_cores", lambda: Cores(2, "machine"))
    write_run(tmp_path / "run", 1, 0)
    return tmp_path / "run"


def test_it_writes_the_page_that_this_process_would_write(folder):
    with ReportProcess(folder) as report:
        report.draw()
        page = report.write()
        assert report._process is not None
        assert report._process.returncode == 0
    text, figures = page.read_text(), {path: path.read_bytes() for path in folder.glob("figures/*")}
    assert {path.suffix for path in figures} == {".svg", ".csv"}
    assert write_report(read_study(folder)).read_text() == text
    assert {path: path.read_bytes() for path in folder.glob("figures/*")} == figures


def test_without_it_the_page_is_written_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(html, "RUN_FIGURES", {})
    with ReportProcess(folder) as report:
        assert report._process is not None
        report._process.kill()
        report._process.wait()
        report.draw()
        page = report.write()
    text = page.read_text()
    page.unlink()
    monkeypatch.setattr(process, "available_cores", lambda: Cores(1, "cgroup"))
    with ReportProcess(folder) as report:
        assert report._process is None
        report.draw()
        assert report.write().read_text() == text


def test_it_ends_with_a_run_that_fails(folder):
    with pytest.raises(RuntimeError), ReportProcess(folder) as report:
        raise RuntimeError
    assert report._process is not None
    assert report._process.returncode is not None
    assert not (folder / "report.html").exists()
