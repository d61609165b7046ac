"""When a run saves checkpoints, and from which one it continues."""

import contextlib
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

from pydantic import BaseModel, NonNegativeInt, ValidationError

from gengap_dist.config.sections import CheckpointConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import NullRecorder
from gengap_dist.runs.schema import first_error

SCHEMA = 2  # of run.pt


@final
class CheckpointManager:
    """The checkpoints of one run. Rank 0 writes them, and decides by its clock and its disk."""

    def __init__(self, config: CheckpointConfig, out: Path, world: World, recorder: NullRecorder) -> None:
        """Checkpoints in the run folder `out`, in which `recorder` writes the metrics."""
        self.config, self.world, self.recorder, self.folder = config, world, recorder, out / "checkpoints"
        self.writer = checkpoint.CheckpointWriter(self.folder, config.keep) if world.rank == 0 else None
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether checkpoint.every_steps asks for one after `step` steps."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def overdue(self) -> bool:
        """Whether checkpoint.every_seconds asks for one now; False on ranks other than 0."""
        late = time.monotonic() - self._saved_at > self.config.every_seconds
        return late and self.writer is not None and not self.writer.busy

    def latest(self) -> Path | None:
        """The last checkpoint that is valid on rank 0; None if there is none. Collective.

        Raises:
            UsageError: if all are damaged.
        """
        step, error = -1, None
        if self.writer:
            try:
                path = checkpoint.latest(self.folder, partial(warnings.warn, stacklevel=2))
                step = step if path is None else checkpoint.step_of(path)
            except UsageError as found:
                step, error = -2, found
        step = self.world.broadcast_int(step)
        if step == -2:
            raise error or UsageError("rank 0 found every checkpoint damaged")
        return None if step < 0 else checkpoint.checkpoints_by_step(self.folder)[step]

    def save(self, step: int, states: Mapping[str, Any], facts: Mapping[str, Any], *, wait: bool) -> None:
        """Write a checkpoint in the background; with `wait`, return when it is on disk. Does nothing on other ranks.

        All metrics of earlier steps are written before; the checkpoint holds those of `step`, which may still grow. If
        it cannot be written, the run continues with a warning.

        Args:
            step: number of optimizer steps done.
            states: by file; see `CheckpointWriter.save`.
            facts: `config`, and information for people.
            wait: wait until it is on disk.

        Raises:
            UsageError: if `wait` and it cannot be written.
        """
        if self.writer is None:
            return
        run_id = self.recorder.run_id()
        try:
            self.recorder.flush(before=step)
            run = {"schema": SCHEMA, **states["run"], "pending_rows": self.recorder.pending_rows()}
            ids = {"run": run_id, "mlflow_run_id": self.recorder.mlflow_run_id()}
            self.writer.save(step, {**states, "run": run}, {**facts, **ids})
            if wait:
                self.writer.wait()
        except OSError as error:
            latest_step = self.writer.latest_step(run_id)
            message = (
                f"a checkpoint could not be written after step {step} ({error.strerror or error}); "
                + ("there is none yet" if latest_step is None else f"the one of step {latest_step} is complete")
                + (
                    ": move it away"
                    if isinstance(error, FileExistsError)
                    else f": free disk space in {self.folder.parent}"
                )
            )
            if wait:
                raise UsageError(f"{message}, then continue with --resume") from None
            warnings.warn(f"{message}; the run continues", stacklevel=2)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Wait for a checkpoint that is being written."""
        with contextlib.suppress(OSError):
            if self.writer:
                self.writer.wait()


def read_run_state(path: Path) -> dict[str, Any]:
    """The content of run.pt of a checkpoint, also of one that an earlier version wrote.

    Raises:
        UsageError: if a later version wrote it.
    """
    state = checkpoint.load(path / "run.pt")
    if (schema := state.get("schema")) == SCHEMA:
        return _checked(state, path)
    if schema is not None:
        raise UsageError(
            f"{path / 'run.pt'} has schema {schema}, and this version reads up to {SCHEMA}: continue with the version "
            "of gengap_dist that wrote it"
        )
    timers = state.get("timers")
    probe_seconds, eval_seconds, train_seconds, seconds_each = timers if timers and len(timers) == 4 else [None] * 4
    renamed = {
        "train": {"step": state.get("step"), "train_seconds": train_seconds},
        "seconds": state.get("seconds"),
        "scaler": state.get("scaler"),
        "pending_rows": state.get("held"),
        "evaluator": {"best": state.get("best"), "target_step": state.get("reached"), "seconds": eval_seconds},
        "probes": {
            "seconds": probe_seconds, "seconds_each": seconds_each, "skipped_steps": state.get("probe_left_out"),
        },
        "step_metrics": state.get("noise"),
    }  # fmt: skip
    return _checked(renamed, path)


class _Train(BaseModel):
    step: NonNegativeInt
    train_seconds: float


class _Best(BaseModel):
    step: NonNegativeInt


class _Evaluator(BaseModel):
    best: _Best | dict[Any, Any]
    target_step: int | None
    seconds: float


class _Probes(BaseModel):
    seconds: float
    seconds_each: Any
    skipped_steps: list[int]


class _RunState(BaseModel):
    """What a run reads of run.pt."""

    train: _Train
    seconds: float
    scaler: dict[str, Any]
    pending_rows: dict[int, dict[str, float]]
    evaluator: _Evaluator
    probes: _Probes
    step_metrics: dict[str, Any]


def _checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        _RunState.model_validate(state)
    except ValidationError as error:
        raise UsageError(f"{path / 'run.pt'} is damaged: {first_error(error)}; remove this checkpoint") from None
    return state
