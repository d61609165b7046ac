"""Checkpoints: one folder each, which is complete or does not exist.

    checkpoints/step_00000050/
        model.pt        unsharded parameters and buffers, by name: a plain state dict
        optimizer.pt    {parameter name: {quantity: tensor}}, unsharded, the same for every strategy
        best.pt         state dict of the best model so far, if the run validates
        algorithm.pt    state of the algorithm, such as averaged weights
        run.pt          state of the run itself: step, times, metrics not yet written
        checkpoint.json schema, step, id and settings of the run, other facts, and the SHA-256 of each file

A folder is written under a temporary name, flushed to disk and renamed; a kill at any time leaves the previous
checkpoint intact. Whatever else is in `checkpoints` is left alone: files, folders of another name or without
checkpoint.json, and checkpoints of other runs are never counted, replaced or deleted. Nothing here is collective.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from gengap_dist.config.identity import changed_on_resume
from gengap_dist.config.regular_file import open_regular
from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError, first_of
from gengap_dist.runs.checkpoint_folder import (
    FACTS,
    PART,
    SCHEMA,
    checkpoints_of_run,
    describe_damage,
    named_folders,
    read_facts,
)
from gengap_dist.runs.checkpoint_folder import checkpoints_by_step as checkpoints_by_step
from gengap_dist.runs.checkpoint_folder import step_of as step_of
from gengap_dist.runs.schema import RunInfo

State = dict[str, Any]
Report = Callable[[str], None]


# -- writing ----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes checkpoints of one run in a thread, one at a time; keeps the last `keep`."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Save into `folder`; incomplete checkpoints of a killed run are removed."""
        self.folder, self.keep = folder, keep
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if PART.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, states: Mapping[str, State], facts: Mapping[str, Any]) -> None:
        """Copy the states to the CPU, and write them while training continues.

        Args:
            step: number of optimizer steps done.
            states: `model`, `optimizer`, `algorithm`, `best`, `run`, each of tensors and plain values.
            facts: written to checkpoint.json: `run`, see `RunInfo.id`; `config`; and information for people.

        Raises:
            OSError: if the previous checkpoint could not be written, for example on a full disk, or (FileExistsError)
                because something else has its name.
        """
        self.wait()
        copies = {name: _on_cpu(state) for name, state in states.items()}
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(facts)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the current checkpoint is on disk.

        Raises:
            OSError: if it could not be written; previous checkpoints are unchanged.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _write(self, step: int, states: Mapping[str, State], facts: dict[str, Any]) -> None:
        path = self.folder / f"step_{step:08d}"
        part = path.with_name(f".{path.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            checksums = {f"{name}.pt": _write_tensors(part / f"{name}.pt", state) for name, state in states.items()}
            content = json.dumps({"schema": SCHEMA, "step": step, **facts, "sha256": checksums}, indent=1)
            with (part / FACTS).open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                _fsync(file.fileno())
            _fsync_folder(part)
            own = checkpoints_of_run(self.folder, facts.get("run"))
            if step in own:  # a damaged one, or one from before a resume
                _remove(path)
            elif os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, f"{path} is there, which is no checkpoint of this run")
            part.rename(path)
            _fsync_folder(self.folder)
            own[step] = path
            for old in sorted(at for at in own if at <= step)[: -self.keep]:  # later ones are damaged
                _remove(own[old])
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            self._error = error

    def latest_step(self, run: str | None) -> int | None:
        """The step of the last checkpoint of a run; None if it has none."""
        return max(checkpoints_of_run(self.folder, run), default=None)


def _remove(path: Path) -> None:
    """Remove a checkpoint; after a kill the rest of it is removed at the next start, and is no damaged checkpoint."""
    old = path.with_name(f".{path.name}.old.part")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


class _HashingFile:
    """A file that computes the SHA-256 of its content during writing."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch replaces it with a RuntimeError
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_tensors(path: Path, state: State) -> str:
    with path.open("wb") as file:
        out = _HashingFile(file)
        try:
            torch.save(state, out)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            raise out.error or OSError(f"{path.name} could not be written") from None
        file.flush()
        _fsync(file.fileno())
        return out.sum.hexdigest()


def _fsync(descriptor: int) -> None:
    os.fsync(descriptor)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_cpu(value: Any) -> Any:
    """The same nested values with every tensor copied to the CPU, so that training does not change them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list | tuple) else value


# -- reading ----------------------------------------------------------------------------------------------------------


def latest(folder: Path, report: Report) -> Path | None:
    """The last undamaged checkpoint; None if nothing was saved yet.

    Args:
        folder: a run's `checkpoints`.
        report: called with a message for each damaged one that is skipped.

    Raises:
        UsageError: if all checkpoints are damaged, or a later version wrote one.
    """
    newest_first = [path for path in reversed(named_folders(folder).values()) if _has_files_of_a_checkpoint(path)]
    reason = ""
    for path in newest_first:
        if reason:
            report(f"{reason}: the previous one, {path.name}, is used")
        if isinstance(schema := read_facts(path).get("schema"), int) and schema > SCHEMA:
            raise UsageError(
                f"{path / FACTS} has schema {schema}, and this version reads up to {SCHEMA}: continue with the version "
                "of gengap_dist that wrote it, or move the checkpoint elsewhere"
            )
        if not (damage := describe_damage(path)):
            return path
        reason = f"checkpoint {path} is damaged ({damage})"
    if newest_first:
        raise UsageError(f"{reason}, and there is no earlier one: start the run again in a new --out")
    return None


