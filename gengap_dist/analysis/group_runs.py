"""Runs from here and there as one study: which of them are one arm, and what the arms are called."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.analysis.study_data import EXPLANATIONS, MEASURED_AT, RunData, StudyData, read_study, tuned_in
from gengap_dist.config.identity import differing, effective, settings_of
from gengap_dist.errors import UsageError
from gengap_dist.runs import run_folder
from gengap_dist.runs.run_folder import read_info
from gengap_dist.tracking.mlflow.importer import SourceNames, find_runs, save_as_run_folder
from gengap_dist.tracking.mlflow.uploader import connect, store_uri

MOST_TOLD = 3  # settings in an arm's name
CURVES = ("train/loss", "val/accuracy", "val/loss", "epoch", MEASURED_AT)


class Source(NamedTuple):
    """A run folder, and what is known of it besides."""

    folder: Path
    arm: str = ""
    """What its study calls it."""
    tuned: frozenset[str] = frozenset()
    """Settings that its study has tuned."""
    is_baseline: bool = False
    """Whether its study compares others with it."""


def gather(
    sources: Sequence[str], out: Path, names: SourceNames, uri: str | None, question: str
) -> tuple[StudyData, list[str]]:
    """A study of the runs that `sources` name, and what was wrong with some.

    Args:
        sources: folders of runs or studies, or folders that hold some; `runs:/ID`, `experiments:/NAME`.
        out: the comparison's folder; runs from MLflow are kept in its `runs`.
        names: what runs from MLflow call things.
        uri: their store.
        question: for the head of the report.

    Raises:
        UsageError: if a source holds no run, all are unreadable, or none has a test accuracy.
    """
    problems: list[str] = []
    found: list[Source] = []
    for source in sources:
        given = _from_mlflow(source, out, names, uri) if ":/" in source else _on_disk(Path(source))
        known = {each.folder for each in found}
        found += [each for each in given if each.folder not in known]
    runs: list[RunData] = []
    for each in found:
        try:
            runs.append(_whole(each))
        except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{each.folder} is left out: it is no whole run folder ({error})")
    if not runs:
        raise UsageError(f"no run can be read from {', '.join(sources)}: give folders that hold a run.json")
    if not any(accuracy_of(run) is not None for run in runs):
        raise UsageError(
            f"none of the {len(runs)} runs has {names.accuracy}: say with --accuracy what they call test accuracy"
        )
    of = {source.folder: source for source in found}
    tuned = {name for run in runs for name in of[run.folder].tuned}
    arms = _arms(runs, tuned)
    baseline = min(arms, key=lambda arm: _first_choice(arms[arm], of))
    members, doubled = [], []
    for arm, of_arm in arms.items():
        for seed in sorted({run.seed for run in of_arm}):
            same = [run for run in of_arm if run.seed == seed]
            same.sort(key=lambda run: (run.info["status"] == run_folder.FINISHED, accuracy_of(run) is not None))
            doubled += [f"{arm}, seed {seed}"] if len(same) > 1 else []
            members.append(RunData(same[-1].folder, arm, same[-1].info))
    data = sorted({str(_of_data(run)) for run in runs})
    if len(data) > 1:
        problems.append(f"the runs are of different data ({', '.join(data)}): their accuracies are not comparable")
    if doubled:
        problems.append(f"several runs are the same arm and seed, of which one counts: {'; '.join(doubled)}")
    info = {
        "schema": 1,
        "status": run_folder.FINISHED,
        "name": out.name,
        "question": question,
        "baseline": baseline,
        "arms": list(arms),
        "seeds": sorted({run.seed for run in runs}),
        "tuned": {arm: {"best": dict.fromkeys(tuned)} for arm in arms} if tuned else {},
        "started": run_folder.now(),
        "command": sys.orig_argv,
        "config": {"sources": [str(source) for source in sources]},
        "versions": run_folder.versions(),
        "git": run_folder.git_state(),
        "members": [{"arm": run.arm, "folder": str(run.folder)} for run in members],
    }
    return StudyData(out, info["name"], question, baseline, list(arms), members, info), problems


def _of_data(run: RunData) -> object:
    return (run.info.get("data") or {}).get("name") or settings_of(run.info).get("data.name")


def _whole(source: Source) -> RunData:
    """A run that has what every comparison needs.

    Raises:
        UsageError: if it has not.
    """
    run = RunData(source.folder, source.arm, read_info(source.folder))
    accuracy, size, seed = accuracy_of(run), run.global_size, run.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not isinstance(size, int):
        raise UsageError(f"its seed ({seed}) and batch ({size}) are no whole numbers: mend its run.json")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise UsageError(f"its test accuracy ({accuracy}) is not a share of 1: mend its run.json")
    run.check()
    _ = run.info["status"], settings_of(run.info)
    return run


def accuracy_of(run: RunData) -> float | None:
    """Test accuracy of a run; None without."""
    return (run.info.get("result") or {}).get("test/accuracy")


def _first_choice(arm: Sequence[RunData], sources: Mapping[Path, Source]) -> tuple[bool, int, int]:
    """Smallest for the arm to compare with: a study's own baseline, else the smallest batch with the most results."""
    of_study = any(sources[run.folder].is_baseline for run in arm)
    return (not of_study, arm[0].global_size, -sum(run.info["status"] == run_folder.FINISHED for run in arm))


