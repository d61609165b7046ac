"""The run folder: run.json, metrics.jsonl, spectra/, test_correct.npy, config.yaml. Rank 0 writes it atomically.

metrics.jsonl has one line per step with metrics, sorted by step, each with `step`, `epoch`, `seconds` and flat metric
names. A line is pending until its step is over, so no step has two lines. metrics.npz has the same data as a table,
written when a long run has ended: it is optional and makes reading many runs faster. A slim copy of a run (`slim.py`)
has it in place of metrics.jsonl. test_correct.npy says which test samples the network of a finished run is right about,
one bit each, if the task knows; `read_test_correct` reads it.
"""

import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import from_json

from gengap_dist.config.identity import changed_on_resume
from gengap_dist.config.loading import to_yaml
from gengap_dist.config.regular_file import open_regular
from gengap_dist.config.sections import RunConfig
from gengap_dist.credentials import command_line
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import UsageError
from gengap_dist.runs import lease
from gengap_dist.runs.appended_file import append_lines
from gengap_dist.runs.json_lines import last_step, read_from, read_lines
from gengap_dist.runs.links import check_links
from gengap_dist.runs.schema import REMEDY, NewerSchema, RunInfo, RunStatus, StudyInfo, first_error, to_time
from gengap_dist.runs.upload_state import read_upload_state

if TYPE_CHECKING:  # all commands import this module, and --help needs neither numpy nor torch
    import numpy as np

    from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
    from gengap_dist.runs.metrics_table import MetricsTable

Metrics = Mapping[str, float]
TEST_CORRECT = "test_correct.npy"
EXPORTING = "exporting the model"  # progress note of a run whose metrics and spectra are complete in its folder
MIN_TABLE_BYTES = 2**20  # of metrics.jsonl, from which on metrics.npz is written, too
_MEASURED = "meta/measured"  # member of an npz file of spectra: no layer key is called so
_SPECTRA = re.compile(r"step_([0-9]{8,})\.npz")
_PART = re.compile(r"\.(.+)\.[0-9]+\.part")  # of a file that `write_atomically` has not completed


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a complete file or nothing: readers never see a partial file, also after a crash.

    Raises:
        OSError: names the file, of which nothing is left but the one before.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # errors of `write` name no file
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def incomplete_file(path: Path) -> str:
    """The name of the file that a killed process was writing into `path`, see `write_atomically`; empty if it is none.

    >>> incomplete_file(Path("run/.run.json.123.part")), incomplete_file(Path("run/run.json"))
    ('run.json', '')
    """
    name = _PART.fullmatch(path.name)
    return name[1] if name else ""


def prepare_folder(out: Path, marker: str, *, resume: bool) -> None:
    """Create the folder of a run or study; refuse to overwrite existing files.

    Args:
        out: the folder.
        marker: the file that identifies such a folder, `run.json` or `study.json`.
        resume: whether an existing folder may be continued.

    Raises:
        UsageError: if it cannot be written, holds other files or links that lead out of it, or holds a run while
            `resume` is not set.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out ({out}) cannot be written ({error.strerror}): choose another folder") from None
    check_links(out)
    if (out / marker).exists():
        if not resume:
            raise UsageError(f"--out ({out}) already holds a {marker}: add --resume to continue it, or choose another")
    elif not all(_is_of_a_start(path, resume=resume) for path in out.iterdir()):
        raise UsageError(f"--out ({out}) holds other files and no {marker}: choose a new or empty folder")


def missing_folders(out: Path) -> list[Path]:
    """Of a folder and its parent those that `prepare_folder` would make, the inner one first."""
    return [folder for folder in (out, out.parent) if not folder.exists()]


@contextmanager
def removing_if_empty(folders: Sequence[Path]) -> Iterator[None]:
    """Context that removes folders again if it is left by an error, unless there is something in them."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
        raise


def check_settings(out: Path, info: RunInfo, config: RunConfig) -> None:
    """Check that the run in `out` may be resumed with `config`.

    Raises:
        UsageError: names what differs from `info`.
    """
    if changed := changed_on_resume(info.config, config):
        raise UsageError(
            f"{changed} when the run in {out} was started: resume with the settings it was started with, or choose a "
            "new --out"
        )


