"""What the folders of runs need no more: old checkpoints, and spectra but those of the last hidden layer.

A run that has its result is compared, reported, copied and recognised by its study without them. Everything else stays:
runs that may still be continued, results, metrics, records, and whatever was not written by a run.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from gengap_dist.config.measures import OWN_BATCH, Cleanable
from gengap_dist.config.metric_key import LayerKey
from gengap_dist.errors import UsageError, first_of
from gengap_dist.runs import lease
from gengap_dist.runs.checkpoint_folder import FACTS, NAME, PART, describe_damage, read_facts, step_of
from gengap_dist.runs.run_folder import (
    describe_damage as describe_run_damage,
)
from gengap_dist.runs.run_folder import (
    dump_arrays,
    incomplete_file,
    is_spectra_name,
    load_layer_facts,
    load_spectra,
    read_info,
    read_study_info,
    write_atomically,
)
from gengap_dist.runs.schema import OF_STUDY, RunInfo, RunStatus, StudyInfo

WEIGHTS = "weights"  # folder of the spectra of weight matrices
PROBE_SETS = re.compile(rf"{OWN_BATCH}|n[0-9]+")  # folders of the spectra of other probe sets
CHECKPOINT_FILES = {FACTS, "model.pt", "optimizer.pt", "best.pt", "algorithm.pt", "run.pt"}


class Removal(NamedTuple):
    """A checkpoint, or a file of spectra, of which all or a part goes."""

    path: Path
    """Folder of the checkpoint, or the file."""
    num_bytes: int
    """That this frees."""
    kept: tuple[str, ...]
    """Keys of the layers that stay in a file of spectra."""
    files: tuple[tuple[str, int, int], ...]
    """Name, bytes and time of the last change (ns) of each of its files, when it was listed."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one, and no file of spectra."""
        return self.path.parent.name == "checkpoints"


class LeftAlone(NamedTuple):
    """Something that stays, and is not what one expects at its place, or would go but for a reason."""

    path: Path
    reason: str


