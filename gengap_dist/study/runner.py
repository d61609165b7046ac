"""Running a study: trials first, then every arm with every seed, skipping what is finished.

Run folders are the truth: a study that was interrupted goes on from what they say.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist.config.identity import differences
from gengap_dist.config.study import StudyConfig
from gengap_dist.distributed import launchers
from gengap_dist.distributed.launchers import Launcher
from gengap_dist.errors import OutOfMemory, UsageError
from gengap_dist.runs import run_folder
from gengap_dist.study import ray_runner, run_matrix, tuning
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback
from gengap_dist.training import ENTRY_POINT

Warn = Callable[[str], None]
"""Called with one sentence."""


@contextlib.contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """While open, no other process of this machine runs a study in `out`.

    Raises:
        UsageError: if one does.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"--out ({out}) holds a study that is running just now: wait for its end, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def prepare(config: StudyConfig, out: Path, warn: Warn) -> None:
    """Write study.json, or take up the study that is there; damaged runs are set aside.

    Raises:
        UsageError: if an arm is not valid, or runs or another study there had other settings.
    """
    plan = _trials(config, out) or run_matrix.planned_runs(config, out, {})
    before = _before(out, warn)
    if before.get("name", config.study.name) != config.study.name:
        raise UsageError(
            f"--out ({out}) holds the study {before['name']}, and this one is {config.study.name}: choose another"
        )
    if before.get("question", config.study.question) != config.study.question:
        warn(f"study.question was another when {out} was begun ({before['question']}): the report has the new one")
    for folder in sorted([*out.glob("runs/*/*"), *out.glob("tune/*/*")]):
        if what := run_folder.damage(folder):
            kept = run_folder.quarantine(folder, out / "damaged")
            warn(f"{folder} is damaged ({what}): kept as {kept}, and run again if it is part of this study")
    _check_same(plan)
    tuned = (before.get("config") or {}).get("study", {}).get("tune")
    now = config.study.tune.model_dump(mode="json") if config.study.tune else None
    if before and tuned != now and any(out.glob("runs/*/*/run.json")):
        raise UsageError(
            f"study.tune was another when the runs in {out} were made: choose another --out, or set it as it was"
        )
    arms = [arm.name for arm in config.arms]
    for folder in sorted(out.glob("runs/*")):
        if folder.name not in arms:
            warn(f"{folder} is of no arm of this study: it stays where it is, and out of the report")
    for name, twin in config.duplicates.items():
        warn(f"arm {name} is the same run as {twin}, and is not run twice")
    info = {
        "schema": 1,
        "status": run_folder.RUNNING,
        "name": config.study.name,
        "question": config.study.question,
        "baseline": config.baseline,
        "arms": arms,
        "twins": config.duplicates,
        "seeds": list(config.study.seeds),
        "started": before.get("started", run_folder.now()),
        "command": sys.orig_argv,
        "config": config.model_dump(mode="json"),
        "versions": run_folder.versions(),
        "git": run_folder.git_state(),
    }
    run_folder.write_atomically(out / "study.json", json.dumps(info, indent=1))


def _before(out: Path, warn: Warn) -> dict[str, Any]:
    path = out / "study.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        warn(f"{path} is not whole: written anew, nothing but the time of the first start was in it alone")
        return {}


def _trials(config: StudyConfig, out: Path) -> list[PlannedRun]:
    return run_matrix.planned_trials(config, out, tuning.points(config.study.tune)) if config.study.tune else []


def _check_same(plan: list[PlannedRun]) -> None:
    for cell in plan:
        if not status(cell):
            continue
        if changed := differences(run_folder.read_info(cell.folder)["config"], cell.config):
            raise UsageError(
                f"{changed} when {cell.arm}/{cell.folder.name} was run in {cell.folder}: "
                "choose a new --out, or remove that run's folder"
            )


def status(cell: PlannedRun) -> str:
    """What a run's folder says: a status of run.json, or "" before it began or if it is damaged."""
    whole = (cell.folder / "run.json").exists() and not run_folder.damage(cell.folder)
    return run_folder.read_info(cell.folder)["status"] if whole else ""


def num_runs(config: StudyConfig) -> int:
    """Trials and runs of a study."""
    each = len(config.study.seeds) + (config.study.tune.trials if config.study.tune else 0)
    return len(config.arms) * each


