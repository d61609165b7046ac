"""Running a study: one run after another on ranks that stay up, skipping what is finished."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist import launchers
from gengap_dist.config import StudyConfig, UsageError, differences
from gengap_dist.launchers import Launcher
from gengap_dist.study.grid import Cell, cells
from gengap_dist.tracking import record

Event = Callable[[Cell, int, int, str], None]
"""Called with the run, its steps done, its steps in all, and a few words."""


def prepare(config: StudyConfig, out: Path) -> list[Cell]:
    """Make the study's folder, or take up the one that is there.

    Raises:
        UsageError: if the folder cannot be used, an arm is not valid, or finished runs there had other settings.
    """
    plan = cells(config, out)
    record.prepare_folder(out, "study.json", resume=True)
    for cell in plan:
        if (cell.folder / "run.json").exists():
            _check_same(cell)
    before = record.read_info(out / "study.json") if (out / "study.json").exists() else {}
    info = {
        "schema": 1,
        "status": record.RUNNING,
        "name": config.study.name,
        "question": config.study.question,
        "baseline": config.baseline,
        "arms": [arm.name for arm in config.study.arms],
        "seeds": list(config.study.seeds),
        "started": before.get("started", record.now()),
        "command": sys.orig_argv,
        "config": config.model_dump(mode="json"),
        "versions": record.versions(),
        "git": record.git_state(),
    }
    record.write_atomically(out / "study.json", json.dumps(info, indent=1))
    return plan


def _check_same(cell: Cell) -> None:
    if changed := differences(record.read_info(cell.folder)["config"], cell.config):
        raise UsageError(
            f"{changed} when {cell.arm}/seed{cell.seed} was run in {cell.folder}: "
            "choose a new --out, or remove that run's folder"
        )


def status(cell: Cell) -> str:
    """What a run's folder says: a status of run.json, or "" before it began."""
    return record.read_info(cell.folder)["status"] if (cell.folder / "run.json").exists() else ""


def run_all(plan: list[Cell], event: Event, *, driver: bool) -> int:
    """Run what is not finished; the number of runs that failed. A run that fails or diverges does not stop the others.

    Args:
        plan: the runs.
        event: told of every step.
        driver: whether this process prepares folders; under torchrun the other ranks only take part.
    """
    num_failed = 0
    with contextlib.ExitStack() as stack:
        ranks: dict[str, Launcher] = {}  # by the settings they were started with
        for cell in plan:
            if status(cell) in (record.FINISHED, record.DIVERGED):
                event(cell, 1, 1, "already there")
                continue
            launch = cell.config.launch.model_dump_json()
            if launch not in ranks:
                ranks[launch] = stack.enter_context(launchers.choose(cell.config.launch, many_runs=True))
            if driver:
                record.prepare_folder(cell.folder, "run.json", resume=True)
            try:
                ranks[launch].run(cell.config, cell.folder, resume=True, progress=partial(event, cell))
                event(cell, 1, 1, status(cell))
            except launchers.RankFailed as error:
                record.close_abandoned(cell.folder, error)
                event(cell, 1, 1, f"failed: {str(error).strip().splitlines()[-1]}")
                num_failed += 1
            except BaseException as error:
                if driver:
                    record.close_abandoned(cell.folder, error)
                raise
    return num_failed


def conclude(out: Path, outcome: str, numbers: dict[str, Any], verdicts: Sequence[str] = ()) -> None:
    """Write the study's last status, its headline numbers, and what it says in sentences."""
    info = record.read_info(out / "study.json")
    info |= {"status": outcome, "ended": record.now(), "metrics": numbers, "verdicts": [*verdicts]}
    record.write_atomically(out / "study.json", json.dumps(info, indent=1))
