"""One rank's whole run, from config to result: the only place that picks concrete classes.

Every launcher ends here, on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
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
from gengap_dist.probes.cadence import Cadence, at, either, evenly, every, exceeds, log_spaced
from gengap_dist.probes.noise_scale import NoiseScale
from gengap_dist.probes.weights import flat
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
from gengap_dist.training.checks import before_data, check_auto, check_norm, norm_size, strategy_name
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
    facts_before,
    load_data,
    sampling_system_metrics,
)
from gengap_dist.training.step import zero_contribution_pass

FLUSH_EVERY = 32  # steps whose sums meet the other ranks' in one all-reduce


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
    """Train, measure, record; the result as it stands in run.json, the same on every rank. Collective.

    Args:
        config: the run.
        out: its folder, made here if it is not there (see `run_folder.prepare_folder`).
        resume: go on from the folder's checkpoint, if there is one; rank 0's word holds for all.
        world: this process's place among the ranks; None connects as the environment says.
        progress: called on every rank after every step.
        leaving: looked at between steps; when it is true on any rank, all save and leave.
        launcher: what started the ranks, for the record.

    Raises:
        UsageError: if the config does not fit the data, the model or the machine.
        OutOfMemory: if it does not fit a GPU.
        Preempted: after a rank was asked to leave; the folder is ready to be resumed.
    """
    world = world or init_process_group(config.launch.device, config.launch.timeout_seconds)
    world = with_profiler_clock(world) if config.profile else world
    float32 = training_float32(world.device, tf32=config.train.tf32)
    watched = detecting_stalls(world, config.launch.stall_report_seconds)
    recorded = memory_snapshot(world, out / "memory" if config.launch.memory_snapshot else None)
    with watched, deterministic(config.train.deterministic), float32, explaining_out_of_memory(world), recorded:
        if world.rank == 0 and not out.exists():  # a study's run on a Ray cluster
            prepare_folder(out, "run.json", resume=True)
        check_shared(out, world)
        record = RunRecorder(out) if world.rank == 0 else NullRecorder()
        session = _Session(config, out, world, record, progress, launcher)
        session.start(bool(world.broadcast_int(resume)))  # a node that joins late cannot know what the others were told
        try:
            with sampling_system_metrics(config, out, world):
                session.train(preemption_requested)
                result = session.result()
            record.finish(FINISHED, result)
        except Diverged as error:
            result = {"diverged_at_step": error.step}
            record.finish(DIVERGED, result, str(error))
        except Preempted as error:
            record.finish(PREEMPTED, {"num_steps": error.step}, str(error), flush=False)
            world.barrier()
            raise
        finally:
            session.close()
        world.barrier()  # when any rank returns, the folder is complete
    return result


class _Session:
    """What a run holds between steps, on one rank."""

    def __init__(
        self, config: RunConfig, out: Path, world: World, record: NullRecorder, progress: Progress, launcher: str
    ) -> None:
        self.config, self.out, self.world, self.record, self.progress = config, out, world, record, progress
        for check in before_data(config, world.size, world.device.type):
            check()
        if config.train.compile:
            check_compiler(world.device.type)
        if world.device.type == "cpu":
            keep_freed_memory()
        splits = load_data(config, world, progress)
        there = datasets.placed(splits, config.data, world.device)
        self.train_set, self.val_set, self.test_set = there.train, there.val, there.test
        self.normalise = Normalise(splits, world.device, getattr(torch, config.train.dtype))
        self.batches = BatchLoader(self.train_set, self.normalise, config.data, config.seed)
        self.order = EpochSampler(
            len(self.train_set), config.batch.global_size, config.seed, growth=batch_size_schedule(config)
        )
        self.schedule = Schedule.of(config, self.order)
        self.num_steps = self.schedule.num_steps

        self.model = build_model(config, splits, world)  # all of it; once the strategy has it, only the strategy does
        self.given = config  # what the record keeps
        check_auto(config, self.model)
        choices = config.batch.micro_size, config.train.channels_last
        if "auto" in choices:
            progress(0, 0, "measuring what is fastest here")
        network = ModelShape(self.model, splits.in_channels, splits.num_classes)
        before = facts_before(out) if "auto" in choices else {}
        config, order_how = resolve_memory_format(config, network, world, before.get("channels_last_auto") or {})
        config, size_how = resolve_micro_size(config, network, world, before.get("micro_size_auto") or {})
        if world.device.type == "cuda":  # neither what was tried counts nor an earlier run of this process
            torch.cuda.reset_peak_memory_stats(world.device)
            torch.cuda.reset_accumulated_memory_stats(world.device)
        self.config = config
        self.observer = ProbeObserver(config, self.train_set, self.normalise, flat(self.model), world)
        check_norm(config, self.model, self.order.sizes(), world.size)
        strategy = strategy_name(config, world.size)
        self.strategy = STRATEGIES[strategy](config, world)
        hidden = self.strategy.has_untimed_collectives
        self.profile = Profile(out, world, config, strategy, hidden=hidden) if config.profile else NoProfile()
        self.saver = (
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
            "steps_per_epoch": self.order.steps_per_epoch,
            "num_steps": self.num_steps,
            "num_probe_samples": self.observer.num_samples,
            "norm_size": norm_size(config, self.model, [phase.size for phase in self.order.phases], world.size),
            "small_size": self._small_size(),
            "micro_size": config.batch.micro_size,
            "micro_size_auto": size_how,
            "channels_last": config.train.channels_last,
            "channels_last_auto": order_how,
        }
        self.step = 0
        self.best: dict[str, Any] = {}
        self.reached: int | None = None  # the step after which train.target_accuracy was met
        self.noise = NoiseScale()
        self._pending: list[tuple[int, StepResult]] = []
        self._saved_at = time.monotonic()
        self.probe_seconds = self.eval_seconds = self.train_seconds = 0.0
        self.times = torch.zeros(world.size, len(PHASES), dtype=torch.float64)  # by rank, since this start
        self.probe_due = _cadence(config, self.order)
        self.probe_left_out: list[int] = []
        self._probe_seconds_each, self._left_out_in_a_row = 0.0, 0
        self._window = time.monotonic(), 0  # since when training goes on, and from which step
        self._update_norm: Tensor | None = None
        self.eval_due = evenly(config.train.num_evals, self.num_steps)

    def _small_size(self) -> float | None:
        """B of the noise scale, the harmonic mean over ranks; None if there is no gradient smaller than the batch."""
        size = self.config.batch.global_size
        plan = batch_plan_for(self.config, size, self.world.size)
        firsts = [plan.micro_batches(rank)[0].size for rank in range(self.world.size)]
        inverses = [1 / first for first in firsts if 0 < first < size]
        return len(inverses) / sum(inverses) if inverses else None

    # -- start and resume ---------------------------------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        """Begin, or go on from the last good checkpoint if that was asked for and there is one. Collective."""
        path = self._last_checkpoint() if resume else None
        if path is None:
            self._set_up({}, {})
            self.record.start(self.given, self.facts)
            self.record.resume(0, 0.0, {})
            self.observe()
            return
        if changed := differences(read_info(self.out)["config"], self.config):
            raise UsageError(
                f"{changed} when the run in {self.out} began: "
                "resume with the settings it was started with, or choose a new --out"
            )
        checkpoint.restore(self.model, checkpoint.load(path / "model.pt"), path / "model.pt")
        state = checkpoint.load(path / "run.pt")
        self.step, self.best, self.reached = state["step"], state["best"], state["reached"]
        if self.reached is not None and self.config.train.stop_at_target:
            self.num_steps = self.reached
        self._set_up(checkpoint.load(path / "optimizer.pt"), checkpoint.load(path / "algorithm.pt"))
        self.strategy.scaler.load_state_dict(state["scaler"])
        if self.best:
            self.best["model"] = checkpoint.load(path / "best.pt")
        self.probe_seconds, self.eval_seconds, self.train_seconds, self._probe_seconds_each = state["timers"]
        self.probe_left_out, self.noise = state["probe_left_out"], NoiseScale(**state["noise"])
        self.record.start(self.given, self.facts)
        self.record.resume(self.step, state["seconds"], state["held"])

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint that rank 0 finds good; the other ranks take its word. Collective."""
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
        return None if step < 0 else checkpoint.steps(folder)[step]

    def _set_up(self, optimizer_state: OptimizerState, algorithm_state: dict[str, Any]) -> None:
        self.strategy.setup(self.model, partial(build_optimizer, self.config.optim))
        self.strategy.load_optimizer_state(optimizer_state)
        self.model = self.strategy.model
        if self.strategy.needs_warmup_backward:
            first = self.world.timer.phase("compute", "a first backward pass")
            with first, frozen_running_stats(self.model), self.strategy.micro_step(last=True):
                zero_contribution_pass(self.strategy, self.batches, epoch=0)
            self.strategy.optimizer.zero_grad(set_to_none=False)
        self.course = build_algorithm(self.config, self.strategy, self.batches, self.order, self.schedule.num_steps)
        if algorithm_state:
            self.course.load(algorithm_state)

    def save(self, *, wait: bool = False) -> None:
        """Write the checkpoint; with `wait`, until it is on the disk. Collective.

        Raises:
            UsageError: with `wait`, if it cannot be written.
        """
        with self.world.timer.phase("checkpoint"):
            optimizer, algorithm = self.strategy.optimizer_state(), self.course.state()
            with self.course.unsharded_model() as model:
                if self.saver:
                    self._write(self.saver, model.state_dict(), optimizer, algorithm, wait=wait)
        self._saved_at = time.monotonic()

    def _write(
        self,
        saver: checkpoint.CheckpointWriter,
        model: dict[str, Tensor],
        optimizer: OptimizerState,
        algorithm: dict[str, Any],
        *,
        wait: bool,
    ) -> None:
        run = {
            "step": self.step,
            "best": {key: value for key, value in self.best.items() if key != "model"},
            "reached": self.reached,
            "seconds": self.record.seconds(),
            "timers": [self.probe_seconds, self.eval_seconds, self.train_seconds, self._probe_seconds_each],
            "probe_left_out": self.probe_left_out,
            "noise": asdict(self.noise),
            "scaler": self.strategy.scaler.state_dict(),
        }
        states: dict[str, Any] = {"model": model, "optimizer": optimizer, "algorithm": algorithm}
        states |= {"best": self.best["model"]} if self.best else {}
        facts = {key: self.facts[key] for key in ("world_size", "strategy", "launcher")}
        try:
            self.record.flush(before=self.step)
            states["run"] = run | {"held": self.record.pending_rows()}
            saver.save(self.step, states, facts | {"mlflow_run_id": self.record.mlflow_run_id()})
            if wait:
                saver.wait()
        except OSError as error:
            kept = max(checkpoint.steps(saver.folder), default=None)
            message = (
                f"a checkpoint could not be written after step {self.step} ({error.strerror or error}); "
                + ("there is none yet" if kept is None else f"the one of step {kept} is whole")
                + f": make room in {self.out}"
            )
            if wait:
                raise UsageError(f"{message}, then add --resume") from None
            warnings.warn(f"{message}; the run goes on", stacklevel=2)

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, and let go of the model."""
        with contextlib.suppress(OSError):
            if self.saver:
                self.saver.wait()
        self.profile.close()
        self.strategy.close()

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, leaving: Callable[[], bool]) -> None:
        """Every step from the current one to the last, with what is due in between. Collective.

        Raises:
            Diverged: if the loss is not a number.
            Preempted: if a rank was asked to leave.
        """
        config, where = self.config, self.world.timer
        self.model.train()
        self._window = time.monotonic(), self.step
        while self.step < self.num_steps:
            where.step = self.step + 1
            self.profile.begin(self.num_steps - self.step)
            asked = self.world.all_reduce_async(torch.tensor([int(leaving())]))  # it crosses while this step computes
            lr, momentum = self.schedule.lr(self.step), self.schedule.momentum(self.step)
            last = self.step + 1 == self.num_steps
            logged = last or (self.step + 1) % config.train.log_every == 0
            self.strategy.track_local_grad_norm = logged and "noise_scale" in config.probe.diagnostics
            before_P = self._weights() if self._probe_may_come(self.step + 1) else None
            with where.phase("compute", "forward and backward"):
                taken = self.course.step(self.step, lr, momentum)
            self.step += 1
            self._update_norm = None if before_P is None else (self._weights() - before_P).double().norm()
            if logged:
                self._pending.append((self.step, taken))
            self.progress(self.step, self.num_steps, "")
            leave = bool(asked()) and not last
            self._window = self._window[0] + self.profile.end(), self._window[1]
            if leave or self.step % FLUSH_EVERY == 0 or self._due():
                save_due = self._flush()
                self.train_seconds += time.monotonic() - self._window[0]
                average_buffers(self.model, self.world)
                self.observe()
                last = self.step == self.num_steps  # which it may have become: the target is met
                if save_due or leave or last:
                    self.save(wait=leave or last)
                self._window = time.monotonic(), self.step
            if leave:
                raise Preempted(self.step)
        self.profile.finish()

    def _weights(self) -> Tensor:
        """A copy of all trainable parameters, whole: [P]. Collective."""
        with self.course.unsharded_model() as model:
            return flat(model)

    def _due(self) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return (
            self.step == self.num_steps
            or self._probe_may_come(self.step)
            or self.eval_due(self.step)
            or (every_steps is not None and self.step % every_steps == 0)
        )

    def _probe_may_come(self, step: int) -> bool:
        return self.config.probe.enabled and (step == self.num_steps or self.probe_due(step))

    def _epoch(self, step: int) -> float:
        return self.order.epochs_done(step)

    def _flush(self) -> bool:
        """Record the pending steps; whether a checkpoint is due by steps or by rank 0's clock. Collective.

        A GPU is waited for once, for the sums of the steps. What ranks know without it crosses in the CPU's memory.
        """
        rows = self._sums_of_steps()
        every_steps = self.config.checkpoint.every_steps
        overdue = time.monotonic() - self._saved_at > self.config.checkpoint.every_seconds
        mine = torch.zeros(2 + self.times.numel(), dtype=torch.float64)
        times = mine[2:].view_as(self.times)
        times[self.world.rank] = torch.tensor(self.world.timer.pop_seconds())
        if self.saver:  # rank 0, whose clock and budget hold for all
            mine[:2] = torch.tensor([overdue and not self.saver.busy, self._probe_exceeds_budget()])
        self.world.all_reduce(mine, "times of the last steps")
        save_due, leave_out = mine[:2].bool().tolist()
        self._left_out_in_a_row += leave_out
        self.probe_left_out += [self.step] if leave_out else []
        for (step, taken), (loss, correct, *small, extra, square, norm) in zip(self._pending, rows, strict=True):
            size, norm = taken.size, square**0.5 if taken.norm is None else norm
            loss /= size
            found = {
                "train/loss": loss,
                "train/accuracy": correct / size,
                "train/grad_norm": norm,
                "train/lr": taken.lr,
            }
            if self.config.algorithm.rank_penalty is not None:
                found["train/rank_penalty"] = extra
            if self.config.optim.schedule == "grow":
                found["train/global_size"] = size
            self.record.log(step, self._epoch(step), found | self._noise(small, norm, size))
            if not math.isfinite(loss):
                self._pending.clear()
                raise Diverged(step, loss)
        self._pending.clear()
        self.times += times
        self.record.log(self.step, self._epoch(self.step), _split(times))
        return save_due or (every_steps is not None and self.step % every_steps == 0)

    def _sums_of_steps(self) -> list[list[float]]:
        """Of each pending step the sums of `accumulate` over all ranks, and the norm of its gradient. Collective."""
        if not self._pending:
            return []
        none = torch.zeros((), dtype=torch.float64, device=self.world.device)
        known = [taken.norm if self.world.rank == 0 and taken.norm is not None else none for _, taken in self._pending]
        sums = torch.stack([taken.sums for _, taken in self._pending])
        norms = torch.stack([norm.double() for norm in known])  # one number on all ranks: rank 0 gives it
        return self.world.all_reduce_to_cpu(torch.cat([sums, norms[:, None]], 1), "metrics of the last steps").tolist()

    def _noise(self, small: list[float], norm: float, size: int) -> dict[str, float]:
        """The noise scale after a step, if its gradients came in two sizes."""
        squares, inverses, count = small
        if not count or count / inverses >= size or not math.isfinite(squares + norm):
            return {}
        self.noise.add(squares / count, count / inverses, norm**2, size)
        return self.noise.metrics()

    def _probe_exceeds_budget(self) -> bool:
        """Whether to leave out the measurement that the cadence has for this step; the ends are always measured."""
        budget = self.config.probe.max_time_fraction
        if budget is None or self.step == self.num_steps or not self._probe_may_come(self.step):
            return False
        began, step = self._window  # not all of the run: what came before its first step comes once
        each_step = (time.monotonic() - began) / (self.step - step)
        elapsed = self.record.seconds() - self.probe_seconds
        return exceeds(
            budget,
            spent=self.probe_seconds,
            each=self._probe_seconds_each,
            rest_of_run=elapsed + (self.num_steps - self.step) * each_step,
            num_to_come=sum(map(self.probe_due, range(self.step, self.num_steps))),
            left_out_in_a_row=self._left_out_in_a_row,
        )

    # -- measurements -------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Validate and probe, whichever is due at this step. Collective."""
        edge = self.step in (0, self.num_steps)
        validate = len(self.val_set) and (edge or self.eval_due(self.step))
        left_out = self.step in self.probe_left_out[-1:]
        probe = self.config.probe.enabled and (edge or (self.probe_due(self.step) and not left_out))
        if not (validate or probe):
            return
        with self.course.evaluated_model() as model:
            if self.step == 0:
                with self.world.timer.phase("evaluation"):
                    model = untrained_with_statistics(model, self.batches, self.world, self.config.batch.ghost_size)
            if validate:
                with self.world.timer.phase("evaluation"):
                    self.validate(model)
            if probe or (self.config.probe.enabled and self.step == self.num_steps):  # which it may have just become
                with self.world.timer.phase("probe"):
                    self.probe(model)

    def validate(self, model: nn.Module) -> None:
        """Score the validation images, and remember the model if it is the best so far. Collective."""
        began = time.monotonic()
        score = self._score(model, self.val_set)
        if score.accuracy > self.best.get("accuracy", -1.0):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            self.best = {"step": self.step, "accuracy": score.accuracy, "model": state}
        self.record.log(self.step, self._epoch(self.step), {"val/loss": score.loss, "val/accuracy": score.accuracy})
        train = self.config.train
        if self.reached is None and train.target_accuracy is not None and score.accuracy >= train.target_accuracy:
            self.reached = self.step
            if train.stop_at_target:
                self.num_steps = self.step
        self.eval_seconds += time.monotonic() - began
        self.progress(self.step, self.num_steps, f"val {score.accuracy:.1%}")

    def probe(self, model: nn.Module) -> None:
        """Measure near-rank loss and its diagnostics on the probe set; at both ends also the controls. Collective."""
        began = time.monotonic()
        edge = self.step in (0, self.num_steps)
        found, spectra = self.observer(model, controls=edge)
        for probe_set, spectra_of_it in spectra.items():
            self.record.spectra(self.step, spectra_of_it, probe_set)
        if self._update_norm is not None and "norms" in self.config.probe.diagnostics:
            found["train/update_norm"] = float(self._update_norm)
        self.record.log(self.step, self._epoch(self.step), found)
        self.probe_seconds += time.monotonic() - began
        self._probe_seconds_each, self._left_out_in_a_row = measurement_seconds(found), 0

    def _to_target(self) -> dict[str, Any]:
        """Updates and epochs to train.target_accuracy, None if it was not reached; nothing without a target."""
        if self.config.train.target_accuracy is None:
            return {}
        epochs = None if self.reached is None else self._epoch(self.reached)
        return {"updates_to_target": self.reached, "epochs_to_target": epochs}

    def _score(self, model: nn.Module, images: datasets.Images) -> Score:
        return evaluate(model, images, self.normalise, self.world)

    def result(self) -> dict[str, Any]:
        """Score the last and the best model on the test images: the only time they are touched. Collective."""
        with self.course.evaluated_model() as model, self.world.timer.phase("evaluation"):
            train, test = self._score(model, self.train_set), self._score(model, self.test_set)
            if not math.isfinite(train.loss):  # the loss of a step is of the weights before it
                raise Diverged(self.step, train.loss, "train_full/loss")
            out = {
                "train_full/loss": train.loss,
                "train_full/accuracy": train.accuracy,
                "test/loss": test.loss,
                "test/accuracy": test.accuracy,
                "train_test_gap": train.accuracy - test.accuracy,
            }
            if self.best:
                model.load_state_dict(self.best["model"])
                out["test_at_best_val/accuracy"] = self._score(model, self.test_set).accuracy
        reached = {name: value for name, value in self._to_target().items() if value is not None}
        self.record.log(self.step, self._epoch(self.step), out | reached)
        samples = self._epoch(self.step) * len(self.train_set)
        return (
            out
            | {
                "best_val_step": self.best.get("step"),
                "best_val/accuracy": self.best.get("accuracy"),
                "num_steps": self.step,
                **self._to_target(),
                "train_seconds": round(self.train_seconds, 3),
                "probe_seconds": round(self.probe_seconds, 3),
                "probe_left_out": self.probe_left_out,
                "eval_seconds": round(self.eval_seconds, 3),
                "images_per_second": round(samples / max(self.train_seconds, 1e-9), 1),
            }
            | _split(self.times)
            | _memory_peaks(self.world)
        )