def _has_files_of_a_checkpoint(path: Path) -> bool:
    """Whether a folder that is called like a checkpoint is one, perhaps one that has lost its checkpoint.json."""
    return (path / FACTS).is_file() or (path / "model.pt").is_file()


def check_origin(path: Path, info: RunInfo, config: RunConfig) -> None:
    """Check that an undamaged checkpoint is of the run of `info`, and of its settings `config`.

    A checkpoint of schema 1 names neither: it is of a run that an earlier version started.

    Raises:
        UsageError: names what differs.
    """
    facts = read_facts(path)
    remedy = "move it out of the folder, then continue with --resume"
    if (run := facts.get("run")) != info.id:
        names = [f"run {name}" if name else "a run without an id" for name in (run, info.id)]
        raise UsageError(f"checkpoint {path} is of another run ({names[0]}) than its folder ({names[1]}): {remedy}")
    if facts["schema"] == 1:
        return
    if not isinstance(settings := facts.get("config"), dict):
        raise UsageError(f"{path / FACTS} does not name the settings of its run: {remedy}")
    if changed := changed_on_resume(settings, config):
        raise UsageError(f"{changed} when checkpoint {path} was written: {remedy}")


def load(path: Path) -> State:
    """Load a file of tensors and plain values onto the CPU, without executing code from it.

    Raises:
        UsageError: if the file is missing or damaged, or holds code.
    """
    try:
        with open_regular(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: restore it, or choose weights that the run has saved") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a file that torch.save has written") from None
    except Exception:  # torch passes on many kinds of unpickling errors
        if names := _named_code(path):
            raise UsageError(
                f"{path} holds Python objects ({first_of(names, 3)}), such as a whole network, and to load them would "
                "execute code from the file: where you trust it, save torch.save(network.state_dict(), FILE) instead"
            ) from None
        raise UsageError(
            f"{path} is damaged, or no file of torch.save: restore it, or save a network's state_dict() with torch.save"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, needs a state dict: save a network's state_dict()")
    return state


def load_nested(path: Path, *names: str) -> State:
    """The same for a file of mappings: those with the given names, or, without names, all of them.

    Raises:
        UsageError: see `load`.
    """
    state = load(path)
    if wrong := [name for name in names or state if not isinstance(state.get(name, {}), Mapping)]:
        raise UsageError(f"{path} is damaged: {wrong[0]!r:.60} must be a mapping; remove this checkpoint")
    return state


def _named_code(path: Path) -> list[str]:
    """What a file would import, such as the class of a pickled network; empty if it is not known."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is no file of torch.save
        return []


def load_weights(path: Path) -> State:
    """The state dict in a file of a user, also of the checkpoints of many tools, which nest it.

    Raises:
        UsageError: see `load`.
    """
    state = load(path)
    for key in ("model", "state_dict", "model_state_dict"):
        state = inner if isinstance(inner := state.get(key), Mapping) else state
    if not state or not all(isinstance(name, str) for name in state):
        raise UsageError(f"{path} holds no state dict: save a network's state_dict()")
    return dict(state)


def without_wrappers(state: State, model: nn.Module) -> tuple[State, list[str]]:
    """A state dict without what DistributedDataParallel and torch.compile put into names, unless the model has it, too.

    Returns:
        The state dict, and what was removed.

    >>> state, removed = without_wrappers({"module._orig_mod.bias": 0}, nn.Linear(1, 1))
    >>> state, removed
    ({'bias': 0}, ['_orig_mod.', 'module.'])
    """
    wrappers = {"module", "_orig_mod"}
    if not any(name not in model.state_dict() and wrappers & {*name.split(".")} for name in state):
        return state, []
    removed = wrappers & {part for name in state for part in name.split(".")}
    bare = {".".join(part for part in name.split(".") if part not in removed): value for name, value in state.items()}
    return bare, sorted(f"{part}." for part in removed)


def evaluated_state(path: Path) -> State:
    """The state dict that the run evaluates: the weight average (EMA or SWA) once it has begun, else model.pt.

    Args:
        path: a checkpoint's model.pt, or another file of weights, which is loaded unchanged.

    Raises:
        UsageError: see `load`.
    """
    average = load_nested(path.with_name("algorithm.pt"), "average").get("average") if path.name == "model.pt" else None
    if not average or not average.get("n_averaged"):
        return load(path)
    return {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}


def restore(model: nn.Module, state: State, path: Path) -> None:
    """Load a model's parameters and buffers.

    Raises:
        UsageError: if they do not match the model; the first differences are listed.
    """
    expected = model.state_dict()
    differences = [f"{name} is missing" for name in expected if name not in state]
    differences += [f"{name} is not in the model" for name in state if name not in expected]
    differences += [
        f"{name} is {[*getattr(state[name], 'shape', ())]}, the model's is {[*expected[name].shape]}"
        for name in expected
        if name in state and getattr(state[name], "shape", None) != expected[name].shape
    ]
    if differences:
        more = f", and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UsageError(
            f"{path} is of another model ({', '.join(differences[:4])}{more}): "
            "use the config that the run was started with"
        )
    model.load_state_dict(state)
