"""Nothing that a folder of results names is executed without the user's word, and nothing in it leads out of it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml

from gengap_dist.analysis.report import html
from gengap_dist.cli import compare, probe, report, train
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.config.loading import load_yaml
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import prepare_folder
from gengap_dist.tracking.mlflow import process
from tests import conftest
from tests.damaged import Opener, put

MODULE = """
from pathlib import Path
Path("executed").touch()
from gengap_dist.models.mlp import mlp as make
from gengap_dist.training.tasks import Classification as Task
def data():
    import numpy as np
    inputs = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    return {"train": (inputs, inputs[:, 0, 0] % 10), "test": (inputs, inputs[:, 0, 0] % 10)}
"""
SETTINGS = {"model.name": "stranger:make", "data.name": "stranger:data", "task.name": "stranger:Task"}
CODE = SETTINGS | {"optim.name": "stranger:Optimizer"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    small = {"data__image_size": 8, "model__name": "mlp", "model__widths": [8], "probe__num_samples": [16]}
    conftest.train(out, train__epochs=1, batch__global_size=512, probe__diagnostics=[], **small)
    return out


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of a run, and the module of a stranger in the current folder."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return shutil.copytree(trained, tmp_path / "run")


def name_code(run: Path, setting: str, **more: object) -> None:
    """Let the folder of a run name the code of the stranger."""
    for file, read, write in (("run.json", json.loads, json.dumps), ("config.yaml", yaml.safe_load, yaml.safe_dump)):
        tree = read((run / file).read_text())
        for path, value in {setting: CODE[setting], **more}.items():
            put(tree["config"] if file == "run.json" else tree, path, value)
        (run / file).write_text(write(tree))


def ended(capsys: pytest.CaptureFixture[str], prog: str, command: Callable[..., int], *words: str) -> tuple[int, str]:
    """The exit code of a command, and what it printed on stderr."""
    with pytest.raises(SystemExit) as exit_:
        run_command(prog, command, words)
    return int(exit_.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("setting", SETTINGS)
def test_code_that_a_folder_names_needs_the_word_of_the_user(run, capsys, monkeypatch, setting):
    name_code(run, setting, **{"mlflow.log_model": True})
    monkeypatch.setattr(process, "sync_now", lambda folder, uri, progress, metrics: "sqlite:///x.db")
    monkeypatch.setattr(html, "draw_figures", lambda *args, **kwargs: [])
    if setting == "model.name":
        for words in (["run"], ["slim", "run", "slim"], ["sync", "run"]):
            code, err = ended(capsys, "gengap report", report.command, *words)
            assert code == 0, err
        assert "model.name (stranger:make) is code that its folder names, and only training imports it" in err
        assert ended(capsys, "gengap compare", compare.command, "run", "--out", "out")[0] == 0
    for command in (
        ("gengap probe", probe.command, "--model", "run"),
        ("gengap train", train.command, "--resume", "--out", "run"),
    ):
        code, err = ended(capsys, *command)
        assert code == 2
        assert f"{setting} ({SETTINGS[setting]}) is code that " in err
        assert f"add --{setting} {SETTINGS[setting]}" in err
    assert not Path("executed").exists()
    code, err = ended(capsys, "gengap probe", probe.command, "--model", "run@0", f"--{setting}", SETTINGS[setting])
    assert code == 0, err
    assert Path("executed").exists()


def test_an_optimizer_that_a_folder_names(run, capsys):
    """Only training makes it."""
    name_code(run, "optim.name")
    code, err = ended(capsys, "gengap train", train.command, "--resume", "--out", "run")
    assert code == 2
    assert "add --optim.name stranger:Optimizer" in err
    assert ended(capsys, "gengap probe", probe.command, "--model", "run@0")[0] == 0
    assert not Path("executed").exists()


def test_pickled_code_in_a_checkpoint_is_not_loaded(run, capsys):
    ((_, path),) = checkpoint.checkpoints_by_step(run / "checkpoints").items()
    torch.save({"train": Opener()}, path / "run.pt")
    facts = json.loads((path / "checkpoint.json").read_text())
    facts["sha256"]["run.pt"] = sha256((path / "run.pt").read_bytes()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(facts))
    code, err = ended(capsys, "gengap probe", probe.command, "--model", "run")
    assert code == 2
    assert "holds Python objects" in err
    assert not Path("executed").exists()
    facts["sha256"]["../../../stranger.py"] = "0"
    (path / "checkpoint.json").write_text(json.dumps(facts))
    assert "lists '../../../stranger.py', which is no file of a checkpoint" in checkpoint.describe_damage(path)


@pytest.mark.parametrize("name", ["figures", "spectra", "metrics.jsonl", "checkpoints", "test_correct.npy"])
def test_links_do_not_lead_out_of_a_folder(run, tmp_path, capsys, name):
    away = tmp_path / "away"
    (run / name).rename(away) if (run / name).exists() else away.mkdir()
    (run / name).symlink_to(away)
    files = {path: path.read_bytes() for path in away.rglob("*") if path.is_file()}
    for command in (
        ("gengap report", report.command, "run"),
        ("gengap report", report.command, "slim", "run", "slim"),
        ("gengap report", report.command, "sync", "run"),
        ("gengap compare", compare.command, "run", "--out", "out"),
        ("gengap probe", probe.command, "--model", "run"),
    ):
        code, err = ended(capsys, *command)
        assert code == 2
        assert f"{run / name} is a link that leads out of its folder" in err
    with pytest.raises(UsageError, match="is a link that leads out"):
        prepare_folder(run, "run.json", resume=True)
    assert files == {path: path.read_bytes() for path in away.rglob("*") if path.is_file()}
    (run / name).unlink()
    (run / "link").symlink_to("run.json")
    prepare_folder(run, "run.json", resume=True)


@pytest.mark.parametrize("name", ["config.yaml", "test_correct.npy", "mlflow.log", "spectra/pipe"])
def test_a_named_pipe_is_not_opened(run, tmp_path, capsys, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for command in (
        ("gengap train", train.command, "--resume", "--out", "run"),
        ("gengap report", report.command, "run"),
        ("gengap report", report.command, "slim", "run", "slim"),
        ("gengap report", report.command, "sync", "run", "--mlflow.tracking_uri", f"sqlite:///{tmp_path}/x.db"),
        ("gengap compare", compare.command, "run", "--out", "out"),
        ("gengap probe", probe.command, "--model", "run"),
    ):
        code, err = ended(capsys, *command)
        assert code == 2
        assert f"{run / name} is a named pipe or device, no file: remove it" in err


def test_a_file_extends_none_elsewhere(run, tmp_path, monkeypatch):
    (tmp_path / "secret.yaml").write_text("mlflow.experiment: secret\n")
    (run / "config.yaml").write_text("extends: ../secret.yaml\n")
    with pytest.raises(UsageError, match=r"extends .*secret.yaml, which lies outside of .*: give it before this file"):
        load_yaml(run / "config.yaml", of_run=True)
    assert load_yaml(run / "config.yaml") == {"mlflow": {"experiment": "secret"}}  # in the current folder
    monkeypatch.chdir(run)
    with pytest.raises(UsageError, match="lies outside of"):
        load_yaml(run / "config.yaml")
