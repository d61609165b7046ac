"""The state of a run on disk: one folder per checkpoint, whole or not there at all.

    checkpoints/step_00000050/
        model.pt        parameters and buffers, whole, by name: a plain state dict
        optimizer.pt    {parameter name: {quantity: tensor}}, whole, whatever strategy trained it
        best.pt         state dict of the best network so far, if the run validates
        algorithm.pt       what the algorithm remembers, such as averaged weights
        run.pt          step, clocks, metrics not yet written: what the run itself remembers
        checkpoint.json who wrote it, and each file's SHA-256

A folder is written under another name, flushed to the disk and renamed; a kill at any byte leaves the one before it
alone. Nothing here talks to other ranks.
"""

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

from gengap_dist.errors import UsageError

State = dict[str, Any]
Report = Callable[[str], None]


# -- writing ----------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes checkpoints of one run, in a thread, one at a time; the last `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Save into `folder`; what a killed run left half-written there is removed."""
        self.folder, self.keep = folder, keep
        folder.mkdir(exist_ok=True)
        for rest in folder.glob(".*.part"):
            shutil.rmtree(rest)
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written just now."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, states: Mapping[str, State], facts: Mapping[str, Any]) -> None:
        """Copy the states to the CPU, and write them while training goes on.

        Args:
            step: optimizer steps behind them.
            states: `model`, `optimizer`, `algorithm`, `best`, `run`, each of tensors and plain values.
            facts: what a person may want to know, for checkpoint.json.

        Raises:
            OSError: what the checkpoint before this one met, on a full disk for example.
        """
        self.wait()
        copies = {name: _on_cpu(state) for name, state in states.items()}
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(facts)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was to be written is on the disk.

        Raises:
            OSError: if it could not be written; the checkpoints before it are untouched.
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
            sums = {f"{name}.pt": _write_tensors(part / f"{name}.pt", state) for name, state in states.items()}
            about = json.dumps({"schema": 1, "step": step, **facts, "sha256": sums}, indent=1)
            with (part / "checkpoint.json").open("w") as file:
                file.write(about)
                _to_disk(file.fileno())
            _folder_to_disk(part)
            if path.exists():  # a damaged one, or one from before a resume
                shutil.rmtree(path)
            part.rename(path)
            _folder_to_disk(self.folder)
            for old in sorted(steps(self.folder).items())[: -self.keep]:
                shutil.rmtree(old[1], ignore_errors=True)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            self._error = error


class _Summing:
    """A file that keeps the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch would make another of it
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_tensors(path: Path, state: State) -> str:
    with path.open("wb") as file:
        out = _Summing(file)
        try:
            torch.save(state, out)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            raise out.error or OSError(f"{path.name} could not be written") from None
        file.flush()
        _to_disk(file.fileno())
        return out.sum.hexdigest()


def _to_disk(descriptor: int) -> None:
    os.fsync(descriptor)


def _folder_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _on_cpu(value: Any) -> Any:
    """The same nest of values with every tensor copied to the CPU, cut off from the network that goes on training."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list | tuple) else value


# -- reading ----------------------------------------------------------------------------------------------------------


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's `checkpoints` folder, by step, good or damaged."""
    return {int(path.name.removeprefix("step_")): path for path in sorted(folder.glob("step_????????*"))}


def latest(folder: Path, tell: Report) -> Path | None:
    """The last checkpoint that is whole; None if nothing was saved yet.

    Args:
        folder: a run's `checkpoints`.
        tell: hears of each damaged one that is passed over.

    Raises:
        UsageError: if all there are, are damaged.
    """
    found = sorted(steps(folder).items(), reverse=True)
    reason = ""
    for _, path in found:
        if reason:
            tell(f"{reason}: {path.name}, the one before it, is used")
        if not (damage := damaged(path)):
            return path
        reason = f"checkpoint {path} is damaged ({damage})"
    if found:
        raise UsageError(f"{reason}, and there is none before it: start the run again in a new --out")
    return None


def damaged(path: Path) -> str:
    """What is wrong with a checkpoint, or nothing.

    >>> damaged(Path("nowhere"))
    'checkpoint.json is missing'
    """
    try:
        sums = json.loads((path / "checkpoint.json").read_text())["sha256"]
        for name, expected in sums.items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "checkpoint.json is not what was written"
    except OSError as error:
        return str(error.strerror)
    return ""


def load(path: Path) -> State:
    """A file of tensors and plain values, onto the CPU; nothing in it is executed.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: the run saved nothing yet; start it again in a new --out") from None
    except Exception as error:  # torch raises what the unpickler met, of many kinds
        raise UsageError(f"{path} is damaged ({type(error).__name__}): remove it and start the run again") from None


def evaluated_state(path: Path) -> State:
    """Weights that the run stands for: in place of those in model.pt an average (EMA's or SWA's), once begun.

    Args:
        path: a checkpoint's model.pt, or another file of weights, which is taken as it is.

    Raises:
        UsageError: see `load`.
    """
    average = load(path.with_name("algorithm.pt")).get("average") if path.name == "model.pt" else None
    if not average or not average["n_averaged"]:
        return load(path)
    return {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}


def restore(model: nn.Module, state: State, path: Path) -> None:
    """Load a model's parameters and buffers.

    Raises:
        UsageError: if they are another model's; the first few differences are listed.
    """
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in state]
    differences += [f"{name} is not in the model" for name in state if name not in own]
    differences += [
        f"{name} is {[*getattr(state[name], 'shape', ())]}, the model's is {[*own[name].shape]}"
        for name in own
        if name in state and getattr(state[name], "shape", None) != own[name].shape
    ]
    if differences:
        more = f", and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UsageError(
            f"{path} is of another model ({', '.join(differences[:4])}{more}): "
            "use the config that the run was started with"
        )
    model.load_state_dict(state)