def _split(times: Tensor) -> dict[str, float]:
    """Where time went, from seconds by rank and kind [ranks, kinds], and which of several ranks computes longest.

    >>> _split(torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]]))["time/slowest_rank"]
    0
    """
    out: dict[str, float] = {f"time/{kind}": round(float(x), 4) for kind, x in zip(PHASES, times.mean(0), strict=True)}
    busy = times[:, :2].sum(1)  # data and compute: the others wait for it, which counts as communication
    if len(busy) > 1 and busy.sum() > 0:
        slowest = int(busy.argmax())
        out |= {"time/slowest_rank": slowest, "time/slowest_over_mean": round(float(busy[slowest] / busy.mean()), 3)}
    return out


def _memory_peaks(world: World) -> dict[str, list[float]]:
    """The most GiB that torch had of each rank's GPU since this start, by rank; nothing on CPUs. Collective."""
    if world.device.type != "cuda":
        return {}
    peaks = torch.zeros(world.size, dtype=torch.float64)
    peaks[world.rank] = torch.cuda.max_memory_allocated(world.device) / 2**30
    return {"memory_peak_gib": [round(peak, 3) for peak in world.all_reduce(peaks, "peaks of memory").tolist()]}


def _cadence(config: RunConfig, order: EpochSampler) -> Cadence:
    """When the run measures, but for its first and last step, which always do."""
    probe = config.probe
    wanted = [at(map(order.step_at, probe.at_epochs))]
    wanted += [log_spaced(probe.per_decade)] if probe.per_decade else []
    wanted += [every(probe.every)] if probe.every else []
    return either(*wanted)
