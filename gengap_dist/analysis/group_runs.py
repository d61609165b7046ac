"""Combines runs from several places into one study: groups them into arms, and names the arms."""

import os
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.analysis.study_data import MEASURED_AT, RunData, StudyData, read_run, read_study, tuned_settings
from gengap_dist.config.file_names import file_name_problem
from gengap_dist.config.identity import complete_settings, counterpart_key, differing_settings, effective_settings
from gengap_dist.config.loading import flat, user_path
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.config.sections import AlgorithmConfig
from gengap_dist.credentials import command_line, without_logins
from gengap_dist.errors import UsageError, first_of
from gengap_dist.runs import run_folder
from gengap_dist.runs.links import check_links
from gengap_dist.runs.metric import value_on_test
from gengap_dist.runs.mixtures import changed_data, different_kinds
from gengap_dist.runs.schema import RunInfo, RunStatus, StudyInfo, StudyMember
from gengap_dist.tracking.mlflow.client import connect_client, describe, store_uri
from gengap_dist.tracking.mlflow.importer import SourceNames, find_runs, save_as_run_folder

LOOKS = ("looks", "may_extend")  # settings of a study that say when it is judged
OF_RUN = ("checkpoints", "spectra")  # folders in the folder of a run
MAX_NAMED_SETTINGS = 3  # in an arm's name
CURVES = (  # of runs in MLflow
    "train/loss", "train/lr", "val/accuracy", "val/loss", "probe/accuracy", "probe/loss", "epoch", MEASURED_AT,
)  # fmt: skip


class Source(NamedTuple):
    """A run folder, and what its study says about it."""

    folder: Path
    arm: str = ""
    """The arm's name in its study; empty without a study."""
    tuned: frozenset[str] = frozenset()
    """Settings tuned by its study."""
    is_baseline: bool = False
    """Whether it belongs to its study's baseline."""
    study: StudyData | None = None
    run: RunData | None = None
    """What was read of it with its study."""


class Declaration(NamedTuple):
    """How the runs of a comparison are judged, from the studies that they belong to."""

    settings: Mapping[str, Any] = {}
    """Of the section study."""
    question: str = ""
    fields: Mapping[str, Any] = {}
    """Others of study.json."""
    problems: Sequence[str] = ()
    """One sentence each."""


def _declaration(sources: Iterable[Source]) -> Declaration:
    """What the studies of all sources declared before they were judged.

    A comparison must not be a way around it: runs are judged at the looks of their study, also if only some of them are
    given or others are added; where studies declare different looks, or a run of theirs has not ended, nothing is
    judged. The margin is theirs if it is the same, else the default. Of a single study, question and registration are
    kept, too.
    """
    studies: dict[Path, StudyData] = {}
    arms: dict[Path, set[str]] = {}
    for source in sources:
        if source.study:
            studies[source.study.folder] = source.study
            arms.setdefault(source.study.folder, set()).add(source.arm)
    if not studies:
        return Declaration()
    looks = [{name: study.declared.get(name) for name in LOOKS} for study in studies.values()]
    tolerances = [study.tolerance for study in studies.values()]
    problems = []
    if any(tolerance != tolerances[0] for tolerance in tolerances):
        problems = ["the studies declare different margins (study.tolerance): the default is used"]
        tolerances = [None]
    judged = [seeds for study in studies.values() for seeds in study.info.get("judged") or []]
    fields: dict[str, Any] = {"judged": [seeds for at, seeds in enumerate(judged) if seeds not in judged[:at]]}
    unfinished = [
        f"{arm}, seed {seed}"
        for folder, study in studies.items()
        for arm, seed in study.unfinished
        if arm in arms[folder]
    ]
    if any(each != looks[0] for each in looks):
        fields["not_judged"] = "The studies of these runs declared different looks: nothing is judged."
    elif unfinished:
        fields["not_judged"] = f"Runs of the studies have not ended ({first_of(unfinished, 3)}): nothing is judged."
    question = ""
    if len(studies) == 1:
        (study,) = studies.values()
        question, registration = study.question, study.info.get("registration")
        fields |= {"registration": registration} if registration else {}
    return Declaration({"tolerance": tolerances[0], **looks[0]}, question, fields, problems)


