"""One rank's complete run, from config to result: the only module that selects concrete classes.

Every launcher calls `run` on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gengap_dist.compat.float32_precision import training_float32
from gengap_dist.config.identity import differences
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Normalise
from gengap_dist.data.sampler import EpochSampler, batch_size_schedule
from gengap_dist.distributed.phase_timer import PHASES
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.distributed.process_group import World, init_process_group
from gengap_dist.distributed.stall_detector import detecting_stalls
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import average_buffers, frozen_running_stats
from gengap_dist.parallel.execution import check_compiler, deterministic, keep_freed_memory
from gengap_dist.parallel.out_of_memory import explaining_out_of_memory, memory_snapshot
from gengap_dist.parallel.strategies import STRATEGIES, OptimizerState
from gengap_dist.probes.cadence import Cadence, any_of, at_steps, evenly, every, log_spaced, should_skip
from gengap_dist.probes.noise_scale import NoiseScale
from gengap_dist.probes.weights import flat_parameters
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import (
    DIVERGED,
    FINISHED,
    PREEMPTED,
    NullRecorder,
    RunRecorder,
    prepare_folder,
    read_info,
)
from gengap_dist.training.algorithms import build_algorithm
from gengap_dist.training.algorithms.base import StepResult, batch_plan_for
from gengap_dist.training.algorithms.update_bn import untrained_with_statistics
from gengap_dist.training.autotune.memory_format import resolve_memory_format
from gengap_dist.training.autotune.micro_batch import ModelShape, resolve_micro_size
from gengap_dist.training.checks import (
    check_auto_micro_size,
    check_norm,
    norm_group_sizes,
    startup_checks,
    strategy_name,
)
from gengap_dist.training.evaluation import Score, evaluate
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.observer import ProbeObserver, measurement_seconds
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.profiler.profile import NoProfile, Profile, with_profiler_clock
from gengap_dist.training.setup import (
    Diverged,
    Progress,
    build_model,
    check_shared,
    load_data,
    previous_run_info,
    sampling_system_metrics,
)
from gengap_dist.training.step import zero_contribution_pass

FLUSH_EVERY = 32  # steps whose sums are combined in one all-reduce


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    progress: Progress = lambda done, total, note: None,
    preemption_requested: Callable[[], bool] = lambda: False,
    launcher: str = "local",
) -> dict[str, Any]:
    """Train, measure and record; returns the result of run.json, the same on every rank. Collective.

    Args:
        config: the run.
        out: the run folder, created if missing (see `run_folder.prepare_folder`).
        resume: continue from the folder's checkpoint, if there is one; the value on rank 0 applies to all ranks.
        world: the ranks; None: initialise the process group from the environment.
        progress: called on every rank after every step.
        preemption_requested: called between steps; if it returns True on any rank, all ranks save and stop.
        launcher: name of the launcher, for run.json.

    Raises:
        UsageError: if the config does not match the data, the model or the machine.
        OutOfMemory: if the run does not fit in GPU memory.
        Preempted: after preemption was requested on a rank; the run can be resumed.
    """
    world = world or init_process_group(config.launch.device, config.launch.timeout_seconds)
    world = with_profiler_clock(world) if config.profile else world
    float32 = training_float32(world.device, tf32=config.train.tf32)
    stall_detection = detecting_stalls(world, config.launch.stall_report_seconds)
    memory_recording = memory_snapshot(world, out / "memory" if config.launch.memory_snapshot else None)
    with (
        stall_detection,
        deterministic(config.train.deterministic),
        float32,
        explaining_out_of_memory(world),
        memory_recording,
    ):
        if world.rank == 0 and not out.exists():  # a run of a study on a Ray cluster
            prepare_folder(out, "run.json", resume=True)
        check_shared(out, world)
        recorder = RunRecorder(out) if world.rank == 0 else NullRecorder()
        session = _Session(config, out, world, recorder, progress, launcher)
        session.start(bool(world.broadcast_int(resume)))  # a node that joins late may have another value
        try:
            with sampling_system_metrics(config, out, world):
                session.train(preemption_requested)
                result = session.result()
            recorder.finish(FINISHED, result)
        except Diverged as error:
            result = {"diverged_at_step": error.step}
            recorder.finish(DIVERGED, result, str(error))
        except Preempted as error:
            recorder.finish(PREEMPTED, {"num_steps": error.step}, str(error), flush=False)
            world.barrier()
            raise
        finally:
            session.close()
        world.barrier()  # when a rank returns, the folder is complete
    return result


class _Session:
    """The state of a run on one rank."""

    def __init__(
        self, config: RunConfig, out: Path, world: World, recorder: NullRecorder, progress: Progress, launcher: str
    ) -> None:
        self.config, self.out, self.world, self.recorder, self.progress = config, out, world, recorder, progress
        for check in startup_checks(config, world.size, world.device.type):
            check()
        if config.train.compile:
            check_compiler(world.device.type)
        if world.device.type == "cpu":
            keep_freed_memory()
        splits = load_data(config, world, progress)
        splits_on_device = datasets.place_splits(splits, config.data, world.device)
        self.train_set, self.val_set, self.test_set = (
            splits_on_device.train,
            splits_on_device.val,
            splits_on_device.test,
        )
        self.normalise = Normalise(splits, world.device, getattr(torch, config.train.dtype))
        self.batches = BatchLoader(self.train_set, self.normalise, config.data, config.seed)
        self.sampler = EpochSampler(
            len(self.train_set), config.batch.global_size, config.seed, size_schedule=batch_size_schedule(config)
        )
        self.schedule = Schedule.of(config, self.sampler)
        self.num_steps = self.schedule.num_steps

        self.model = build_model(config, splits, world)  # unsharded; self.strategy owns it after setup
        self.requested_config = config  # saved in run.json
        check_auto_micro_size(config, self.model)
        choices = config.batch.micro_size, config.train.channels_last
        if "auto" in choices:
            progress(0, 0, "measuring the fastest setting on this machine")
        network = ModelShape(self.model, splits.in_channels, splits.num_classes)
        previous_info = previous_run_info(out) if "auto" in choices else {}
        config, memory_format_info = resolve_memory_format(
            config, network, world, previous_info.get("channels_last_auto") or {}
        )
        config, micro_size_info = resolve_micro_size(config, network, world, previous_info.get("micro_size_auto") or {})
        if world.device.type == "cuda":  # without the autotuning and earlier runs of this process
            torch.cuda.reset_peak_memory_stats(world.device)
            torch.cuda.reset_accumulated_memory_stats(world.device)
        self.config = config
        self.observer = ProbeObserver(config, self.train_set, self.normalise, flat_parameters(self.model), world)
        check_norm(config, self.model, self.sampler.sizes(), world.size)
        strategy = strategy_name(config, world.size)
        self.strategy = STRATEGIES[strategy](config, world)
        has_untimed_collectives = self.strategy.has_untimed_collectives
        self.profile = (
            Profile(out, world, config, strategy, has_untimed_collectives=has_untimed_collectives)
            if config.profile
            else NoProfile()
        )
        self.checkpoint_writer = (
            checkpoint.CheckpointWriter(out / "checkpoints", config.checkpoint.keep) if world.rank == 0 else None
        )
        self.facts = {
            "data": datasets.summary(splits, config.data) if world.rank == 0 else None,
            "world_size": world.size,
            "device": str(world.device.type),
            "launcher": launcher,
            "launch_id": os.environ.get("TORCHELASTIC_RUN_ID"),
            "strategy": strategy,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "steps_per_epoch": self.sampler.steps_per_epoch,
            "num_steps": self.num_steps,
            "num_probe_samples": self.observer.num_samples,
            "norm_size": norm_group_sizes(
                config, self.model, [phase.size for phase in self.sampler.phases], world.size
            ),
            "small_size": self._noise_small_size(),
            "micro_size": config.batch.micro_size,
            "micro_size_auto": micro_size_info,
            "channels_last": config.train.channels_last,
            "channels_last_auto": memory_format_info,
        }
        self.step = 0
        self.best_val: dict[str, Any] = {}
        self.target_step: int | None = None  # the step at which train.target_accuracy was reached
        self.noise_scale = NoiseScale()
        self._pending: list[tuple[int, StepResult]] = []
        self._saved_at = time.monotonic()
        self.probe_seconds = self.eval_seconds = self.train_seconds = 0.0
        self.phase_seconds = torch.zeros(
            world.size, len(PHASES), dtype=torch.float64
        )  # [ranks, phases], since this start
        self.probe_due = _probe_cadence(config, self.sampler)
        self.skipped_probe_steps: list[int] = []
        self._probe_seconds_each, self._num_skipped_in_a_row = 0.0, 0
        self._window = time.monotonic(), 0  # start time and step of the current training window
        self._update_norm: Tensor | None = None
        self.eval_due = evenly(config.train.num_evals, self.num_steps)

    def _noise_small_size(self) -> float | None:
        """The small batch size of the noise scale, harmonic mean over ranks; None without smaller gradients."""
        size = self.config.batch.global_size
        plan = batch_plan_for(self.config, size, self.world.size)
        first_sizes = [plan.micro_batches(rank)[0].size for rank in range(self.world.size)]
        inverses = [1 / first for first in first_sizes if 0 < first < size]
        return len(inverses) / sum(inverses) if inverses else None

    # -- start and resume ---------------------------------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        """Start the run, or continue from the last valid checkpoint if `resume` and there is one. Collective."""
        path = self._last_checkpoint() if resume else None
        if path is None:
            self._setup_strategy({}, {})
            self.recorder.start(self.requested_config, self.facts)
            self.recorder.resume(0, 0.0, {})
            self.observe()
            return
        if changed := differences(read_info(self.out)["config"], self.config):
            raise UsageError(
                f"{changed} when the run in {self.out} was started: "
                "resume with the settings it was started with, or choose a new --out"
            )
        checkpoint.restore(self.model, checkpoint.load(path / "model.pt"), path / "model.pt")
        state = checkpoint.load(path / "run.pt")
        self.step, self.best_val, self.target_step = state["step"], state["best"], state["reached"]
        if self.target_step is not None and self.config.train.stop_at_target:
            self.num_steps = self.target_step
        self._setup_strategy(checkpoint.load(path / "optimizer.pt"), checkpoint.load(path / "algorithm.pt"))
        self.strategy.scaler.load_state_dict(state["scaler"])
        if self.best_val:
            self.best_val["model"] = checkpoint.load(path / "best.pt")
        self.probe_seconds, self.eval_seconds, self.train_seconds, self._probe_seconds_each = state["timers"]
        self.skipped_probe_steps, self.noise_scale = state["probe_left_out"], NoiseScale(**state["noise"])
        self.recorder.start(self.requested_config, self.facts)
        self.recorder.resume(self.step, state["seconds"], state["held"])

    def _last_checkpoint(self) -> Path | None:
        """The last checkpoint that is valid on rank 0; rank 0 decides. Collective."""
        folder, step, error = self.out / "checkpoints", -1, None
        if self.world.rank == 0:
            try:
                path = checkpoint.latest(folder, partial(warnings.warn, stacklevel=2))
                step = step if path is None else int(path.name.removeprefix("step_"))
            except UsageError as found:
                step, error = -2, found
        step = self.world.broadcast_int(step)
        if step == -2:
            raise error or UsageError("rank 0 found every checkpoint damaged")
        return None if step < 0 else checkpoint.checkpoints_by_step(folder)[step]

    def _setup_strategy(self, optimizer_state: OptimizerState, algorithm_state: dict[str, Any]) -> None:
        self.strategy.setup(self.model, partial(build_optimizer, self.config.optim))
        self.strategy.load_optimizer_state(optimizer_state)
        self.model = self.strategy.model
        if self.strategy.needs_warmup_backward:
            first = self.world.timer.phase("compute", "a first backward pass")
            with first, frozen_running_stats(self.model), self.strategy.micro_step(last=True):
                zero_contribution_pass(self.strategy, self.batches, epoch=0)
            self.strategy.optimizer.zero_grad(set_to_none=False)
        self.algorithm = build_algorithm(
            self.config, self.strategy, self.batches, self.sampler, self.schedule.num_steps
        )
        if algorithm_state:
            self.algorithm.load(algorithm_state)

    def save(self, *, wait: bool = False) -> None:
        """Write the checkpoint; with `wait`, block until it is on disk. Collective.

        Raises:
            UsageError: if `wait` and it cannot be written.
        """
        with self.world.timer.phase("checkpoint"):
            optimizer, algorithm = self.strategy.optimizer_state(), self.algorithm.state()
            with self.algorithm.unsharded_model() as model:
                if self.checkpoint_writer:
                    self._write(self.checkpoint_writer, model.state_dict(), optimizer, algorithm, wait=wait)
        self._saved_at = time.monotonic()

    def _write(
        self,
        checkpoint_writer: checkpoint.CheckpointWriter,
        model: dict[str, Tensor],
        optimizer: OptimizerState,
        algorithm: dict[str, Any],
        *,
        wait: bool,
    ) -> None:
        run = {
            "step": self.step,
            "best": {key: value for key, value in self.best_val.items() if key != "model"},
            "reached": self.target_step,
            "seconds": self.recorder.seconds(),
            "timers": [self.probe_seconds, self.eval_seconds, self.train_seconds, self._probe_seconds_each],
            "probe_left_out": self.skipped_probe_steps,
            "noise": asdict(self.noise_scale),
            "scaler": self.strategy.scaler.state_dict(),
        }
        states: dict[str, Any] = {"model": model, "optimizer": optimizer, "algorithm": algorithm}
        states |= {"best": self.best_val["model"]} if self.best_val else {}
        facts = {key: self.facts[key] for key in ("world_size", "strategy", "launcher")}
        try:
            self.recorder.flush(before=self.step)
            states["run"] = run | {"held": self.recorder.pending_rows()}
            checkpoint_writer.save(self.step, states, facts | {"mlflow_run_id": self.recorder.mlflow_run_id()})
            if wait:
                checkpoint_writer.wait()
        except OSError as error:
            latest_step = max(checkpoint.checkpoints_by_step(checkpoint_writer.folder), default=None)
            message = (
                f"a checkpoint could not be written after step {self.step} ({error.strerror or error}); "
                + ("there is none yet" if latest_step is None else f"the one of step {latest_step} is complete")
                + f": free disk space in {self.out}"
            )
            if wait:
                raise UsageError(f"{message}, then continue with --resume") from None
            warnings.warn(f"{message}; the run continues", stacklevel=2)

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and release the model."""
        with contextlib.suppress(OSError):
            if self.checkpoint_writer:
                self.checkpoint_writer.wait()
        self.profile.close()
        self.strategy.close()

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, preemption_requested: Callable[[], bool]) -> None:
        """Run all steps from the current one to the last, with evaluations, probes and checkpoints. Collective.

        Raises:
            Diverged: if the loss is not finite.
            Preempted: if preemption was requested on a rank.
        """
        config, timer = self.config, self.world.timer
        self.model.train()
        self._window = time.monotonic(), self.step
        while self.step < self.num_steps:
            timer.step = self.step + 1
            self.profile.begin(self.num_steps - self.step)
            # overlaps with the computation of this step
            any_preempted = self.world.all_reduce_async(torch.tensor([int(preemption_requested())]))
            lr, momentum = self.schedule.lr(self.step), self.schedule.momentum(self.step)
            last = self.step + 1 == self.num_steps
            logged = last or (self.step + 1) % config.train.log_every == 0
            self.strategy.track_local_grad_norm = logged and "noise_scale" in config.probe.diagnostics
            before_P = self._weights() if self._probe_possible(self.step + 1) else None
            with timer.phase("compute", "forward and backward"):
                result_of_step = self.algorithm.step(self.step, lr, momentum)
            self.step += 1
            self._update_norm = None if before_P is None else (self._weights() - before_P).double().norm()
            if logged:
                self._pending.append((self.step, result_of_step))
            self.progress(self.step, self.num_steps, "")
            preempted = bool(any_preempted()) and not last
            self._window = self._window[0] + self.profile.end(), self._window[1]
            if preempted or self.step % FLUSH_EVERY == 0 or self._flush_due():
                save_due = self._flush()
                self.train_seconds += time.monotonic() - self._window[0]
                average_buffers(self.model, self.world)
                self.observe()
                last = self.step == self.num_steps  # True if the target accuracy was reached
                if save_due or preempted or last:
                    self.save(wait=preempted or last)
                self._window = time.monotonic(), self.step
            if preempted:
                raise Preempted(self.step)
        self.profile.finish()

    def _weights(self) -> Tensor:
        """A copy of all trainable parameters, unsharded: [P]. Collective."""
        with self.algorithm.unsharded_model() as model:
            return flat_parameters(model)

    def _flush_due(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return (
            self.step == self.num_steps
            or self._probe_possible(self.step)
            or self.eval_due(self.step)
            or (every_steps is not None and self.step % every_steps == 0)
        )

    def _probe_possible(self, step: int) -> bool:
        return self.config.probe.enabled and (step == self.num_steps or self.probe_due(step))

    def _epoch(self, step: int) -> float:
        return self.sampler.epochs_done(step)

    def _flush(self) -> bool:
        """Record the pending steps; returns whether a checkpoint is due, by step or by rank 0's clock. Collective.

        Synchronises once with the GPU, for the sums of the steps. Other values are reduced in CPU memory.
        """
        rows = self._reduce_pending_sums()
        every_steps = self.config.checkpoint.every_steps
        overdue = time.monotonic() - self._saved_at > self.config.checkpoint.every_seconds
        shared = torch.zeros(2 + self.phase_seconds.numel(), dtype=torch.float64)
        times = shared[2:].view_as(self.phase_seconds)
        times[self.world.rank] = torch.tensor(self.world.timer.pop_seconds())
        if self.checkpoint_writer:  # rank 0, which decides by its clock
            shared[:2] = torch.tensor([overdue and not self.checkpoint_writer.busy, self._probe_to_skip()])
        self.world.all_reduce(shared, "times of the last steps")
        save_due, skip_probe = shared[:2].bool().tolist()
        self._num_skipped_in_a_row += skip_probe
        self.skipped_probe_steps += [self.step] if skip_probe else []
        for (step, result_of_step), (loss, correct, *small, penalty, mean_squared_norm, norm) in zip(
            self._pending, rows, strict=True
        ):
            size, norm = result_of_step.size, mean_squared_norm**0.5 if result_of_step.norm is None else norm
            loss /= size
            metrics = {
                "train/loss": loss,
                "train/accuracy": correct / size,
                "train/grad_norm": norm,
                "train/lr": result_of_step.lr,
            }
            if self.config.algorithm.rank_penalty is not None:
                metrics["train/rank_penalty"] = penalty
            if self.config.optim.schedule == "grow":
                metrics["train/global_size"] = size
            self.recorder.log(step, self._epoch(step), metrics | self._noise_metrics(small, norm, size))
            if not math.isfinite(loss):
                self._pending.clear()
                raise Diverged(step, loss)
        self._pending.clear()
        self.phase_seconds += times
        self.recorder.log(self.step, self._epoch(self.step), _time_metrics(times))
        return save_due or (every_steps is not None and self.step % every_steps == 0)

    def _reduce_pending_sums(self) -> list[list[float]]:
        """The sums of `accumulate` over all ranks and the gradient norm of each pending step. Collective."""
        if not self._pending:
            return []
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        gradient_norms = [
            result_of_step.norm if self.world.rank == 0 and result_of_step.norm is not None else zero
            for _, result_of_step in self._pending
        ]
        sums = torch.stack([result_of_step.sums for _, result_of_step in self._pending])
        norms = torch.stack([norm.double() for norm in gradient_norms])  # equal on all ranks: only rank 0 contributes
        return self.world.all_reduce_to_cpu(torch.cat([sums, norms[:, None]], 1), "metrics of the last steps").tolist()

    def _noise_metrics(self, small: list[float], norm: float, size: int) -> dict[str, float]:
        """The noise scale after a step, if it has gradients of two batch sizes."""
        squares, inverses, count = small
        if not count or count / inverses >= size or not math.isfinite(squares + norm):
            return {}
        self.noise_scale.add(squares / count, count / inverses, norm**2, size)
        return self.noise_scale.metrics()

    def _probe_to_skip(self) -> bool:
        """Whether to skip the measurement due at this step; the first and last step are never skipped."""
        max_time_fraction = self.config.probe.max_time_fraction
        if max_time_fraction is None or self.step == self.num_steps or not self._probe_possible(self.step):
            return False
        start_time, step = self._window  # without setup, which happens once
        each_step = (time.monotonic() - start_time) / (self.step - step)
        elapsed = self.recorder.seconds() - self.probe_seconds
        return should_skip(
            max_time_fraction,
            spent_seconds=self.probe_seconds,
            seconds_each=self._probe_seconds_each,
            other_seconds=elapsed + (self.num_steps - self.step) * each_step,
            num_remaining=sum(map(self.probe_due, range(self.step, self.num_steps))),
            num_skipped_in_a_row=self._num_skipped_in_a_row,
        )

    # -- measurements -------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Validate and probe, if due at this step. Collective."""
        is_first_or_last = self.step in (0, self.num_steps)
        validate = len(self.val_set) and (is_first_or_last or self.eval_due(self.step))
        skipped = self.step in self.skipped_probe_steps[-1:]
        probe = self.config.probe.enabled and (is_first_or_last or (self.probe_due(self.step) and not skipped))
        if not (validate or probe):
            return
        with self.algorithm.evaluated_model() as model:
            if self.step == 0:
                with self.world.timer.phase("evaluation"):
                    model = untrained_with_statistics(model, self.batches, self.world, self.config.batch.ghost_size)
            if validate:
                with self.world.timer.phase("evaluation"):
                    self.validate(model)
            if probe or (
                self.config.probe.enabled and self.step == self.num_steps
            ):  # True if the target was just reached
                with self.world.timer.phase("probe"):
                    self.probe(model)

    def validate(self, model: nn.Module) -> None:
        """Evaluate on the validation images, and keep the model if it is the best so far. Collective."""
        start_time = time.monotonic()
        score = self._score(model, self.val_set)
        if score.accuracy > self.best_val.get("accuracy", -1.0):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            self.best_val = {"step": self.step, "accuracy": score.accuracy, "model": state}
        self.recorder.log(self.step, self._epoch(self.step), {"val/loss": score.loss, "val/accuracy": score.accuracy})
        train = self.config.train
        if self.target_step is None and train.target_accuracy is not None and score.accuracy >= train.target_accuracy:
            self.target_step = self.step
            if train.stop_at_target:
                self.num_steps = self.step
        self.eval_seconds += time.monotonic() - start_time
        self.progress(self.step, self.num_steps, f"val {score.accuracy:.1%}")

    def probe(self, model: nn.Module) -> None:
        """Measure near-rank loss and diagnostics on the probe set; at both ends also controls. Collective."""
        start_time = time.monotonic()
        is_first_or_last = self.step in (0, self.num_steps)
        metrics, spectra = self.observer(model, controls=is_first_or_last)
        for probe_set, layer_spectra in spectra.items():
            self.recorder.spectra(self.step, layer_spectra, probe_set)
        if self._update_norm is not None and "norms" in self.config.probe.diagnostics:
            metrics["train/update_norm"] = float(self._update_norm)
        self.recorder.log(self.step, self._epoch(self.step), metrics)
        self.probe_seconds += time.monotonic() - start_time
        self._probe_seconds_each, self._num_skipped_in_a_row = measurement_seconds(metrics), 0

    def _target_metrics(self) -> dict[str, Any]:
        """Updates and epochs to train.target_accuracy, None if it was not reached; {} without a target."""
        if self.config.train.target_accuracy is None:
            return {}
        epochs = None if self.target_step is None else self._epoch(self.target_step)
        return {"updates_to_target": self.target_step, "epochs_to_target": epochs}

    def _score(self, model: nn.Module, images: datasets.Images) -> Score:
        return evaluate(model, images, self.normalise, self.world)

    def result(self) -> dict[str, Any]:
        """Evaluate the last and the best model on the test images, which are used only here. Collective."""
        with self.algorithm.evaluated_model() as model, self.world.timer.phase("evaluation"):
            train, test = self._score(model, self.train_set), self._score(model, self.test_set)
            if not math.isfinite(train.loss):  # the loss of a step belongs to the weights before it
                raise Diverged(self.step, train.loss, "train_full/loss")
            out = {
                "train_full/loss": train.loss,
                "train_full/accuracy": train.accuracy,
                "test/loss": test.loss,
                "test/accuracy": test.accuracy,
                "train_test_gap": train.accuracy - test.accuracy,
            }
            if self.best_val:
                model.load_state_dict(self.best_val["model"])
                out["test_at_best_val/accuracy"] = self._score(model, self.test_set).accuracy
        reached = {name: value for name, value in self._target_metrics().items() if value is not None}
        self.recorder.log(self.step, self._epoch(self.step), out | reached)
        samples = self._epoch(self.step) * len(self.train_set)
        return (
            out
            | {
                "best_val_step": self.best_val.get("step"),
                "best_val/accuracy": self.best_val.get("accuracy"),
                "num_steps": self.step,
                **self._target_metrics(),
                "train_seconds": round(self.train_seconds, 3),
                "probe_seconds": round(self.probe_seconds, 3),
                "probe_left_out": self.skipped_probe_steps,
                "eval_seconds": round(self.eval_seconds, 3),
                "images_per_second": round(samples / max(self.train_seconds, 1e-9), 1),
            }
            | _time_metrics(self.phase_seconds)
            | _memory_peaks(self.world)
        )


def _time_metrics(times: Tensor) -> dict[str, float]:
    """Mean seconds by phase, and the slowest rank, from seconds by rank and phase [ranks, phases].

    >>> seconds = torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]])
    >>> _time_metrics(seconds)["time/slowest_rank"]
    0
    """
    out: dict[str, float] = {f"time/{kind}": round(float(x), 4) for kind, x in zip(PHASES, times.mean(0), strict=True)}
    busy_seconds = times[:, :2].sum(1)  # data and compute; other ranks wait, which counts as communication
    if len(busy_seconds) > 1 and busy_seconds.sum() > 0:
        slowest = int(busy_seconds.argmax())
        out |= {
            "time/slowest_rank": slowest,
            "time/slowest_over_mean": round(float(busy_seconds[slowest] / busy_seconds.mean()), 3),
        }
    return out


def _memory_peaks(world: World) -> dict[str, list[float]]:
    """Peak GPU memory allocated by torch since this start, in GiB, by rank; {} on CPUs. Collective."""
    if world.device.type != "cuda":
        return {}
    peaks = torch.zeros(world.size, dtype=torch.float64)
    peaks[world.rank] = torch.cuda.max_memory_allocated(world.device) / 2**30
    return {"memory_peak_gib": [round(peak, 3) for peak in world.all_reduce(peaks, "peaks of memory").tolist()]}


def _probe_cadence(config: RunConfig, sampler: EpochSampler) -> Cadence:
    """The steps at which the run measures, in addition to the first and the last."""
    probe = config.probe
    cadences = [at_steps(map(sampler.step_at, probe.at_epochs))]
    cadences += [log_spaced(probe.per_decade)] if probe.per_decade else []
    cadences += [every(probe.every)] if probe.every else []
    return any_of(*cadences)