def _is_of_a_start(path: Path, *, resume: bool = False) -> bool:
    """Whether a run that dies before it has written run.json leaves this file or folder, without any result.

    A config.yaml may be the user's own; it is a run's beside `spectra`, which is made before it.
    """
    match path.name:
        case "spectra" | "checkpoints":
            return path.is_dir() and not any(path.iterdir())
        case "config.yaml":
            return resume or (path.parent / "spectra").is_dir()
        case "ray":  # of Ray Train, a folder for each start
            return path.is_dir() and all(re.fullmatch("[0-9a-f]{32}", start.name) for start in path.iterdir())
        case name:
            prefixes = (lease.PREFIX, ".shared.", ".writable.", ".config.yaml.", ".run.json.", ".study.json.")
            return name == "mlflow.log" or name.startswith(prefixes)


def now() -> str:
    """The current time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def end_time(info: RunInfo | StudyInfo, seconds: float = 0.0) -> str:
    """The current time, for a run or study that lasted `seconds`; later if the clock was set back since it started."""
    if info.started is None:
        return now()
    earliest = to_time(info.started) + timedelta(seconds=seconds)
    return max(datetime.fromisoformat(now()), earliest).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that affect results."""
    out = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("gengap_dist", "torch", "torchvision", "numpy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def git_state() -> dict[str, Any] | None:
    """Commit of the current folder and whether it has uncommitted changes; None outside a repository."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *args], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status)}


def json_line(values: Mapping[str, float]) -> str:
    """Numbers as a JSON object. JSON has no NaN and no infinities: they become strings that float() can read.

    >>> json_line({"step": 1, "a": float("nan")})
    '{"step": 1, "a": "nan"}'
    """
    return json.dumps({name: _json_number(value) for name, value in values.items()})


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class NullRecorder:
    """The recorder of ranks other than 0: writes nothing."""

    def start(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def resume(self, step: int, seconds: float, pending: dict[int, dict[str, float]]) -> None:
        """Nothing to do."""

    def log(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Nothing to do."""

    def flush(self, before: int | None = None) -> None:
        """Nothing to do."""

    def pending_rows(self) -> dict[int, dict[str, float]]:
        """No lines are pending."""
        return {}

    def seconds(self) -> float:
        """No clock."""
        return 0.0

    def run_id(self) -> str | None:
        """Always None."""

    def mlflow_run_id(self) -> str | None:
        """Always None."""

    def spectra(self, step: int, spectra: Iterable["LayerSpectrum"], probe_set: str = "") -> None:
        """Nothing to do."""

    def test_correct(self, correct: "np.ndarray") -> None:
        """Nothing to do."""

    def finish(
        self,
        status: RunStatus,
        result: Mapping[str, Any],
        error: str | None = None,
        *,
        flush: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing to do."""


class RunRecorder(NullRecorder):
    """The folder of one run, open for writing."""

    def __init__(self, out: Path) -> None:
        """Record into `out`, which must exist; incomplete files of a killed run are removed."""
        self.out = out
        self._check_lease = lease.guard(out)
        (out / "spectra").mkdir(exist_ok=True)
        _remove_parts(out)
        self._run_id: str | None = None
        self._pending: dict[int, dict[str, float]] = {}
        self._start_time = time.monotonic()

    def start(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write run.json with all that is known before the first step."""
        self._check_lease()
        previous = read_info(self.out) if (self.out / "run.json").exists() else None
        self._run_id = previous.id if previous else uuid.uuid4().hex
        info = {
            "status": RunStatus.RUNNING,
            "id": self._run_id,
            "seed": config.seed,
            "started": previous.started or now() if previous else now(),
            "resumed": [*previous.resumed, now()] if previous else [],
            "command": command_line(),
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            "git": git_state(),
            **facts,
        }
        write_atomically(self.out / "config.yaml", to_yaml(config))
        write_info(self.out, RunInfo.model_validate(info))

    def resume(self, step: int, seconds: float, pending: dict[int, dict[str, float]]) -> None:
        """Return to the state after `step` steps: later lines are removed and will be written again."""
        path = self.out / "metrics.jsonl"
        kept = max((end for line, end in read_from(path) if line["step"] < step), default=0)
        write_atomically(path, path.read_bytes()[:kept] if kept else b"")
        (self.out / "metrics.npz").unlink(missing_ok=True)
        (self.out / TEST_CORRECT).unlink(missing_ok=True)
        self._pending = {at: dict(line) for at, line in pending.items()}
        self._start_time = time.monotonic() - seconds

    def seconds(self) -> float:
        """Seconds since the run began, without the time between an end and a resume."""
        return time.monotonic() - self._start_time

    def log(self, step: int, epoch: float, metrics: Metrics) -> None:
        """Add metrics to the line of `step`, the number of optimizer steps done."""
        line = self._pending.setdefault(step, {"step": step, "epoch": round(epoch, 6)})
        line["seconds"] = round(self.seconds(), 3)
        line.update(metrics)

    def flush(self, before: int | None = None) -> None:
        """Write the lines of all steps below `before` (None: all), which must be over.

        Raises:
            UsageError: if another process has taken over the folder; so do `start`, `spectra` and `finish`.
        """
        self._check_lease()
        ready = [step for step in sorted(self._pending) if before is None or step < before]
        if ready:
            append_lines(self.out / "metrics.jsonl", "".join(json_line(self._pending[step]) + "\n" for step in ready))
            for step in ready:
                del self._pending[step]

    def pending_rows(self) -> dict[int, dict[str, float]]:
        """Lines by step that are not written yet; a checkpoint contains them."""
        return self._pending

    def spectra(self, step: int, spectra: Iterable["LayerSpectrum"], probe_set: str = "") -> None:
        """Write spectra/[<probe set>/]step_<step>.npz; `load_spectra` reads it."""
        self._check_lease()
        folder = self.out / "spectra" / probe_set
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step_{step:08d}.npz", dump_spectra(spectra))

    def test_correct(self, correct: "np.ndarray") -> None:
        """Write whether the last network is right about each test sample, [M] bool; `read_test_correct` reads it."""
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, np.packbits(correct))
        write_atomically(self.out / TEST_CORRECT, buffer.getvalue())

    def run_id(self) -> str | None:
        """See `RunInfo.id`; None before `start`."""
        return self._run_id

    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run of this folder, if it exists."""
        with suppress(UsageError):  # the uploader reports it
            return read_upload_state(self.out).get("run_id")
        return None

    def finish(
        self,
        status: RunStatus,
        result: Mapping[str, Any],
        error: str | None = None,
        *,
        flush: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write pending lines (unless a checkpoint contains them: `flush=False`), then the status and the result.

        Args:
            status: how the run ended.
            result: numbers by name.
            error: why it did not finish.
            flush: see above.
            facts: other fields of run.json.
        """
        self._check_lease()
        if flush:
            self.flush()
        info, seconds = read_info(self.out), self.seconds()
        fields = {"status": status, "ended": end_time(info, seconds), "seconds": round(seconds, 3), **(facts or {})}
        fields["result"] = {k: _json_number(v) if isinstance(v, float) else v for k, v in result.items()}
        if error is not None:
            fields["error"] = error
        write_info(self.out, info.with_fields(**fields))
        lines = self.out / "metrics.jsonl"
        if status.has_result and lines.exists() and (size := lines.stat().st_size) > MIN_TABLE_BYTES:
            from gengap_dist.runs.metrics_table import dump, to_table

            try:
                write_atomically(self.out / "metrics.npz", dump(to_table(read_lines(lines)), size))
            except OSError as problem:
                reason = f"{problem.filename} could not be written ({problem.strerror})"
                warnings.warn(f"{reason}: it is optional, and was left out", stacklevel=2)


def _remove_parts(out: Path) -> None:
    """Remove what processes that were killed left of files of a run.

    Except mlflow.json, which the uploader of this run may be writing now.
    """
    for path in [path for folder in (".", "figures", "spectra", "spectra/*") for path in out.glob(f"{folder}/.*.part")]:
        if path.is_file() and incomplete_file(path) not in ("", "mlflow.json"):
            path.unlink(missing_ok=True)


def dump_spectra(spectra: Iterable["LayerSpectrum"]) -> bytes:
    """Spectra as the bytes of an npz file, see `dump_arrays`."""
    return dump_arrays(
        {
            s.key: (
                s.singular_values.numpy(),
                {
                    "layer": s.layer, "view": s.view, "centred": s.centred, "floor": s.floor,
                    "num_samples": s.num_samples, "num_units": s.num_units, "dead_units": s.dead_units,
                },
            )
            for s in spectra
        }
    )  # fmt: skip


def dump_arrays(
    spectra: "Mapping[str, tuple[np.ndarray, Mapping[str, Any]]]",
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """The bytes of an npz file: one array per layer key, and `meta`, a JSON string with the other fields.

    `_member` names the array of a layer key; `load_spectra` reads the file.

    Args:
        spectra: layer key to singular values and the other fields.
        measured: see `load_layer_facts`; None: all that was measured is in `spectra`.
    """
    import numpy as np

    meta = {key: dict(fields) for key, (_, fields) in spectra.items()}
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {_member(key): values for key, (values, _) in spectra.items()}
    if measured is not None:
        arrays[_MEASURED] = np.array(json.dumps(measured).encode())  # a byte a character; text has four
    np.savez(buffer, meta=np.array(json.dumps(meta)), **arrays)
    return buffer.getvalue()


class _SpectrumFacts(BaseModel):
    floor: Annotated[FiniteFloat, Field(ge=0)]
    num_samples: PositiveInt
    num_units: PositiveInt


_SPECTRA_META = TypeAdapter(dict[str, _SpectrumFacts])


def load_spectra(path: Path) -> "dict[str, tuple[np.ndarray, dict[str, Any]]]":
    """Layer key to (singular values [m], the other fields of LayerSpectrum as a dict).

    Raises:
        UsageError: if the file is damaged.
    """
    from gengap_dist.runs.metrics_table import read_arrays

    arrays = read_arrays(path)
    meta = _facts_in(arrays, "meta", path)
    members = {key: _member(key) if _member(key) in arrays else key for key in meta}  # old files have the key itself
    for member in members.values():
        values = arrays.get(member)
        is_list = values is not None and values.ndim == 1 and values.size > 0 and values.dtype.kind == "f"
        if values is None or not is_list or (values < 0).any() or (values > values[0]).any():
            raise UsageError(f"{path} is damaged: {member:.60} must be singular values, the largest first; {REMEDY}")
    return {key: (arrays[members[key]], info) for key, info in meta.items()}


def load_layer_facts(path: Path) -> dict[str, dict[str, Any]]:
    """Layer key to the other fields of LayerSpectrum, of all layers in the order in which they were measured.

    Also of those whose singular values `gengap clean` has removed from the file.

    Raises:
        UsageError: if the file is damaged.
    """
    from gengap_dist.runs.metrics_table import read_arrays

    arrays = read_arrays(path)
    return _facts_in(arrays, _MEASURED if _MEASURED in arrays else "meta", path)


def _facts_in(arrays: Mapping[str, Any], member: str, path: Path) -> dict[str, dict[str, Any]]:
    """The JSON of `meta`, or of _MEASURED, in an npz file of spectra."""
    try:
        text = arrays[member].item() if member in arrays and arrays[member].size == 1 else ""
        facts: dict[str, Any] = from_json(text if isinstance(text, bytes | str) else "")
        _SPECTRA_META.validate_python(facts)
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {first_error(error)}; {REMEDY}") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {member} is not JSON ({error}); {REMEDY}") from None
    return facts


def spectra_by_step(folder: Path) -> dict[int, Path]:
    """The files of spectra in a folder, in increasing order of step; other files are ignored."""
    paths = {int(name[1]): path for path in folder.glob("*.npz") if (name := _SPECTRA.fullmatch(path.name))}
    return dict(sorted(paths.items()))


def is_spectra_name(name: str) -> bool:
    """Whether a file with this name holds the spectra of a step."""
    return _SPECTRA.fullmatch(name) is not None


def _member(key: str) -> str:
    """The name of a layer key's array in an npz file: the key, unless numpy or `dump_spectra` uses that name.

    >>> _member("fc2/pool"), _member("file"), _member("meta"), _member("block.npy")
    ('fc2/pool', 'file/', 'meta/', 'block.npy/')
    """
    return f"{key}/" if key in ("file", "allow_pickle", "meta") or key.endswith(".npy") else key


def read_test_correct(out: Path, result: Mapping[str, Any] | None = None) -> "np.ndarray | None":
    """Whether the last network of a run is right about each test sample, [M] bool, in the order of the data set.

    None: the run has not finished, its task has no right and wrong, or an earlier version recorded it.

    Args:
        out: the folder of the run.
        result: of its run.json; None: it is read.

    Raises:
        UsageError: if the file is damaged.
    """
    import numpy as np

    path = out / TEST_CORRECT
    num_test = (read_info(out).result if result is None else result).get("num_test")
    if num_test is None or not os.path.lexists(path):
        return None
    packed: np.ndarray = np.empty(0)
    try:
        with open_regular(path) as file:
            packed = np.lib.format.read_array(file, allow_pickle=False)
        problem = f"it holds {packed.dtype} of shape {list(packed.shape)}"
    except (OSError, ValueError, EOFError, MemoryError) as error:
        problem = f"{error}"
    if packed.dtype != np.uint8 or packed.shape != (-(-num_test // 8),):
        raise UsageError(
            f"{path} is damaged, needs a bit for each of {num_test:,} test samples ({problem}): restore it"
        )
    return np.unpackbits(packed, count=num_test).astype(bool)


def read_info(out: Path) -> RunInfo:
    """The run.json of a run folder.

    Raises:
        NewerSchema: if a later version of this package wrote it.
        UsageError: if it is missing or damaged.
    """
    return RunInfo.read(out / RunInfo.file_name)


def read_study_info(out: Path) -> StudyInfo:
    """The study.json of a study folder; raises what `read_info` raises."""
    return StudyInfo.read(out / StudyInfo.file_name)


def write_info(out: Path, info: RunInfo | StudyInfo) -> None:
    """Write the run.json of a run folder, or the study.json of a study folder."""
    write_atomically(out / info.file_name, json.dumps(info.content(), indent=1))


def read_metrics(out: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl; an incomplete last line is skipped."""
    return read_lines(out / "metrics.jsonl")


def read_metrics_table(out: Path) -> "MetricsTable":
    """The metrics of a run folder, or of a slim copy of one, as a table.

    Raises:
        UsageError: if a line of metrics.jsonl, or the only metrics.npz, is damaged.
    """
    from gengap_dist.runs.metrics_table import NO_LINES, load, to_table

    lines, columns = out / "metrics.jsonl", out / "metrics.npz"
    size = lines.stat().st_size if lines.exists() else NO_LINES
    if columns.exists() and (table := load(columns, size)):
        return table
    if is_slim(out):
        raise UsageError(f"{columns} is damaged: {REMEDY}")
    return to_table(read_lines(lines))


def is_slim(out: Path) -> bool:
    """Whether a folder is a slim copy of a run: its metrics are in metrics.npz alone."""
    return (out / "metrics.npz").exists() and not (out / "metrics.jsonl").exists()


class SeedRun(NamedTuple):
    """The content of a run folder."""

    info: Mapping[str, Any]
    """run.json."""
    history: "MetricsTable"
    """The metrics, if the run has finished."""


def describe_damage(out: Path) -> str:
    """What is missing or incomplete in a run folder; "" if it is complete, empty or missing.

    The recorder writes complete files; but a process may end before run.json exists, and files may be lost later.

    Raises:
        NewerSchema: if a later version of this package wrote it.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return ""
    if not (out / "run.json").exists():
        return "it holds files and no run.json"
    try:
        info = read_info(out)
    except NewerSchema:
        raise
    except UsageError:
        return "its run.json is not valid"
    num_steps = info.result.get("num_steps")
    if "seed" not in info.config or (info.status == RunStatus.FINISHED and num_steps is None):
        return "its run.json is not valid"
    if info.status == RunStatus.FINISHED and _last_recorded_step(out) != num_steps:
        return f"its metrics.{'npz' if is_slim(out) else 'jsonl'} does not end with step {num_steps}, the last"
    return ""


def _last_recorded_step(out: Path) -> int | None:
    if not is_slim(out):
        return last_step(out / "metrics.jsonl")
    try:
        steps = read_metrics_table(out).series("step")[1]
    except UsageError:
        return None
    return int(steps[-1]) if len(steps) else None


def quarantine(out: Path, folder: Path) -> Path:
    """Move a damaged run folder into `folder`, so that the run can start again; returns the new path."""
    number = 1
    while (target := folder / f"{out.parent.name}-{out.name}-{number}").exists():
        number += 1
    folder.mkdir(exist_ok=True)
    return out.rename(target)


def close_abandoned(out: Path, error: BaseException) -> None:
    """Set the final status of a run whose ranks have died; a run that has ended normally is unchanged.

    A folder without run.json and results is removed, so that the same command can be repeated. That of another process,
    which has taken over, is left as it is.
    """
    if lease.is_of_another(out):
        return
    if not (out / "run.json").exists():
        if all(_is_of_a_start(path) and path.name != "config.yaml" for path in out.iterdir()):  # it may be the user's
            _empty(out)
        return
    info = read_info(out)
    if info.status == RunStatus.RUNNING:
        status = status_after(error)
        text = f"{type(error).__name__}: {error}".strip()
        try:
            write_info(out, info.with_fields(status=status, ended=end_time(info), error=text))
        except OSError as problem:
            reason = f"{problem.filename} could not be written ({problem.strerror})"
            warnings.warn(f"{reason}: the run is not running, as it says, but {status}", stacklevel=2)


def status_after(error: BaseException) -> RunStatus:
    """The status of a run or study that this error has ended."""
    if isinstance(error, Preempted):
        return RunStatus.PREEMPTED
    return RunStatus.FAILED if isinstance(error, Exception) else RunStatus.KILLED


def _empty(out: Path) -> None:
    """Remove what is in a folder, and the folder, but not the lease of this process."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith(lease.PREFIX):
            path.unlink()
    with suppress(OSError):
        out.rmdir()
