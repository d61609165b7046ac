"""Slim copies of studies and runs: what comparisons need, small enough to be published with a result.

    OUT/study.json
    OUT/{runs,match,tune}/ARM/RUN/run.json         as it was, without folders of the machine
                                  metrics.npz      all metrics, compressed; there is no metrics.jsonl
                                  test_correct.npy
                                  spectra/         of the last hidden layer, at the first and the last measurement
    OUT/SHA256SUMS                                 of every file, as `sha256sum --check SHA256SUMS` reads it

Checkpoints, other spectra, figures and the report are left out. `gengap compare OUT` and `gengap report OUT` read a
slim copy as they read the study, and `gengap study --out OUT` continues it.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from gengap_dist.config.metric_key import LayerKey
from gengap_dist.errors import UsageError
from gengap_dist.runs.metrics_table import dump
from gengap_dist.runs.run_folder import (
    NO_LINES,
    TEST_CORRECT,
    dump_arrays,
    load_spectra,
    read_info,
    read_metrics_table,
    read_study_info,
    write_atomically,
    write_info,
)
from gengap_dist.runs.schema import RunInfo, RunStatus, StudyInfo

SUMS = "SHA256SUMS"
Info = TypeVar("Info", RunInfo, StudyInfo)
OF_STUDY = ("runs", "match", "tune")  # folders with ARM/RUN


def write_slim_copy(folder: Path, out: Path, progress: Callable[[str, int, int], object] = lambda *_: None) -> int:
    """Write a slim copy of a study or a run; returns its number of runs.

    Runs that have not ended are left out, so a study may be copied again and again while it runs. A copy that exists
    is brought up to date.

    Args:
        folder: of the study or run.
        out: of the copy.
        progress: called with the name of each run, its number and the number of all.

    Raises:
        UsageError: if a run cannot be read, or `out` is inside `folder` or holds something else.
    """
    folder, out = folder.resolve(), out.resolve()
    if out.is_relative_to(folder):
        raise UsageError(f"OUT ({out}) lies in the folder that it is a copy of ({folder}): choose another")
    if out.exists() and any(out.iterdir()) and not (out / SUMS).exists():
        raise UsageError(f"OUT ({out}) is not empty and no slim copy, for it has no {SUMS}: choose another")
    out.mkdir(parents=True, exist_ok=True)
    is_study = (folder / StudyInfo.file_name).exists()
    runs = [
        path.parent
        for part in (OF_STUDY if is_study else ())
        for path in sorted(folder.glob(f"{part}/*/*/{RunInfo.file_name}"))
    ]
    ended = [run for run in (runs if is_study else [folder]) if read_info(run).status.has_result]
    for number, run in enumerate(ended):
        progress(f"{run.parent.name}/{run.name}", number, len(ended))
        _copy_run(run, out / run.relative_to(folder))
    if is_study:
        write_info(out, _without_folders(read_study_info(folder)))
    write_sums(out)
    return len(ended)


def _copy_run(run: Path, out: Path) -> None:
    """Write the slim copy of one run."""
    info = read_info(run)
    out.mkdir(parents=True, exist_ok=True)
    write_info(out, _without_folders(info))
    try:
        table = read_metrics_table(run)
    except ValueError as error:
        raise UsageError(f"{run} cannot be copied ({error}): restore it, or remove its folder") from None
    write_atomically(out / "metrics.npz", dump(table, NO_LINES, compress=True))
    if (run / TEST_CORRECT).exists():
        write_atomically(out / TEST_CORRECT, (run / TEST_CORRECT).read_bytes())
    for path in _first_and_last(sorted((run / "spectra").glob("step_*.npz"))):
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


def _shortened(value: Any) -> Any:
    """JSON values without the folders of absolute paths.

    >>> _shortened({"command": ["/home/me/.venv/bin/python", "-m", "gengap_dist"], "root": "data", "lr": 0.1})
    {'command': ['python', '-m', 'gengap_dist'], 'root': 'data', 'lr': 0.1}
    """
    if isinstance(value, str):
        return PurePath(value).name if value.startswith("/") else value
    if isinstance(value, Mapping):
        return {name: _shortened(each) for name, each in value.items()}
    return [_shortened(each) for each in value] if isinstance(value, list) else value


# -- checksums --------------------------------------------------------------------------------------------------------


def write_sums(out: Path) -> None:
    """Write SHA256SUMS of all files below a folder."""
    lines = [f"{_digest(path)}  {path.relative_to(out).as_posix()}\n" for path in _files(out)]
    write_atomically(out / SUMS, "".join(lines))


def check_sums(out: Path) -> list[str]:
    """Files below `out` that differ from SHA256SUMS, are missing, or are not listed; empty if all is as it was.

    Raises:
        UsageError: if there are no checksums.
    """
    try:
        lines = (out / SUMS).read_text().splitlines()
    except OSError as error:
        raise UsageError(f"{out / SUMS} cannot be read ({error.strerror}): give the folder of a slim copy") from None
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(out).as_posix(): path for path in _files(out)}
    return sorted(
        name for name in listed.keys() | found.keys() if name not in found or listed.get(name) != _digest(found[name])
    )


def _files(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.rglob("*")) if path.is_file() and path != out / SUMS)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
