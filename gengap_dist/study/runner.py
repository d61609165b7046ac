"""Runs a study: tuning trials or searches of strengths, then every arm with every seed; finished runs are skipped.

The state of a study is the state of its run folders, so an interrupted study continues from them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist.config.identity import differences
from gengap_dist.config.study import StudyConfig
from gengap_dist.credentials import command_line
from gengap_dist.distributed import launchers
from gengap_dist.distributed.cores import available_cores
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.errors import UsageError
from gengap_dist.runs import run_folder
from gengap_dist.runs.schema import OF_STUDY, NewerSchema, RunStatus, StudyInfo
from gengap_dist.study import matching, ray_runner, run_matrix, tuning
from gengap_dist.study.core_wait import CoreWaitWarning
from gengap_dist.study.data_check import DataCheck
from gengap_dist.study.means import MeansCallback, update_means
from gengap_dist.study.packing import longest_first, run_packed
from gengap_dist.study.registration import continued, registration
from gengap_dist.study.run_matrix import PlannedRun, StudyCallback, first_configs
from gengap_dist.training import ENTRY_POINT

Warn = Callable[[str], None]
"""Function called with a warning, one sentence."""


def prepare(config: StudyConfig, out: Path, warn: Warn, sources: Sequence[Path] = ()) -> None:
    """Write study.json, or continue the study in `out`; damaged runs are moved to `out`/damaged.

    Args:
        config: the study.
        out: its folder.
        warn: called with each warning.
        sources: the files that `config` was read from.

    Raises:
        UsageError: if an arm is not valid, or if runs or a study in `out` have other settings.
    """
    _first_runs(config, out)
    check_concurrent(config)
    previous = _read_previous(out, warn)
    if previous and previous.name != config.study.name:
        raise UsageError(
            f"--out ({out}) contains the study {previous.name}, not {config.study.name}: choose another folder"
        )
    if previous and previous.question != config.study.question:
        warn(f"study.question has changed since {out} was created ({previous.question}): the report has the new one")
    folders = sorted([path for part in OF_STUDY for path in out.glob(f"{part}/*/*")])
    for folder in folders:
        if damage := run_folder.describe_damage(folder):
            moved_to = run_folder.quarantine(folder, out / "damaged")
            warn(f"{folder} is damaged ({damage}): moved to {moved_to}; it is run again if it belongs to this study")
    _check_same_settings(_first_runs(config, out))
    for name in ("tune", "match"):
        before = previous.config.get("study", {}).get(name) if previous else None
        section = getattr(config.study, name)
        now = section.model_dump(mode="json") if section else None
        if previous and before != now and any(out.glob("runs/*/*/run.json")):
            raise UsageError(
                f"study.{name} has changed since the runs in {out} were made: choose another --out, or restore "
                f"study.{name}"
            )
    arms = [arm.name for arm in config.arms]
    for folder in sorted(out.glob("runs/*")):
        if folder.name not in arms:
            warn(f"{folder} belongs to no arm of this study: it is kept, but not in the report")
    begun = any((folder / "run.json").exists() for folder in folders)  # those that are damaged are elsewhere now
    info = StudyInfo(
        status=RunStatus.RUNNING,
        name=config.study.name,
        question=config.study.question,
        baseline=config.baseline,
        arms=arms,
        twins=config.duplicates,
        seeds=list(config.study.seeds),
        started=(previous and previous.started) or run_folder.now(),
        command=command_line(),
        config=config.model_dump(mode="json"),
        versions=run_folder.versions(),
        git=run_folder.git_state(),
        judged=previous.judged if previous else [],
        declared=previous.declared if previous else None,
        registration=continued(previous.registration if previous and begun else None, registration(config, sources)),
    )
    run_folder.write_info(out, info)


def check_concurrent(config: StudyConfig) -> None:
    """Refuse more runs at once than this machine, or the launcher, can do.

    Raises:
        UsageError: names study.concurrent.
    """
    concurrent, launch = config.study.concurrent, config.launch
    if concurrent in ("auto", 1) or launchers.uses_ray(launch):
        return
    if launchers.uses_torchrun(launch):
        raise UsageError(
            f"study.concurrent ({concurrent}) is not possible on the ranks of torchrun, which execute one run after "
            "another: choose study.concurrent=1 or auto, or start the study without torchrun"
        )
    cores, needed = available_cores(), concurrent * launch.num_processes
    if needed > cores.number:
        raise UsageError(
            f"study.concurrent ({concurrent}) runs of launch.num_processes ({launch.num_processes}) rank(s) need "
            f"{needed} cores, and this program may use {cores.number:g} ({cores.source}): choose at most "
            f"{max(1, int(cores.number) // launch.num_processes)}, or auto"
        )


def _read_previous(out: Path, warn: Warn) -> StudyInfo | None:
    path = out / "study.json"
    try:
        return run_folder.read_study_info(out) if path.exists() else None
    except NewerSchema:
        raise
    except UsageError:
        warn(f"{path} is damaged: it is written again, and only the time of the first start is lost")
        return None


def _first_runs(config: StudyConfig, out: Path) -> list[PlannedRun]:
    """Runs whose settings do not depend on what is not known yet; all arms are checked.

    Raises:
        UsageError: if an arm is not valid.
    """
    if config.study.match:
        run_matrix.planned_runs(config, out, {})
        return matching.read_searches(config, out, status)[1]
    return _trials(config, out) or run_matrix.planned_runs(config, out, {})


def _trials(config: StudyConfig, out: Path) -> list[PlannedRun]:
    return run_matrix.planned_trials(config, out, tuning.points(config.study.tune)) if config.study.tune else []


def _check_same_settings(plan: list[PlannedRun]) -> None:
    for planned in plan:
        if not status(planned):
            continue
        if changed := differences(run_folder.read_info(planned.folder).config, planned.config):
            raise UsageError(
                f"{changed} when {planned.arm}/{planned.folder.name} was run in {planned.folder}: "
                "choose a new --out, or remove that run's folder"
            )


def status(planned: PlannedRun) -> RunStatus | None:
    """Status of a run from its run.json; None if it has not started or its folder is damaged."""
    intact = (planned.folder / "run.json").exists() and not run_folder.describe_damage(planned.folder)
    return run_folder.read_info(planned.folder).status if intact else None


def num_runs(config: StudyConfig) -> int:
    """Number of trials and runs of a study; of study.match the largest."""
    each = len(config.study.seeds) + (config.study.tune.trials if config.study.tune else 0)
    match = config.study.match
    return len(config.arms) * each + (2 + len(match.arms) * match.max_runs if match else 0)


def run_study(
    config: StudyConfig,
    out: Path,
    callback: StudyCallback,
    *,
    driver: bool,
    warn: Warn = lambda text: None,
    dry_run: bool = False,
) -> int:
    """Run the trials, then the runs that are not finished; returns the number of runs that failed.

    Every arm is checked against its data and its network before the first run. Means over seeds are written when all
    runs of an arm have ended.

    Args:
        config: the study.
        out: its folder, after `prepare`.
        callback: called on every step and at the end of every run.
        driver: whether this process prepares folders; under torchrun the other ranks only execute the runs.
        warn: called with each warning.
        dry_run: check the arms and measure what their runs cost, and execute none; `prepare` is not needed.

    Raises:
        UsageError: names the first arm whose runs would be refused.
    """
    if dry_run:
        return _run_study(config, out, callback, driver=True, warn=warn, dry_run=True)
    if not driver:
        return _run_study(config, out, callback, driver=False, warn=warn)
    num_failed = _run_study(config, out, MeansCallback(callback, out), driver=True, warn=warn)
    for problem in update_means(out):
        warn(problem)
    return num_failed


def _run_study(
    config: StudyConfig, out: Path, callback: StudyCallback, *, driver: bool, warn: Warn, dry_run: bool = False
) -> int:
    callback = CoreWaitWarning(DataCheck(callback), warn) if driver else callback
    settings = {"driver": driver, "concurrent": config.study.num_at_once, "warn": warn}
    if dry_run:
        untuned = config.model_copy(update={"study": config.study.model_copy(update={"tune": None})})
        later = run_matrix.planned_runs(untuned, out, {}) if config.study.tune or config.study.match else []
        return run_all(_first_runs(config, out), callback, **settings, later=later, dry_run=True)
    run = partial(run_all, callback=callback, **settings)
    if config.study.match:
        return _run_matched(config, out, run, driver=driver, warn=warn)
    if not config.study.tune:
        return run(run_matrix.planned_runs(config, out, {}))
    trials = _trials(config, out)
    # a failed trial is retried until the runs of its arm have started: all of them must have the same settings
    arms_with_runs = {arm.name for arm in config.arms if (out / "runs" / arm.name).exists()}
    num_failed = run(
        [planned for planned in trials if planned.arm not in arms_with_runs or status(planned) != RunStatus.FAILED],
        later=run_matrix.planned_runs(config, out, {}),
    )
    searches = _summarise_trials(config, trials)
    tuned = {arm: search["best"] for arm, search in searches.items() if search["best"] is not None}
    plan = run_matrix.planned_runs(config, out, tuned)
    if driver:
        _update(out, tuned=searches)
        _check_same_settings(plan)
        for arm, search in searches.items():
            if search["best"] is None:
                warn(f"none of the {len(search['trials'])} trials of arm {arm} finished, so it has no runs: "
                     "choose another study.tune.space")  # fmt: skip
            elif search["edge"]:
                warn(f"the best trial of arm {arm} has {' and '.join(search['edge'])}: the optimum may be outside")
    return num_failed + run(plan)


def _run_matched(config: StudyConfig, out: Path, run: Callable[..., int], *, driver: bool, warn: Warn) -> int:
    """Find the strengths of study.match, then run the seeds; returns the number of failed runs."""
    num_failed, started = 0, set[Path]()
    later = run_matrix.planned_runs(config, out, {})
    while True:
        searches, planned = matching.read_searches(config, out, status)
        new = [each for each in planned if each.folder not in started]
        if num_failed or not new:
            break
        num_failed = run(new, later=later)
        started |= {each.folder for each in new}
    tuned = {arm: settings for search in searches for arm, settings in search.settings(config).items()}
    unknown = {
        arm for search in searches if search.next is not None for arm in (search.match.arm, *search.match.shared)
    }
    plan = [each for each in run_matrix.planned_runs(config, out, tuned) if each.arm not in unknown]
    if driver:
        _update(out, matched={search.match.arm: search.summary() for search in searches})
        _check_same_settings(plan)
        for search in searches:
            if search.problem:
                remedy = "choose another study.match.low, high or max_runs" if search.tries else "its strength stays"
                warn(f"arm {search.match.arm} {search.problem}: {remedy}")
    return num_failed + run(plan)


def _summarise_trials(config: StudyConfig, trials: list[PlannedRun]) -> dict[str, Mapping[str, Any]]:
    assert config.study.tune is not None
    points = tuning.points(config.study.tune)
    searches = {}
    for arm in config.arms:
        of_arm = [planned for planned in trials if planned.arm == arm.name]
        results = [tuning.read_trial(point, planned.folder) for point, planned in zip(points, of_arm, strict=True)]
        searches[arm.name] = tuning.summary(config.study.tune, results, to_target=of_arm[0].config.train.stop_at_target)
    return searches


def run_all(
    plan: list[PlannedRun],
    callback: StudyCallback,
    *,
    driver: bool,
    concurrent: int | None = None,
    warn: Warn,
    later: Sequence[PlannedRun] = (),
    dry_run: bool = False,
) -> int:
    """Check all arms, then run what is not finished; returns the number of failed runs.

    A failed or diverged run does not stop the others.

    Args:
        plan: the runs.
        callback: called on every step and at the end of every run.
        driver: whether this process prepares folders; under torchrun the other ranks only execute the runs.
        concurrent: number of runs at once; None: as it ends soonest.
        warn: called with each warning.
        later: the runs that come after these, for the forecast of the time left.
        dry_run: check and measure the runs, and execute none.
    """
    to_do, arms = [], first_configs([*plan, *later])
    for planned in plan:
        if (known := status(planned)) and known.has_result:
            if not dry_run:
                callback.on_run_end(planned, "already there")
        else:
            to_do.append(planned)
    on_ray = [planned for planned in to_do if launchers.uses_ray(planned.config.launch)]
    on_torchrun = [planned for planned in to_do if launchers.uses_torchrun(planned.config.launch)]
    if driver and (on_ray or on_torchrun):
        from gengap_dist.training.arm_check import check_arms

        callback.on_checked(check_arms(arms, RuntimeContext(), data_here=not on_ray))
    if dry_run and (on_ray or on_torchrun):
        return 0
    num_failed = ray_runner.run_all(longest_first(on_ray, warn), callback, concurrent) if on_ray else 0
    _run_on_torchrun(on_torchrun, callback, driver=driver)
    here = [planned for planned in to_do if planned not in on_ray and planned not in on_torchrun]
    if not here:
        return num_failed
    later = [planned for planned in later if not ((known := status(planned)) and known.has_result)]
    return num_failed + run_packed(here, callback, concurrent, warn, later, arms=arms, dry_run=dry_run)


def _run_on_torchrun(plan: list[PlannedRun], callback: StudyCallback, *, driver: bool) -> None:
    """Execute the runs one after another on the ranks to which this process belongs.

    Raises:
        RankFailed: if a rank failed: the others have ended, and cannot be started again here.
    """
    if not plan:
        return
    with launchers.choose(plan[0].config.launch, many_runs=True, entry_point=ENTRY_POINT) as ranks:
        for planned in plan:
            if driver:
                run_folder.prepare_folder(planned.folder, "run.json", resume=True)
            try:
                on_step = partial(callback.on_step, planned)
                ranks.run(planned.config, planned.folder, resume=True, progress=on_step)
                callback.on_run_end(planned, status(planned) or "")
            except BaseException as error:
                if driver:
                    run_folder.close_abandoned(planned.folder, error)
                raise


def conclude(out: Path, outcome: RunStatus, numbers: dict[str, Any], verdicts: Sequence[str] = ()) -> StudyInfo:
    """Write the final status, metrics and verdicts of the study; returns the content of study.json.

    With verdicts the study was judged: its seeds are added to the looks, unless the last look had the same.
    """
    info = run_folder.read_study_info(out)
    section = info.config.get("study", {})
    declared = {name: section.get(name) for name in ("looks", "may_extend")}
    looked = [info.seeds] if verdicts and info.judged[-1:] != [info.seeds] else []
    return _update(
        out,
        status=outcome,
        ended=run_folder.end_time(info),
        metrics=numbers,
        verdicts=[*verdicts],
        judged=[*info.judged, *looked],
        declared=info.declared or (declared if looked else None),
    )


def _update(out: Path, **news: Any) -> StudyInfo:
    info = run_folder.read_study_info(out).with_fields(**news)
    run_folder.write_info(out, info)
    return info