def _on_disk(folder: Path) -> Iterator[Source]:
    """Run folders at or below a folder; of studies, the runs that they compare."""
    folder = folder.resolve()
    studies = sorted(path.parent for path in folder.rglob("study.json"))
    loose = [
        path.parent
        for path in sorted(folder.rglob("run.json"))
        if not any(path.is_relative_to(study) for study in studies)
    ]
    if not loose and not studies:
        raise UsageError(f"RUN ({folder}) holds no run.json, nor does a folder below it: give the folder of a run")
    yield from (Source(path) for path in loose)
    for path in studies:
        study = read_study(path)
        tuned = tuned_in(study.info)
        for run in study.runs:
            yield Source(run.folder, run.arm, tuned, run.arm == study.baseline)


def _from_mlflow(source: str, out: Path, names: SourceNames, uri: str | None) -> Iterator[Source]:
    if not source.startswith(("runs:/", "experiments:/")):
        raise UsageError(f"RUN ({source}) is neither a folder nor an MLflow run: give runs:/ID or experiments:/NAME")
    address = store_uri(uri)
    try:
        client = connect(address)
        for run in find_runs(client, source):
            folder = out / "runs" / run.info.run_id
            wanted = [name for name in run.data.metrics if name in CURVES or EXPLANATIONS.fullmatch(name)]
            save_as_run_folder(client, run, folder, names, wanted)
            tags = run.data.tags
            tuned = frozenset(filter(None, tags.get("tuned", "").split(",")))
            yield Source(folder, tags.get("arm", ""), tuned, tags.get("role") == "baseline")
    except UsageError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"MLflow at {address} cannot be read ({text}): check --tracking_uri") from None


def _arms(runs: Iterable[RunData], tuned: Collection[str]) -> dict[str, list[RunData]]:
    """Runs of equal settings, but for the seed and what was tuned, under one name: their study's, or what differs."""
    groups: list[list[RunData]] = []
    for run in runs:
        group = next((group for group in groups if _alike(group[0], run, tuned)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    groups.sort(key=lambda group: group[0].global_size)
    out: dict[str, list[RunData]] = {}
    for group in groups:
        plain = group[0].arm or _name(group[0], groups[0][0])
        name, number = plain, 2
        while name in out:
            name, number = f"{plain} ({number})", number + 1
        out[name] = group
    return out


def _alike(one: RunData, other: RunData, tuned: Collection[str]) -> bool:
    apart = differing(settings_of(one.info), settings_of(other.info)) - set(tuned)
    return one.global_size == other.global_size and not apart and (not tuned or one.arm == other.arm)


def _name(run: RunData, first: RunData) -> str:
    """The batch, and what else differs from the first arm."""
    settings: dict[str, Any] = effective(settings_of(run.info))
    differs = sorted(differing(settings_of(run.info), settings_of(first.info)))
    told = [f"{name}={settings.get(name)}" for name in differs[:MOST_TOLD]]
    return " ".join([f"b{run.global_size}", *told, *(["..."] if len(differs) > MOST_TOLD else [])])
