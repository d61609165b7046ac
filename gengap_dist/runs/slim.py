"""Slim copies of studies and runs: what comparisons need, small enough to be published with a result.

    OUT/study.json
    OUT/{runs,match,tune}/ARM/RUN/run.json         as it was, without folders of the machine
                                  metrics.npz      all metrics, compressed; there is no metrics.jsonl
                                  test_correct.npy
                                  spectra/         of the last hidden layer, at the first and the last measurement
    OUT/SHA256SUMS                                 of all these files, as `sha256sum --check SHA256SUMS` reads it

Checkpoints, other spectra, figures and the report are left out, and so are runs that have not ended. `gengap compare
OUT` and `gengap report OUT` read a slim copy as they read the study, and `gengap study --out OUT` continues it.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gengap_dist.config.metric_key import LayerKey
from gengap_dist.config.regular_file import read_regular
from gengap_dist.errors import UsageError, first_of
from gengap_dist.runs.metrics_table import NO_LINES, dump
from gengap_dist.runs.run_folder import (
    TEST_CORRECT,
    dump_arrays,
    load_spectra,
    read_info,
    read_metrics_table,
    read_study_info,
    spectra_by_step,
    write_atomically,
    write_info,
)
from gengap_dist.runs.schema import OF_STUDY, RunInfo, RunStatus, StudyInfo

SUMS = "SHA256SUMS"
Info = TypeVar("Info", RunInfo, StudyInfo)
FILES = (StudyInfo.file_name, RunInfo.file_name, "metrics.npz", TEST_CORRECT)


def write_slim_copy(folder: Path, out: Path, progress: Callable[[str, int, int], object] = lambda *_: None) -> int:
    """Write a slim copy of a study or a run; returns its number of runs.

    Runs that have not ended are left out, so a study may be copied again and again while it runs. A copy of the same
    study is brought up to date: runs that the study no longer has are removed from it.

    Args:
        folder: of the study or run.
        out: of the copy.
        progress: called with the name of each run, its number and the number of all.

    Raises:
        UsageError: if a run cannot be read, `folder` is a comparison, or `out` is inside it or holds something else.
    """
    folder, out = folder.resolve(), out.resolve()
    is_study = (folder / StudyInfo.file_name).exists()
    study = read_study_info(folder) if is_study else None
    if study and study.members is not None:
        raise UsageError(f"DIR ({folder}) is a comparison, whose runs are elsewhere: give the folder of a study or run")
    _check_out(folder, out, study)
    runs = [
        path.parent
        for part in (OF_STUDY if is_study else ())
        for path in sorted(folder.glob(f"{part}/*/*/{RunInfo.file_name}"))
    ]
    ended = [run for run in (runs if is_study else [folder]) if read_info(run).status.is_final]
    for number, run in enumerate(ended):
        progress(f"{run.parent.name}/{run.name}", number, len(ended))
        _copy_run(run, out / run.relative_to(folder))
    kept = {out / run.relative_to(folder) for run in ended}
    for path in [path.parent for part in OF_STUDY for path in out.glob(f"{part}/*/*/{RunInfo.file_name}")]:
        if path not in kept:
            shutil.rmtree(path)
    if study:
        write_info(out, _without_folders(study))
    write_sums(out)
    return len(ended)


def _check_out(folder: Path, out: Path, study: StudyInfo | None) -> None:
    """Make the folder of a copy, or check that it is an earlier copy of the same study.

    Raises:
        UsageError: if it is anything else.
    """
    if out.is_relative_to(folder):
        raise UsageError(f"OUT ({out}) lies in the folder that it is a copy of ({folder}): choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"OUT ({out}) cannot be written ({error.strerror}): choose another folder") from None
    if not any(out.iterdir()):
        return
    if not (out / SUMS).exists():
        raise UsageError(f"OUT ({out}) is not empty and no slim copy, for it has no {SUMS}: choose another")
    before = read_study_info(out) if (out / StudyInfo.file_name).exists() else None
    if (before and (before.name, before.started)) != (study and (study.name, study.started)):
        raise UsageError(f"OUT ({out}) is a slim copy of another study or run: choose another folder")


def _copy_run(run: Path, out: Path) -> None:
    """Write the slim copy of one run, in place of what is there."""
    info = read_info(run)
    for path in (out / TEST_CORRECT, *out.glob("spectra/step_*.npz")):  # those that the run has are written again
        path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_info(out, _without_folders(info))
    write_atomically(out / "metrics.npz", dump(read_metrics_table(run), NO_LINES, compress=True))
    if (run / TEST_CORRECT).exists():
        write_atomically(out / TEST_CORRECT, (run / TEST_CORRECT).read_bytes())
    for path in _first_and_last([*spectra_by_step(run / "spectra").values()]):
        found = load_spectra(path)
        kept = {key: value for key, value in found.items() if LayerKey.parse(key).layer == info.last_hidden_layer}
        if info.status == RunStatus.FINISHED and kept:
            (out / "spectra").mkdir(exist_ok=True)
            write_atomically(out / "spectra" / path.name, dump_arrays(kept))


def _first_and_last(paths: Sequence[Path]) -> list[Path]:
    return [*paths[:1], *paths[1:][-1:]]


def _without_folders(info: Info) -> Info:
    """The content of run.json or study.json with the last part of every absolute path only."""
    return type(info).model_validate(_shortened(info.content()))


_FOLDERS = re.compile(r"(?:\b(?:file|sqlite):/+|(?<![\w./:])~?/)(?:[^\s/'\",;:=]+/+)*(?=[^\s/])")


def _shortened(value: Any) -> Any:
    """JSON values without the folders of absolute paths.

    >>> _shortened({"command": ["/home/me/.venv/bin/python", "--data.root=/home/me/d"], "root": "data", "lr": 0.1})
    {'command': ['python', '--data.root=d'], 'root': 'data', 'lr': 0.1}
    >>> _shortened(["sqlite:////home/me/m.db", "http://host/x", "No such file: '/tmp/a b/c.pt'", "train/loss", "a / b"])
    ['m.db', 'http://host/x', "No such file: 'a b/c.pt'", 'train/loss', 'a / b']
    """
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {_shortened(name): _shortened(each) for name, each in value.items()}
    return [_shortened(each) for each in value] if isinstance(value, list) else value


# -- checksums --------------------------------------------------------------------------------------------------------


def write_sums(out: Path) -> None:
    """Write SHA256SUMS of the files of a copy; a report that was drawn in it is not among them."""
    lines = [f"{_digest(path)}  {path.relative_to(out).as_posix()}\n" for path in _files(out)]
    write_atomically(out / SUMS, "".join(lines))


def check_sums(out: Path) -> list[str]:
    """Files of a copy that differ from SHA256SUMS, are missing, or are not listed; empty if all is as it was.

    Raises:
        UsageError: if there are no checksums.
    """
    try:
        lines = read_regular(out / SUMS).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise UsageError(f"{out / SUMS} cannot be read ({error.strerror}): give the folder of a slim copy") from None
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(out).as_posix(): path for path in _files(out)}
    return sorted(
        name for name in listed.keys() | found.keys() if name not in found or listed.get(name) != _digest(found[name])
    )


def sums_problem(folder: Path) -> str:
    """One sentence if the files of a slim copy are not those of its SHA256SUMS; empty if all are, or it has none."""
    changed = check_sums(folder) if (folder / SUMS).exists() else []
    if not changed:
        return ""
    return f"{folder} is not what its {SUMS} says ({first_of(changed, 3)}): it was changed after it was copied"


def _files(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.rglob("*")) if path.name in FILES or path.parent.name == "spectra")


def _digest(path: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    try:
        return hashlib.sha256(read_regular(path)).hexdigest()
    except OSError:
        return ""
