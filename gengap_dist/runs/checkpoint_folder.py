"""Checkpoints as folders: names, files, what says whose they are and whether they are damaged. Loads no torch."""

import hashlib
import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gengap_dist.config.file_names import file_name_problem
from gengap_dist.config.regular_file import open_regular, read_regular

SCHEMA = 2  # of checkpoint.json; schema 1 has no `run` and no `config`
FACTS = "checkpoint.json"
NEEDED = {"model.pt", "run.pt"}

NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
PART = re.compile(rf"\.{NAME.pattern}(\.old)?\.part")


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's `checkpoints` folder, by step, including damaged ones.

    They are the folders `step_` and at least eight digits that hold a checkpoint.json.
    """
    return {step: path for step, path in named_folders(folder).items() if (path / FACTS).is_file()}


def named_folders(folder: Path) -> dict[int, Path]:
    """The folders that are called like a checkpoint, by step."""
    paths = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return {step_of(path): path for path in sorted(paths, key=step_of)}


def step_of(path: Path) -> int:
    """The step of a checkpoint.

    >>> step_of(Path("checkpoints/step_00000050"))
    50
    """
    return int(path.name.removeprefix("step_"))


def read_facts(path: Path) -> dict[str, Any]:
    """The content of checkpoint.json; {} if it is missing or damaged."""
    try:
        facts = from_json(read_regular(path / FACTS))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def checkpoints_of_run(folder: Path, run: str | None) -> dict[int, Path]:
    """The checkpoints that are those of a run, by step: only these may be deleted.

    Args:
        folder: a run's `checkpoints`.
        run: see `RunInfo.id`.
    """
    found = {step: (path, read_facts(path)) for step, path in checkpoints_by_step(folder).items()}
    return {step: path for step, (path, facts) in found.items() if (facts.get("step"), facts.get("run")) == (step, run)}


def describe_damage(path: Path) -> str:
    """What is damaged in a checkpoint; empty if nothing is.

    >>> describe_damage(Path("nowhere"))
    'checkpoint.json is missing'
    """
    try:
        facts = from_json(read_regular(path / FACTS))
        checksums, step = facts["sha256"], facts["step"]
        if not isinstance(facts["schema"], int) or facts["schema"] < 1:
            return f"{FACTS} is not valid"
        if step != step_of(path):
            return f"{FACTS} is that of step {step}"
        if unlisted := sorted(({file.name for file in path.glob("*.pt")} | NEEDED) - checksums.keys()):
            return f"{FACTS} has no checksum of {', '.join(unlisted)}"
        if wrong := [name for name in checksums if file_name_problem(name)]:
            return f"{FACTS} lists {wrong[0]!r:.60}, which is no file of a checkpoint"
        for name, expected in checksums.items():
            with open_regular(path / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{FACTS} is not valid"
    except OSError as error:
        return str(error.strerror)
    return ""
