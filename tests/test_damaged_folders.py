"""Damaged folders: each command says in a sentence what is damaged, and goes on with the other runs."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gengap_dist.analysis.report import html
from gengap_dist.cli import compare, report
from gengap_dist.cli.exit_codes import run_command
from tests.analysis.report.folders import write_study
from tests.conftest import FULL, thinned
from tests.damaged import RUN_SHAPES, SHAPES, damage

NAMES = re.compile(r"Traceback|\w+(Error|Exception|Interrupt|Iteration|Warning)\b|validation error")
COMMANDS = {
    "report": ("gengap report", report.command, ["study"]),
    "slim": ("gengap report", report.command, ["slim", "study", "slim"]),
    "compare": ("gengap compare", compare.command, ["study", "--out", "comparison"]),
}
EVERY = 4  # shapes of `make test`


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    arms = {"sb8": {"batch__global_size": 8}, "lb64": {"batch__global_size": 64}}
    return write_study(tmp_path_factory.mktemp("whole") / "study", arms, 2)


@pytest.fixture
def said(capsys) -> Callable[[str, Callable[..., int], list[str]], str]:
    """Runs a command that must end with 0 or 2; returns what it printed on stderr."""

    def run(prog: str, command: Callable[..., int], words: list[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_command(prog, command, words)
        printed = capsys.readouterr()
        assert exit_.value.code in (0, 2), printed.err
        assert not NAMES.search(printed.err + printed.out), printed.err
        return printed.err

    return run


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", thinned(SHAPES, lambda name: [*SHAPES].index(name) % EVERY == 0))
def test_a_damaged_folder_costs_a_sentence(whole, tmp_path, said, monkeypatch, name):
    if not FULL and not name.startswith("spectra"):
        monkeypatch.setattr(html, "draw_figures", lambda *args, **kwargs: [])
    shutil.copytree(whole, tmp_path / "study")
    damaged = damage(tmp_path / "study", name)
    for command in COMMANDS:
        said(*COMMANDS[command])
    if name in RUN_SHAPES and "run.json: a link" not in name:
        damaged.rename(tmp_path / "run")
        said("gengap report", report.command, ["run"])