def gather(
    sources: Sequence[str], out: Path, names: SourceNames, uri: str | None, question: str, *, across: bool = False
) -> tuple[StudyData, list[str]]:
    """A study of the runs in `sources`, and one sentence for each problem found.

    Args:
        sources: folders of runs or studies, or folders that contain some; `runs:/ID`, `experiments:/NAME`.
        out: the comparison's folder; runs from MLflow are stored in its `runs`.
        names: names of metrics and parameters in MLflow.
        uri: the MLflow store.
        question: printed at the head of the report.
        across: also compare runs of different data or networks; the report then says so.

    Raises:
        UsageError: if a source contains no run, all runs are unreadable, none has its metric on the test samples, or,
            without `across`, data or networks differ.
    """
    problems: list[str] = []
    of: dict[Path, Source] = {}
    studies: dict[Path, StudyData] = {}  # that have been read, by folder
    for source in sources:
        for each in _from_mlflow(source, out, names, uri) if ":/" in source else _on_disk(user_path(source), studies):
            of.setdefault(each.folder, each)
    problems += [f"{folder}: {text}" for folder, study in studies.items() for text in study.left_out]
    runs: list[RunData] = []
    for each in of.values():
        try:
            runs.append(_checked_run(each))
        except UsageError as error:
            problems.append(f"{each.folder} is left out: {error}")
    if not runs:
        raise UsageError(f"no run can be read from {', '.join(sources)}: give folders that hold a run.json")
    if not any(value_on_test(run.info) is not None for run in runs):
        raise UsageError(
            f"none of the {len(runs)} runs has {names.accuracy}: give the name of their test accuracy with --accuracy"
        )
    tuned = {name for run in runs for name in of[run.folder].tuned}
    is_one_study = len(studies) == 1 and all(of[run.folder].study for run in runs)
    arms = _arms(runs, tuned, sort=not is_one_study)
    baseline = min(arms, key=lambda arm: _baseline_order(arms[arm], of))
    members, duplicates = [], []
    for arm, of_arm in arms.items():
        for seed in sorted({run.seed for run in of_arm}):
            same_seed = [run for run in of_arm if run.seed == seed]
            same_seed.sort(
                key=lambda run: (run.info["status"] == RunStatus.FINISHED, value_on_test(run.info) is not None)
            )
            duplicates += [f"{arm}, seed {seed}"] if len(same_seed) > 1 else []
            members.append(same_seed[-1].in_arm(arm))
    labels = {str(run.folder): run.info for run in runs}
    if (mixed := [*different_kinds(labels), *changed_data(labels)]) and not across:
        raise UsageError(
            f"{'; '.join(mixed[:3])}: their results are no pairs; give runs of one kind, or add --across to compare "
            "them all the same"
        )
    problems += mixed
    if duplicates:
        problems.append(
            f"several runs have the same arm and seed, and only one of them is used: {'; '.join(duplicates)}"
        )
    declared = _declaration(of[run.folder] for run in runs)
    problems += declared.problems
    question = question or declared.question
    info = StudyInfo(
        status=RunStatus.FINISHED,
        name=out.name,
        question=question,
        baseline=baseline,
        arms=list(arms),
        seeds=sorted({run.seed for run in runs}),
        tuned={arm: {"best": dict.fromkeys(tuned)} for arm in arms} if tuned else {},
        started=run_folder.now(),
        command=command_line(),
        config={
            "sources": [str(source) for source in sources],
            **({"study": declared.settings} if declared.settings else {}),
            **({"across": mixed} if mixed else {}),
        },
        versions=run_folder.versions(),
        git=run_folder.git_state(),
        members=[StudyMember(arm=run.arm, folder=str(run.folder)) for run in members],
        **declared.fields,
    )
    return StudyData(out, info.name, question, baseline, list(arms), members, info.content()), problems


def _checked_run(source: Source) -> RunData:
    """Read a run and check that it has what a comparison needs.

    Raises:
        UsageError: if it does not.
    """
    user_path(source.folder)  # it is recorded in study.json
    if not (run := source.run):
        run = read_run(source.folder, source.arm)
        run.check()
    value = value_on_test(run.info)
    if value is not None and run.metric.unit == "share" and not 0 <= value <= 1:
        raise UsageError(f"its test {run.metric.name} ({value}) is not between 0 and 1: correct its run.json")
    return run


def _baseline_order(arm: Sequence[RunData], sources: Mapping[Path, Source]) -> tuple[bool, bool, int, int]:
    """Sort key, smallest for the baseline: a study's own baseline, else the smallest batch with the most results.

    An arm with an algorithm, such as a penalty, comes after those without.
    """
    of_study = any(sources[run.folder].is_baseline for run in arm)
    plain, settings = flat(AlgorithmConfig()), arm[0].info["config"].get("algorithm", {})
    treated = any(plain.get(name) != value for name, value in flat(settings).items())
    num_finished = sum(run.info["status"] == RunStatus.FINISHED for run in arm)
    return (not of_study, treated, arm[0].global_size, -num_finished)


