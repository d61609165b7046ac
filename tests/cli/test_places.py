"""Where commands run: any locale, any folder name, and no home folder."""

import io
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from gengap_dist.cli import compare, probe, train
from gengap_dist.cli.exit_codes import run_command
from gengap_dist.cli.options import Options, PlanOptions, parse
from gengap_dist.config.loading import load_yaml, resolve
from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.tracking.mlflow.client import sqlite_uri
from tests.ranks import start_interpreter
from tests.ray_cluster import ROOT

ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_HOME = "import pwd\n\n\ndef getpwuid(uid):\n    raise KeyError(uid)\n\n\npwd.getpwuid = getpwuid\n"
CONFIG = """
data: {image_size: 8}
model: {name: mlp, widths: [16], norm: group}
batch: {micro_size: auto}
train: {steps: 3}
mlflow: {experiment: Größe}
"""


@pytest.mark.processes
def test_a_run_in_an_ascii_locale_without_a_home_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "é [x] #&50%41?"
    (tmp_path / "python").mkdir()
    folder.mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(NO_HOME, encoding="utf-8")
    (folder / "ü.yaml").write_text(CONFIG, encoding="utf-8")
    paths = [str(tmp_path / "python"), str(ROOT)]
    place = ASCII_LOCALE | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)}
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")} | place
    done = start_interpreter("gengap_dist", "train", "--config", "ü.yaml", "--out=~/ö [/y]", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == done.stderr.count("this user has no home folder") == 1
    out = tmp_path / f"home-{os.getuid()}" / "ö [/y]"
    assert f"report  {out / 'report.html'}\n" in done.stdout
    *_, mlflow, run = done.stdout.splitlines()
    assert shlex.split(mlflow)[-1] == sqlite_uri(folder / "mlflow.db")
    assert run.startswith("run     ADDRESS/#/experiments/")
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        assert ("Größe",) in store.execute("SELECT name FROM experiments").fetchall()
        assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    assert "--out=~/ö [/y]" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.processes
def test_a_current_folder_that_was_removed_is_named(tmp_path):
    run = f"rmdir {shlex.quote(str(tmp_path / 'gone'))}; {shlex.quote(sys.executable)} -m gengap_dist plan"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(["sh", "-c", run], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gengap: the current folder was removed: change to another\n"


def test_what_standard_output_cannot_show_ends_no_command(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    with pytest.raises(SystemExit) as exit_:
        run_command("gengap x", lambda argv: print("\u2588\u2588 caf\udce9") or 0, [])
    assert exit_.value.code == 0
    assert written.getvalue() == b"?? caf?\n"


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--out=~/x", "--config=~/c.yaml", "--data.root=~/d"]
    options, overrides = parse(Options, words, prog="x", description="", settings=RunConfig)
    assert (options.out, options.config) == (tmp_path / "x", [tmp_path / "c.yaml"])
    assert resolve(RunConfig, [], overrides).data.root == tmp_path / "d"
    plan, _ = parse(PlanOptions, ["--constants=~/k.json"], prog="x", description="")
    assert plan.constants == tmp_path / "k.json"
    assert compare.read_options(["a", "--out=~/x"]).out == tmp_path / "x"
    given, _ = probe.read_options(["--model=~/run@0", "--weights=~/w.pt", "--out=~/x"])
    assert (given.weights, given.out) == (tmp_path / "w.pt", tmp_path / "x")
    assert probe._split_run_and_step(given.model) == (tmp_path / "run", "0")
    (tmp_path / "low.yaml").write_text("seed: 7", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "high.yaml").write_text("extends: ~/low.yaml", encoding="utf-8")
    assert load_yaml(tmp_path / "sub" / "high.yaml") == {"seed": 7}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--out=caf\udce9", "is not UTF-8, and cannot be recorded: rename the file or folder"),
        ("--data.root=caf\udce9", "caf\\xe9 is not UTF-8"),
        ("--out=~nobody-here/x", "begins with ~, and no such home folder is known: write it in full"),
    ],
)
def test_paths_that_cannot_be_used(word, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        resolve(RunConfig, [], parse(Options, [word], prog="x", description="", settings=RunConfig)[1])


@pytest.mark.parametrize("name", ["launch.ray_address", "mlflow.tracking_uri", "mlflow.experiment"])
def test_an_empty_word_is_no_address_and_no_name(name):
    with pytest.raises(UsageError, match=rf"{name} \(\) is not valid: string should have at least 1 character"):
        train.command([f"--{name}", "", "--print_config"])