class RunPlan(NamedTuple):
    """What goes of one run."""

    folder: Path
    num_bytes: int
    """Of all files in the folder, before anything goes."""
    layer: str | None = None
    """The last hidden layer, whose spectra stay."""
    last_checkpoint: str = ""
    """Name of the one that stays; empty if none does."""
    removals: tuple[Removal, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()

    @property
    def freed(self) -> int:
        """Bytes that are freed."""
        return sum(removal.num_bytes for removal in self.removals)


# -- which folders ----------------------------------------------------------------------------------------------------


def find_runs(folder: Path) -> tuple[list[Path], list[LeftAlone]]:
    """The folders of the runs in the folder of a study or run, and what else is where they should be.

    Raises:
        UsageError: if it is neither, or a comparison, or its study.json is damaged.
    """
    if not (folder / StudyInfo.file_name).exists():
        if (folder / RunInfo.file_name).exists():
            return [folder], []
        raise UsageError(
            f"FOLDER ({folder}) contains neither run.json nor study.json: give the folder of a run or study"
        )
    if read_study_info(folder).members is not None:
        raise UsageError(
            f"FOLDER ({folder}) is a comparison, whose runs are elsewhere: give the folder of a study or run"
        )
    runs, others = [], []
    for part in OF_STUDY:
        for arm in _entries(folder / part):
            others += [LeftAlone(Path(arm.path), "is a link")] * arm.is_symlink()
            for entry in _entries(Path(arm.path)):
                if entry.is_dir(follow_symlinks=False) and Path(entry.path, RunInfo.file_name).exists():
                    runs.append(Path(entry.path))
                elif entry.is_symlink() or entry.is_dir():
                    others.append(LeftAlone(Path(entry.path), "is no folder of a run"))
    if (folder / "damaged").is_dir():
        others.append(LeftAlone(folder / "damaged", "holds runs that were set aside: look at them yourself"))
    return runs, others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in the order of names; nothing if it is missing, or a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


# -- what goes --------------------------------------------------------------------------------------------------------


def plan_run(run: Path, kinds: Collection[Cleanable]) -> RunPlan:
    """What goes of a run; nothing is changed."""
    plan = RunPlan(run, _num_bytes(run))
    if reason := _needed_because(run):
        return plan._replace(left_alone=(LeftAlone(run, reason),))
    info = read_info(run)
    found: list[Removal | LeftAlone] = []
    if "checkpoints" in kinds or "all_checkpoints" in kinds:
        found += _checkpoints(run, info, keep_last="all_checkpoints" not in kinds)
    if "spectra" in kinds:
        found += _spectra(run, info)
    removals = tuple(each for each in found if isinstance(each, Removal))
    names = {entry.name for entry in _entries(run / "checkpoints") if NAME.fullmatch(entry.name)}
    kept = names - {removal.path.name for removal in removals}
    return plan._replace(
        layer=info.last_hidden_layer,
        last_checkpoint=max(kept, key=lambda name: step_of(Path(name)), default=""),
        removals=removals,
        left_alone=tuple(each for each in found if isinstance(each, LeftAlone)),
    )


def _needed_because(run: Path) -> str:
    """Why nothing of a run may go, as the rest of a sentence; empty: it has its result, and nobody writes to it."""
    if owner := lease.other_writer(run):
        return f"is being written by {owner}: wait until it has ended; if it was lost, repeat its command"
    if (run / RunInfo.file_name).is_symlink():
        return "has a link in the place of its run.json"
    try:
        info, damage = read_info(run), describe_run_damage(run)
    except UsageError as error:
        return f"cannot be read: {error}"
    if damage:
        return f"is damaged ({damage})"
    if not info.status.has_result:
        lost = ", or was lost" if info.status == RunStatus.RUNNING else ""
        return f"has not finished (status {info.status}{lost}): it continues from its checkpoints"
    return "was measured by gengap probe: its spectra are its result" if info.launcher == "probe" else ""


def _num_bytes(folder: Path) -> int:
    """The sum of the sizes of all files in a folder; links are not followed."""
    return sum(
        _num_bytes(Path(entry.path))
        if entry.is_dir(follow_symlinks=False)
        else entry.stat(follow_symlinks=False).st_size
        for entry in _entries(folder)
    )


def _checkpoints(run: Path, info: RunInfo, *, keep_last: bool) -> Iterator[Removal | LeftAlone]:
    """Checkpoints of this run, the oldest first, after those that a kill left incomplete."""
    folder, own = run / "checkpoints", list[Path]()
    if folder.is_symlink():
        yield LeftAlone(folder, "is a link")
    for entry in _entries(folder):
        path = Path(entry.path)
        named = NAME.fullmatch(entry.name) or PART.fullmatch(entry.name)
        if not named or not entry.is_dir(follow_symlinks=False):
            yield LeftAlone(path, "is no checkpoint of the run")
        elif foreign := [name for name, *_ in _files(path) if not _is_of_checkpoint(name, path)]:
            yield LeftAlone(path, f"holds something else, too ({first_of(foreign, 3)})")
        elif PART.fullmatch(entry.name):
            yield _removal_of_checkpoint(path)
        elif not _is_own_checkpoint(path, info.id):
            yield LeftAlone(path, f"is of another run, by its {FACTS}")
        else:
            own.append(path)
    own.sort(key=step_of)
    if keep_last and len(own) > 1 and (damage := describe_damage(own[-1])):
        yield LeftAlone(folder, f"needs its older checkpoints, because {own[-1].name} is damaged ({damage})")
    else:
        yield from map(_removal_of_checkpoint, own[:-1] if keep_last else own)


def _is_of_checkpoint(name: str, path: Path) -> bool:
    """Whether something in the folder of a checkpoint is a file of it, by its name and its type."""
    listed = read_facts(path).get("sha256")
    known = name in CHECKPOINT_FILES or (name.endswith(".pt") and isinstance(listed, dict) and name in listed)
    return known and (path / name).is_file() and not (path / name).is_symlink()


def _is_own_checkpoint(path: Path, run: str | None) -> bool:
    """Whether a checkpoint was written by the run with this id."""
    facts = read_facts(path)
    return (facts.get("step"), facts.get("run")) == (step_of(path), run) and isinstance(facts.get("sha256"), dict)


def _removal_of_checkpoint(path: Path) -> Removal:
    files = _files(path)
    return Removal(path, sum(size for _, size, _ in files), (), files)


def _files(path: Path) -> tuple[tuple[str, int, int], ...]:
    """See `Removal.files`: of what is in a folder, or of a file; links are not followed."""
    entries = {entry.name: entry.stat(follow_symlinks=False) for entry in _entries(path)}
    if not path.is_dir() or path.is_symlink():
        entries = {path.name: path.lstat()} if os.path.lexists(path) else {}
    return tuple((name, found.st_size, found.st_mtime_ns) for name, found in entries.items())


def _spectra(run: Path, info: RunInfo) -> Iterator[Removal | LeftAlone]:
    folder = run / "spectra"
    if folder.is_symlink():
        yield LeftAlone(folder, "is a link")
    if not (entries := _entries(folder)):
        return
    if info.last_hidden_layer is None:
        yield LeftAlone(folder, "stays, because run.json does not name the last hidden layer")
        return
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and (entry.name == WEIGHTS or PROBE_SETS.fullmatch(entry.name)):
            for inner in _entries(Path(entry.path)):
                yield from _spectra_of_file(inner, None if entry.name == WEIGHTS else info.last_hidden_layer)
        elif is_folder:
            yield LeftAlone(Path(entry.path), "is no folder of spectra of the run")
        else:
            yield from _spectra_of_file(entry, info.last_hidden_layer)


def _spectra_of_file(entry: os.DirEntry[str], layer: str | None) -> Iterator[Removal | LeftAlone]:
    """What goes of a file in which the spectra of `layer` stay; None: of all of it."""
    path = Path(entry.path)
    if not entry.is_file(follow_symlinks=False) or not is_spectra_name(incomplete_file(path) or entry.name):
        yield LeftAlone(path, "is no file of spectra of the run")
        return
    files = _files(path)
    size = files[0][1]
    if incomplete_file(path):
        yield Removal(path, size, (), files)
        return
    try:
        spectra = load_spectra(path)
    except UsageError as error:
        yield LeftAlone(path, f"is damaged: {error}")
        return
    kept = tuple(key for key in spectra if LayerKey.parse(key).layer == layer)
    if layer is not None and not kept:
        yield LeftAlone(path, f"has no spectrum of {layer}")
    elif len(kept) < len(spectra):
        freed = size - (len(_with_spectra_of(path, kept)) if kept else 0)
        if freed > 0:  # not of layers of a few units, beside what is written of all
            yield Removal(path, freed, kept, files)


def _with_spectra_of(path: Path, kept: Collection[str]) -> bytes:
    """The content of a file of spectra without the singular values of other layers; it still says what was measured."""
    spectra = load_spectra(path)
    return dump_arrays({key: spectra[key] for key in kept}, load_layer_facts(path))


# -- removal ----------------------------------------------------------------------------------------------------------


def remove(plan: RunPlan) -> tuple[int, list[LeftAlone]]:
    """Remove what a plan lists; returns the bytes freed, and what has changed since it was listed, which stays.

    A kill at any time leaves a folder that is complete without what has gone, and a later plan lists the rest.

    Raises:
        OSError: names what cannot be removed.
    """
    if not plan.removals:
        return 0, []
    try:
        with _as_only_writer(plan.folder):
            if reason := _needed_because(plan.folder):
                return 0, [LeftAlone(plan.folder, reason)]
            changed = [removal for removal in plan.removals if _files(removal.path) != removal.files]
            for removal in plan.removals:
                if removal not in changed:
                    (_remove_checkpoint if removal.is_checkpoint else _remove_spectra)(removal)
    except UsageError as error:  # another process was faster
        return 0, [LeftAlone(plan.folder, f"is not changed: {error}")]
    freed = plan.freed - sum(removal.num_bytes for removal in changed)
    return freed, [LeftAlone(removal.path, "has changed since it was listed") for removal in changed]


@contextmanager
def _as_only_writer(run: Path) -> Iterator[None]:
    """Context in which no other process writes to a run.

    Raises:
        UsageError: if one does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lease.holding(run, say=lambda text: None))
        except lease.NotWritable as error:
            if not error.disk_is_full:  # on a full disk nobody can write a lease, and this makes room
                raise
        yield


def _remove_checkpoint(removal: Removal) -> None:
    path = removal.path
    if not PART.fullmatch(path.name):
        path = path.rename(path.with_name(f".{path.name}.old.part"))  # from here on it is no checkpoint, damaged or not
    for name in sorted((name for name, *_ in removal.files), key=lambda name: name == FACTS):  # it lists the others
        (path / name).unlink()
    path.rmdir()


def _remove_spectra(removal: Removal) -> None:
    if removal.kept:
        write_atomically(removal.path, _with_spectra_of(removal.path, removal.kept))
    else:
        removal.path.unlink()