def run_study(
    config: StudyConfig, out: Path, watch: StudyCallback, *, driver: bool, warn: Warn = lambda text: None
) -> int:
    """Tune, then run what is not finished; the number of runs that failed.

    Args:
        config: the study.
        out: its folder, made ready by `prepare`.
        watch: told of every step.
        driver: whether this process prepares folders; under torchrun the other ranks only take part.
        warn: called with what people should know.
    """
    run = partial(run_all, watch=watch, driver=driver, most=config.study.concurrent)
    if not config.study.tune:
        return run(run_matrix.planned_runs(config, out, {}))
    trials = _trials(config, out)
    # a trial that failed is tried again until its arm's own runs have begun: they must all have the same settings
    settled = {arm.name for arm in config.arms if (out / "runs" / arm.name).exists()}
    num_failed = run([cell for cell in trials if cell.arm not in settled or status(cell) != run_folder.FAILED])
    found = _searches(config, trials)
    tuned = {arm: search["best"] for arm, search in found.items() if search["best"] is not None}
    plan = run_matrix.planned_runs(config, out, tuned)
    if driver:
        _update(out, tuned=found)
        _check_same(plan)
        for arm, search in found.items():
            if search["best"] is None:
                warn(f"none of the {len(search['trials'])} trials of arm {arm} came to its end, so it has no runs: "
                     "choose another study.tune.space")  # fmt: skip
            elif search["edge"]:
                warn(f"the best trial of arm {arm} has {' and '.join(search['edge'])}: what is best may lie outside")
    return num_failed + run(plan)


def _searches(config: StudyConfig, trials: list[PlannedRun]) -> dict[str, Mapping[str, Any]]:
    assert config.study.tune is not None
    points = tuning.points(config.study.tune)
    found = {}
    for arm in config.arms:
        mine = [cell for cell in trials if cell.arm == arm.name]
        read = [tuning.read_trial(point, cell.folder) for point, cell in zip(points, mine, strict=True)]
        found[arm.name] = tuning.summary(config.study.tune, read, to_target=mine[0].config.train.stop_at_target)
    return found


def run_all(plan: list[PlannedRun], watch: StudyCallback, *, driver: bool, most: int | None = None) -> int:
    """Run what is not finished; the number of runs that failed. A run that fails or diverges does not stop the others.

    Args:
        plan: the runs.
        watch: told of every step.
        driver: whether this process prepares folders; under torchrun the other ranks only take part.
        most: runs at a time on a Ray cluster, if fewer than it has room for.
    """
    to_do = []
    for cell in plan:
        if status(cell) in run_folder.ENDED:
            watch.on_run_end(cell, "already there")
        else:
            to_do.append(cell)
    on_ray = [cell for cell in to_do if launchers.uses_ray(cell.config.launch)]
    num_failed = ray_runner.run_all(on_ray, watch, most) if on_ray else 0
    return num_failed + _one_by_one([cell for cell in to_do if cell not in on_ray], watch, driver=driver)


def _one_by_one(plan: list[PlannedRun], watch: StudyCallback, *, driver: bool) -> int:
    """On ranks that stay up from run to run."""
    num_failed = 0
    with contextlib.ExitStack() as stack:
        ranks: dict[str, Launcher] = {}  # by the settings they were started with
        for cell in plan:
            launch = cell.config.launch.model_dump_json()
            if launch not in ranks:
                ranks[launch] = stack.enter_context(
                    launchers.choose(cell.config.launch, many_runs=True, entry_point=ENTRY_POINT)
                )
            if driver:
                run_folder.prepare_folder(cell.folder, "run.json", resume=True)
            try:
                ranks[launch].run(cell.config, cell.folder, resume=True, progress=partial(watch.on_step, cell))
                watch.on_run_end(cell, status(cell))
            except (launchers.RankFailed, OutOfMemory) as error:
                if launchers.uses_torchrun(cell.config.launch):
                    if driver:
                        run_folder.close_abandoned(cell.folder, error)
                    raise  # the other ranks, which were not started here, have ended
                run_folder.close_abandoned(cell.folder, error)
                watch.on_run_end(cell, f"failed: {str(error).strip().splitlines()[-1]}")
                num_failed += 1
            except BaseException as error:
                if driver:
                    run_folder.close_abandoned(cell.folder, error)
                raise
    return num_failed


def conclude(out: Path, outcome: str, numbers: dict[str, Any], verdicts: Sequence[str] = ()) -> dict[str, Any]:
    """Write the study's last status, its headline numbers, and what it says in sentences; study.json as it is then."""
    return _update(out, status=outcome, ended=run_folder.now(), metrics=numbers, verdicts=[*verdicts])


def _update(out: Path, **news: Any) -> dict[str, Any]:
    info = run_folder.read_info(out / "study.json") | news
    run_folder.write_atomically(out / "study.json", json.dumps(info, indent=1))
    return info
