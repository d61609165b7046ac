"""Damaged folders: each command says in a sentence what is damaged, and goes on with the other runs."""

import random
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gengap_dist.analysis.report import html
from gengap_dist.cli import clean, compare, probe, report
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.config.loading import load_yaml, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.runs.run_folder import prepare_folder
from gengap_dist.training import trainer
from tests import conftest
from tests.analysis.report.folders import write_study
from tests.conftest import FULL, thinned
from tests.damaged import CHECKPOINT_SHAPES, RUN_SHAPES, SHAPES, damage

NAMES = re.compile(r"Traceback|\w+(Error|Exception|Interrupt|Iteration|Warning)\b|validation error")
COMMANDS = {
    "report": ("gengap report", report.command, ["study"]),
    "slim": ("gengap report", report.command, ["slim", "study", "slim"]),
    "compare": ("gengap compare", compare.command, ["study", "--out", "comparison"]),
    "clean": ("gengap clean", clean.command, ["study", "--yes"]),
}
EVERY = 6  # shapes of `make test`


def some(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: the others run in `make test-full`."""
    kept = [*names][::EVERY]
    return thinned(names, lambda name: name in kept)


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
@pytest.mark.parametrize("name", some(SHAPES))
def test_a_damaged_folder_costs_a_sentence(whole, tmp_path, said, monkeypatch, name):
    if not FULL:  # only the figures of spectra
        for figures in ("STUDY_FIGURES", "RUN_FIGURES"):
            entries = getattr(html, figures).items()
            kept = {key: entry for key, entry in entries if name.startswith("spectra") and "spectra" in key}
            monkeypatch.setattr(html, figures, kept)
    shutil.copytree(whole, tmp_path / "study")
    damaged = damage(tmp_path / "study", name)
    for command in COMMANDS:
        said(*COMMANDS[command])
    if name in RUN_SHAPES and "run.json: a link" not in name:
        damaged.rename(tmp_path / "run")
        said("gengap report", report.command, ["run"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "run"
    small = {"data__image_size": 8, "model__name": "mlp", "model__widths": [8], "probe__num_samples": [64]}
    conftest.train(
        out, train__epochs=1, batch__global_size=512, checkpoint__every_steps=2, probe__diagnostics=[], **small
    )
    return out


def resume(words: list[str]) -> int:
    """`gengap train --resume --out FOLDER` in this process."""
    out = Path(words[0])
    settings = validate(RunConfig, load_yaml(out / "config.yaml", of_run=True))
    prepare_folder(out, "run.json", resume=True)
    trainer.run(settings, out, resume=True)
    return 0


@pytest.mark.usefixtures("few_figures")
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize(
    "name",
    some([
        *CHECKPOINT_SHAPES,
        *(name for name in RUN_SHAPES if name.split(":")[0] in ("run.json", "metrics.jsonl", "config.yaml")),
    ]),
)  # fmt: skip
def test_a_damaged_run_is_resumed_and_measured_or_costs_a_sentence(trained, tmp_path, said, name):
    shape = {**RUN_SHAPES, **CHECKPOINT_SHAPES}[name]
    for prog, command, words in (
        ("gengap train", resume, ["run"]),
        ("gengap probe", probe.command, ["--model", "run"]),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        shape(tmp_path / "run", random.Random(name))
        said(prog, command, words)
    assert not (tmp_path / "executed").exists()