def _on_disk(folder: Path, known: dict[Path, StudyData]) -> Iterator[Source]:
    """Run folders at or below a folder; for a study, the runs that it compares.

    Studies that have been read are in `known`, and those that are read now are added.
    """
    folder = folder.resolve()
    studies, runs = _studies_and_runs(folder)
    loose = [path for path in runs if not studies & {path, *path.parents}]
    if not loose and not studies:
        raise UsageError(f"RUN ({folder}) contains no run.json, nor does any folder below it: give the folder of a run")

    def study_in(path: Path) -> StudyData:
        if path not in known:
            check_links(path, unread=("checkpoints",))
            known[path] = read_study(path)
        return known[path]

    for path in loose:
        check_links(path, unread=("checkpoints",))
        parent = _study_folder(path)
        yield _of_study(path, path.parent.name, study_in(parent)) if parent else Source(path)
    for study in map(study_in, sorted(studies)):
        for run in (run for arm in study.arms for run in study.runs_of(arm)):
            yield _of_study(run.folder, run.arm, study)._replace(run=run)


def _studies_and_runs(folder: Path) -> tuple[set[Path], list[Path]]:
    """Study folders and run folders at or below a folder, the latter sorted.

    Folders that vanish meanwhile are left out, and those in which a run that trains makes and removes files are not
    entered.
    """
    studies, runs = set[Path](), []
    for name, below, files in os.walk(folder):
        path = Path(name)
        if StudyInfo.file_name in files and (path / StudyInfo.file_name).is_file():
            studies.add(path)
        if RunInfo.file_name in files and (path / RunInfo.file_name).is_file():
            runs.append(path)
            below[:] = [each for each in below if each not in OF_RUN]
    return studies, sorted(runs)


def _study_folder(run: Path) -> Path | None:
    """The folder of the study that a run folder is in; None if it is in none."""
    if len(run.parents) > 2 and run.parents[1].name == "runs" and (run.parents[2] / StudyInfo.file_name).exists():
        return run.parents[2]
    return None


def _of_study(run: Path, arm: str, study: StudyData) -> Source:
    return Source(run, arm, tuned_settings(study.info), arm == study.baseline, study)


def _from_mlflow(source: str, out: Path, names: SourceNames, uri: str | None) -> Iterator[Source]:
    if not source.startswith(("runs:/", "experiments:/")):
        raise UsageError(f"RUN ({source}) is neither a folder nor an MLflow run: give runs:/ID or experiments:/NAME")
    address = store_uri(uri)
    shown = without_logins(address)
    try:
        client = connect_client(address)
        for run in find_runs(client, source):
            if problem := file_name_problem(run.info.run_id):  # a server may send anything
                raise UsageError(f"the id of a run ({run.info.run_id!r:.60}) {problem}: ask who runs this server")
            folder = out / "runs" / run.info.run_id
            save_as_run_folder(client, run, folder, names, _is_compared)
            tags = run.data.tags
            tuned = frozenset(filter(None, tags.get("tuned", "").split(",")))
            yield Source(folder, tags.get("arm", ""), tuned, tags.get("role") == "baseline")
    except UsageError:
        raise
    except Exception as error:
        reason = describe(error)[:300]
        raise UsageError(f"MLflow at {shown} cannot be read ({reason}): check --mlflow.tracking_uri") from None


def _is_compared(name: str) -> bool:
    return name in CURVES or MetricKey.parse(name).known.is_explanation


def _arms(runs: Iterable[RunData], tuned: Collection[str], *, sort: bool) -> dict[str, list[RunData]]:
    """Runs by arm: equal settings except the seed and what was tuned; named by the study, or by what differs.

    In the order of the runs, or by batch size.
    """
    by_key: dict[Hashable, list[RunData]] = {}
    for run in runs:
        key = counterpart_key(complete_settings(run.info["config"]), tuned), run.arm if tuned else ""
        by_key.setdefault(key, []).append(run)
    groups = [*by_key.values()]
    if sort:
        groups.sort(key=lambda group: group[0].global_size)
    out: dict[str, list[RunData]] = {}
    for group in groups:
        base_name = group[0].arm or _name(group[0], groups[0][0])
        name, number = base_name, 2
        while name in out:
            name, number = f"{base_name} ({number})", number + 1
        out[name] = group
    return out


def _name(run: RunData, first: RunData) -> str:
    """The batch size, and the other settings that differ from the first arm."""
    own, others = complete_settings(run.info["config"]), complete_settings(first.info["config"])
    settings, differs = effective_settings(own), sorted(differing_settings(own, others))
    shown = [f"{name}={settings.get(name)}" for name in differs[:MAX_NAMED_SETTINGS]]
    return " ".join([f"b{run.global_size}", *shown, *(["..."] if len(differs) > MAX_NAMED_SETTINGS else [])])
