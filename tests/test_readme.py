"""What the README prints is what a user can type: the console script, in his own folder, with output in a file."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gengap_dist.cli.demo import CONFIG
from gengap_dist.config.loading import resolve
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.run_folder import read_info
from tests.conftest import ROOT, thinned

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("gengap ")]
STUDY = next(block for kind, block in BLOCKS if kind == "yaml")
SCRIPT = Path(sys.executable).parent / "gengap"
NEEDS = {"gengap report studies/mine": "gengap study --config study.yaml --out studies/mine"}


def test_it_is_short_and_its_files_exist():
    assert len(README.splitlines()) <= 130
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "docs/results/README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_demo_is_part_of_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gengap_dist"]
    assert any(CONFIG.relative_to(ROOT / "gengap_dist").match(pattern) for pattern in data)
    assert resolve(StudyConfig, [CONFIG], {}).baseline == "sb16"


def typed(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ours = subprocess.run(
        [sys.executable, "-c", "import gengap_dist; print(gengap_dist.__file__)"], cwd=folder, env=env,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if not SCRIPT.exists() or Path(ours.stdout.strip()).parent.parent != ROOT:
        pytest.skip(f"this checkout is not what is installed in {SCRIPT.parent}")
    done = subprocess.run([SCRIPT, *command.split()[1:]], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


@pytest.mark.processes
@pytest.mark.parametrize("command", thinned(COMMANDS, lambda command: command == "gengap train"))
def test_each_command_does_what_it_says(command, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY.replace("[0, 1, 2]", "[0, 1]"))
    if command in NEEDS:
        typed(NEEDS[command], tmp_path)
    done = typed(command, tmp_path)
    if command == "gengap train":
        (folder,) = (tmp_path / "runs").iterdir()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert read_info(folder).result["test/accuracy"] >= 0.95
        assert sum("near_rank_loss/fc2/rel_1e-2" in line for line in lines) >= 8
        stages = [line.partition(": ")[2] for line in done.stderr.splitlines()]
        assert [stage for stage in stages if stage.startswith(("training", "exporting", "writing"))] == [
            "training, 420 steps", "exporting the model", "writing the report",
        ]  # fmt: skip
    if "--dry-run" in command:
        assert not (tmp_path / "studies").exists()


@pytest.mark.full
@pytest.mark.processes
def test_an_installed_wheel_has_the_demo(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "gengap_dist", source / "gengap_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(install, check=True, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(site)}
    words = [str(site / "bin" / "gengap"), "demo", "--dry-run"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "baseline sb16" in done.stdout
