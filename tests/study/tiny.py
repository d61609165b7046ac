"""A study of seconds, and what its folder says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from gengap_dist.analysis.report.text import study_rows
from gengap_dist.analysis.study_data import read_study
from gengap_dist.runs.run_folder import read_info
from tests.ranks import start_interpreter, start_module
from tests.ray_cluster import ROOT

SETTINGS = {
    "data": {"name": "digits", "image_size": 8},
    "model": {"name": "mlp", "widths": [16]},
    "optim": {"base_size": 64},
    "train": {"epochs": 2, "num_evals": 2},
    "probe": {"num_samples": 64, "per_decade": 1, "max_time_fraction": None, "diagnostics": []},
    "checkpoint": {"every_steps": 5},
    "mlflow": {"enabled": False},
}
SCORES = ("train_full/loss", "test/loss", "test/accuracy", "best_val/accuracy", "best_val_step", "num_steps")


def write(path: Path, study: dict[str, Any], **settings: Any) -> Path:
    """A config file for a study."""
    path.write_text(yaml.safe_dump(SETTINGS | settings | {"study": {"name": "tiny"} | study}))
    return path


def command(config: Path, out: Path, *words: object) -> list[str]:
    return [sys.executable, "-m", "gengap_dist", "study", "--config", str(config), "--out", str(out), *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, as Ray has it: sums of floats depend on how they are split."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def start(config: Path, out: Path, *words: object, **env: str) -> "subprocess.CompletedProcess[str]":
    """The whole command, in the config's folder."""
    module, *given = command(config, out, *words)[2:]
    new = "RAY_ADDRESS" in env  # a driver of a cluster has threads
    return (start_interpreter if new else start_module)(module, *given, cwd=config.parent, env=environment(**env))


def finish(folder: Path, study: dict[str, Any], **settings: Any) -> tuple[Path, Path]:
    """Run a whole study: its config file and the folder of its results, both in `folder`."""
    config, out = write(folder / "s.yaml", study, **settings), folder / "out"
    done = start(config, out)
    assert done.returncode == 0, done.stderr
    return config, out


def scores(out: Path) -> dict[str, dict[str, Any]]:
    """Folder to the numbers of every run, trials too, that must not depend on how it was run."""
    found = {}
    for path in sorted([*out.glob("runs/*/*/run.json"), *out.glob("tune/*/*/run.json")]):
        result = read_info(path.parent).result
        found[str(path.parent.relative_to(out))] = {name: result.get(name) for name in SCORES}
    return found


def table(out: Path) -> list[list[str]]:
    return study_rows(read_study(out), None)


def ended(out: Path) -> dict[Path, int]:
    """Files of runs that are finished, and when each was last written."""
    folders = [path.parent for path in out.glob("*/*/*/run.json") if read_info(path.parent).status == "finished"]
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}
