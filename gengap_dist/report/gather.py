"""Runs from here and there as one study: which of them are one arm, and what the arms are called."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gengap_dist.comparison.roles import differing, effective
from gengap_dist.config import UsageError
from gengap_dist.report.collect import EXPLANATIONS, RunData, StudyData, read_run, settings_of
from gengap_dist.tracking import record
from gengap_dist.tracking.mirror import store_uri
from gengap_dist.tracking.mlflow_source import Names, connect, find, save

MOST_TOLD = 3  # settings in an arm's name
CURVES = ("train/loss", "val/accuracy", "val/loss", "epoch", "probe_seconds/near_rank_loss")


def gather(
    sources: Sequence[str], out: Path, names: Names, uri: str | None, question: str
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
    folders: list[Path] = []
    for source in sources:
        found = _from_mlflow(source, out, names, uri) if ":/" in source else _on_disk(Path(source))
        folders += [folder for folder in found if folder not in folders]
    runs: list[RunData] = []
    for folder in folders:
        try:
            run = read_run(folder)
            _ = run.lines, run.seed, run.global_size  # what every comparison needs can be read
            runs.append(run)
        except (UsageError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{folder} is left out: it is no whole run folder ({error})")
    if not runs:
        raise UsageError(f"no run can be read from {', '.join(sources)}: give folders that hold a run.json")
    if not any("test/accuracy" in (run.info.get("result") or {}) for run in runs):
        raise UsageError(
            f"none of the {len(runs)} runs has {names.accuracy}: say with --accuracy what they call test accuracy"
        )
    arms = _arms(runs)
    baseline = min(arms, key=lambda arm: (arms[arm][0].global_size, -len(arms[arm])))
    members = [RunData(run.folder, arm, run.info) for arm, of_arm in arms.items() for run in of_arm]
    data = sorted({str(_of_data(run)) for run in runs})
    if len(data) > 1:
        problems.append(f"the runs are of different data ({', '.join(data)}): their accuracies are not comparable")
    doubled = sorted({f"{run.arm}, seed {run.seed}" for run in members if _twice(run, members)})
    if doubled:
        problems.append(f"several runs are the same arm and seed, of which the last counts: {'; '.join(doubled)}")
    info = {
        "schema": 1,
        "status": record.FINISHED,
        "name": out.name,
        "question": question,
        "baseline": baseline,
        "arms": list(arms),
        "seeds": sorted({run.seed for run in runs}),
        "started": record.now(),
        "command": sys.orig_argv,
        "config": {"sources": [str(source) for source in sources]},
        "versions": record.versions(),
        "git": record.git_state(),
        "members": [{"arm": run.arm, "folder": str(run.folder)} for run in members],
    }
    return StudyData(out, info["name"], question, baseline, list(arms), members, info), problems


def _of_data(run: RunData) -> object:
    return (run.info.get("data") or {}).get("name") or settings_of(run.info).get("data.name")


def _twice(run: RunData, runs: Sequence[RunData]) -> bool:
    return sum((other.arm, other.seed) == (run.arm, run.seed) for other in runs) > 1


def _on_disk(folder: Path) -> Iterator[Path]:
    """Run folders at or below a folder."""
    folder = folder.resolve()
    found = [folder] if (folder / "run.json").exists() else sorted(path.parent for path in folder.rglob("run.json"))
    if not found:
        raise UsageError(f"RUN ({folder}) holds no run.json, nor does a folder below it: give the folder of a run")
    yield from found


def _from_mlflow(source: str, out: Path, names: Names, uri: str | None) -> Iterator[Path]:
    if not source.startswith(("runs:/", "experiments:/")):
        raise UsageError(f"RUN ({source}) is no folder and no MLflow run: give runs:/ID or experiments:/NAME")
    address = store_uri(uri)
    try:
        client = connect(address)
        for run in find(client, source):
            folder = out / "runs" / run.info.run_id
            wanted = [name for name in run.data.metrics if name in CURVES or EXPLANATIONS.fullmatch(name)]
            save(client, run, folder, names, wanted)
            yield folder
    except UsageError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"MLflow at {address} cannot be read ({text}): check --tracking_uri") from None


def _arms(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Runs of equal settings, but for the seed, under one name: that of their study's arm, or what tells them apart."""
    groups: list[list[RunData]] = []
    for run in runs:
        same = (group for group in groups if _alike(group[0], run))
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    groups.sort(key=lambda group: group[0].global_size)
    out: dict[str, list[RunData]] = {}
    for group in groups:
        plain = _name(group[0], groups[0][0])
        name, number = plain, 2
        while name in out:
            name, number = f"{plain} ({number})", number + 1
        out[name] = group
    return out


def _alike(one: RunData, other: RunData) -> bool:
    return one.global_size == other.global_size and not differing(settings_of(one.info), settings_of(other.info))


def _name(run: RunData, first: RunData) -> str:
    """The name of the arm in its study; else the batch, and what else differs from the first arm."""
    if run.folder.parent.parent.name == "runs" and run.folder.name.startswith("seed"):
        return run.folder.parent.name
    settings: dict[str, Any] = effective(settings_of(run.info))
    differs = sorted(differing(settings_of(run.info), settings_of(first.info)))
    told = [f"{name}={settings.get(name)}" for name in differs[:MOST_TOLD]]
    return " ".join([f"b{run.global_size}", *told, *(["..."] if len(differs) > MOST_TOLD else [])])
