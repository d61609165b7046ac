"""One rank's complete run, from config to result: the only module that selects concrete classes.

Every launcher calls `run` on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from gengap_dist.config.sections import RunConfig
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.cpu_wait import CpuWait
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.distributed.process_group import World, init_process_group
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.distributed.stall_detector import detecting_stalls
from gengap_dist.errors import UsageError, explaining_full_disk
from gengap_dist.models.batch_norm import average_buffers, frozen_running_stats
from gengap_dist.parallel.execution import torch_settings
from gengap_dist.parallel.out_of_memory import explaining_out_of_memory, memory_snapshot
from gengap_dist.parallel.strategies import STRATEGIES, OptimizerState
from gengap_dist.probes.weights import flat_parameters
from gengap_dist.runs import checkpoint
from gengap_dist.runs.data_changes import data_changes
from gengap_dist.runs.run_folder import EXPORTING, NullRecorder, RunRecorder, check_settings, prepare_folder, read_info
from gengap_dist.runs.schema import RunStatus
from gengap_dist.training.algorithms import AlgorithmSetup, BuildAlgorithm, build_algorithm
from gengap_dist.training.algorithms.update_bn import untrained_with_statistics
from gengap_dist.training.checkpoint_manager import CheckpointManager, read_run_state
from gengap_dist.training.evaluation import TO_TARGET, Evaluator
from gengap_dist.training.observer import Observation, ProbeObserver
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.probe_scheduler import ProbeScheduler
from gengap_dist.training.profiler.profile import NoProfile, Profile, with_profiler_clock
from gengap_dist.training.resolved_run import ResolvedRun, resolve_run
from gengap_dist.training.run_times import RunTimes, memory_peaks
from gengap_dist.training.setup import Diverged, Progress, check_shared, sampling_system_metrics
from gengap_dist.training.state import TrainState
from gengap_dist.training.step import zero_contribution_pass
from gengap_dist.training.step_metrics import StepMetricsAggregator, StepResult

RECORD_EVERY = 32  # steps between two records of times, at which rank 0's clock decides whether to save


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    progress: Progress = lambda done, total, note: None,
    preemption_requested: Callable[[], bool] = lambda: False,
    context: RuntimeContext | None = None,
    build_algorithm: BuildAlgorithm = build_algorithm,
) -> dict[str, Any]:
    """Train, measure and record; returns the result of run.json, the same on every rank. Collective.

    Args:
        config: the run.
        out: the run folder, created if missing (see `run_folder.prepare_folder`).
        resume: continue from the folder's checkpoint, if there is one; the value on rank 0 applies to all ranks.
        world: the ranks; None: initialise the process group from the environment.
        progress: called on every rank after every step.
        preemption_requested: called between steps; if it returns True on any rank, all ranks save and stop.
        context: the process, if it executes more than this run.
        build_algorithm: selects the training algorithm; a user's own is not recorded in the settings of the run.

    Raises:
        UsageError: if the config does not match the data, the model or the machine, or the disk is full.
        OutOfMemory: if the run does not fit in GPU memory.
        Preempted: after preemption was requested on a rank; the run can be resumed.
    """
    context = context or RuntimeContext()
    if context.threads and context.threads.number != torch.get_num_threads():  # torch was imported before
        torch.set_num_threads(context.threads.number)
    world = world or init_process_group(config.launch.device, config.launch.timeout_seconds)
    world = with_profiler_clock(world) if config.profile else world
    stall_detection = detecting_stalls(world, config.launch.stall_report_seconds)
    memory_recording = memory_snapshot(world, out / "memory" if config.launch.memory_snapshot else None)
    with (
        explaining_full_disk("continue with --resume", file=f"a file in {out}"),
        stall_detection,
        torch_settings(config.train, world.device),
        explaining_out_of_memory(world),
        memory_recording,
    ):
        if world.rank == 0 and not out.exists():  # a run of a study on a Ray cluster
            prepare_folder(out, "run.json", resume=True)
        check_shared(out, world)
        recorder = RunRecorder(out) if world.rank == 0 else NullRecorder()
        resolved = resolve_run(config, out, world, progress, context)
        trainer = Trainer(resolved, world, recorder, progress, context, build_algorithm)
        trainer.start(resume=bool(world.broadcast_int(resume)))  # a node that joins late may have another value
        try:
            with sampling_system_metrics(config, out, world):
                trainer.train(preemption_requested)
                result = trainer.result()
            # both without the export
            trained = {"seconds": round(recorder.seconds(), 3), "cpu_wait_share": trainer.cpu_wait.share()}
            recorder.finish(RunStatus.FINISHED, result, facts=trained | _exported(trainer))
        except Diverged as error:
            result = {"diverged_at_step": error.step}
            recorder.finish(RunStatus.DIVERGED, result, str(error))
        except Preempted as error:
            recorder.finish(RunStatus.PREEMPTED, {"num_steps": error.step}, str(error), flush=False)
            world.barrier()
            raise
        finally:
            trainer.close()
        world.barrier()  # when a rank returns, the folder is complete
    return result


@final
class Trainer:
    """Trains one run on this rank, together with the other ranks."""

    def __init__(
        self,
        resolved: ResolvedRun,
        world: World,
        recorder: NullRecorder,
        progress: Progress,
        context: RuntimeContext,
        build_algorithm: BuildAlgorithm = build_algorithm,
    ) -> None:
        """A trainer that has done no step."""
        self.build_algorithm = build_algorithm
        config, out = resolved.config, resolved.out
        self.resolved, self.config, self.world = resolved, config, world
        self.recorder, self.progress, self.context = recorder, progress, context
        self.sampler, self.schedule = resolved.sampler, resolved.schedule
        self.task = resolved.task
        splits = resolved.splits
        self.batches = BatchLoader(splits.train, resolved.preprocess, config.data, config.seed, splits.spec.num_classes)
        self.state = TrainState(resolved.schedule.num_steps)
        self.step_metrics = StepMetricsAggregator(config, self.task, world)
        self.evaluator = Evaluator(config.train, self.task, resolved.splits, resolved.preprocess, world, self.state)
        measured = resolved.splits.train, resolved.preprocess, flat_parameters(resolved.model), resolved.probed_layers
        observer = ProbeObserver(config, self.task, *measured, world)
        self.probes = ProbeScheduler(config.probe, resolved.sampler, observer, self.state)
        self.checkpoints = CheckpointManager(config.checkpoint, out, world, recorder)
        self.strategy = STRATEGIES[resolved.strategy](config, world)
        self.strategy.has_unused_parameters = resolved.has_unused_parameters
        untimed = self.strategy.capabilities.has_untimed_collectives
        self.profile = (
            Profile(out, world, config, resolved.strategy, has_untimed_collectives=untimed)
            if config.profile
            else NoProfile()
        )
        self.times = RunTimes(world, self.state)
        self.cpu_wait = CpuWait(context.threads, context.on_core_wait)
        self._update_norm: Tensor | None = None  # of the last step, if a measurement is planned after it

    # -- start and resume ---------------------------------------------------------------------------------------------

    def start(self, *, resume: bool) -> None:
        """Start the run, or continue from the last valid checkpoint if `resume` and there is one. Collective.

        Raises:
            UsageError: if the run in the folder has other settings, or the checkpoint is of another run.
        """
        path = self.checkpoints.latest() if resume else None
        if path is not None:
            self._restore(path)
            return
        self._set_up({}, {})
        self.recorder.start(self.resolved.requested_config, self._info())
        self.recorder.resume(0, 0.0, {})
        self.evaluate_and_probe()

    def _restore(self, path: Path) -> None:
        out = self.resolved.out
        info = read_info(out)
        check_settings(out, info, self.config)
        checkpoint.check_origin(path, info, self.config)
        changed = data_changes(info.data, self.resolved.info["data"])  # known on rank 0
        if self.world.broadcast_int(bool(changed)):
            raise UsageError(
                f"the data are not those with which the run in {out} was started: {changed or 'as rank 0 reports'}: "
                "restore them, or choose a new --out"
            )
        checkpoint.restore(self.resolved.model, checkpoint.load(path / "model.pt"), path / "model.pt")
        run = read_run_state(path)
        self._set_up(checkpoint.load_nested(path / "optimizer.pt"), checkpoint.load(path / "algorithm.pt"))
        self.strategy.execution.scaler.load_state_dict(run["scaler"])
        self.state.load_state_dict(run["train"])
        best_weights = checkpoint.load(path / "best.pt") if run["evaluator"]["best"] else {}
        self.evaluator.load_state_dict(run["evaluator"], best_weights)
        self.probes.load_state_dict(run["probes"])
        self.step_metrics.load_state_dict(run["step_metrics"])
        if stream := self.resolved.splits.train.stream:
            stream.load_state_dict(run.get("stream") or {})
        self.recorder.start(self.resolved.requested_config, self._info())
        self.recorder.resume(self.state.step, run["seconds"], run["pending_rows"])
        self.progress(0, 0, f"continuing after {self.state.step:,} of {self.state.num_steps:,} steps")

    def _set_up(self, optimizer_state: OptimizerState, algorithm_state: dict[str, Any]) -> None:
        """Give the network to the strategy, and the strategy to the algorithm. Collective."""
        self.strategy.setup(self.resolved.model, partial(build_optimizer, self.config.scaled_optim))
        self.strategy.load_optimizer_state(optimizer_state)
        self.model = self.strategy.model
        if self.strategy.capabilities.needs_warmup_backward:
            first = self.world.timer.phase("compute", "a first backward pass")
            with first, frozen_running_stats(self.model), self.strategy.micro_step(last=True):
                zero_contribution_pass(self.strategy, self.batches, epoch=0)
            self.strategy.optimizer.zero_grad(set_to_none=False)
        setup = self.config, self.task, self.strategy, self.batches, self.sampler, self.schedule.num_steps
        self.algorithm = self.build_algorithm(AlgorithmSetup(*setup))
        if algorithm_state:
            self.algorithm.load(algorithm_state)

    def _info(self) -> dict[str, Any]:
        """What run.json says about the run before its first step."""
        return {
            "world_size": self.world.size,
            "device": str(self.world.device.type),
            "threads_per_rank": torch.get_num_threads(),
            "threads_source": self.context.threads.source if self.context.threads else "torch",
            "launcher": self.context.launcher,
            "command": [*self.context.command],
            "launch_id": os.environ.get("TORCHELASTIC_RUN_ID"),
            "strategy": self.resolved.strategy,
            "steps_per_epoch": self.sampler.steps_per_epoch,
            "num_steps": self.schedule.num_steps,
            "num_probe_samples": self.probes.observer.num_samples,
            "samples_per_unit": self.probes.observer.samples_per_unit,
            **self.resolved.info,
            **self.algorithm.info(),
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, preemption_requested: Callable[[], bool]) -> None:
        """Run all steps from the current one to the last, with evaluations, probes and checkpoints. Collective.

        Raises:
            Diverged: if the loss is not finite.
            Preempted: if preemption was requested on a rank.
        """
        state = self.state
        self.model.train()
        self.times.begin()
        while not state.at_end:
            self.world.timer.step = state.step + 1
            self.profile.begin(state.num_steps - state.step)
            result = self.step()
            self.step_metrics.add(state.step, result, preemption_requested=preemption_requested())
            self.progress(state.step, state.num_steps, "")
            stop = self._stop_due()
            preempted = self._record_steps(in_flight=0 if stop else 1) and not state.at_end
            self.times.exclude(self.profile.end())
            if stop or preempted or self.probes.triggered():
                preempted |= self._record_steps(in_flight=0)  # with `stop`, there are none left
                save_due = self._record_times()
                average_buffers(self.model, self.world)
                self.evaluate_and_probe()
                preempted = not state.at_end and (preempted or self._any_rank(preemption_requested()))
                if save_due or preempted or state.at_end:
                    self.save(wait=preempted or state.at_end)
                self.times.begin()
            if preempted:
                raise Preempted(state.step)
        self.profile.finish()

    def step(self) -> StepResult:
        """One optimizer step. Collective."""
        number = self.state.step
        self.strategy.track_local_grad_norm = self._recorded(number + 1) and (
            "noise_scale" in self.config.probe.diagnostics
        )
        before_P = self._weights() if self.probes.possible(number + 1) else None
        with self.world.timer.phase("compute", "forward and backward"):
            result = self.algorithm.step(number, self.schedule.lr(number), self.schedule.momentum(number))
        self.state.step += 1
        self._update_norm = None if before_P is None else (self._weights() - before_P).double().norm()
        return result

    def _weights(self) -> Tensor:
        """A copy of all trainable parameters, unsharded: [P]. Collective."""
        with self.algorithm.unsharded_model() as model:
            return flat_parameters(model)

    def _recorded(self, step: int) -> bool:
        """Whether the metrics of step number `step` (from 1) are recorded."""
        return step == self.state.num_steps or step % self.config.train.log_every == 0

    def _stop_due(self) -> bool:
        """Whether something is due before the next step."""
        step = self.state.step
        return (
            self.state.at_end
            or step % RECORD_EVERY == 0
            or self.probes.possible(step)
            or self.evaluator.planned(step)
            or self.checkpoints.due(step)
        )

    def _record_steps(self, *, in_flight: int) -> bool:
        """Record all steps but the last `in_flight`; returns whether preemption was requested in one. Collective.

        Raises:
            Diverged: if a loss or a gradient is not finite.
        """
        preempted = False
        for record in self.step_metrics.read(in_flight=in_flight):
            preempted = preempted or record.preempted
            if record.not_finite or self._recorded(record.step):
                self.log(record.metrics, record.step)
            if name := record.not_finite:
                raise Diverged(record.step, record.metrics[name], name)
            self.probes.trigger.add(record.step, record.loss)
        return preempted

    def _any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. Collective."""
        return bool(self.world.all_reduce(torch.tensor([int(flag)]), "preemption check"))

    def _record_times(self) -> bool:
        """Record the times of the last steps, and skip a measurement that takes too long. Collective.

        Returns:
            Whether a checkpoint is due, by step or by rank 0's clock.
        """
        exceeds_time = self.world.rank == 0 and self.probes.exceeds_time(
            self.recorder.seconds(), self.times.seconds_per_step()
        )
        if self.world.rank == 0:
            self.cpu_wait.warn_once()
        metrics, (overdue, exceeds_time) = self.times.record(self.checkpoints.overdue(), exceeds_time)
        if exceeds_time:
            self.probes.skip()
        self.log(metrics)
        return overdue or self.checkpoints.due(self.state.step)

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record metrics of a step; None: of the current one."""
        step = self.state.step if step is None else step
        self.recorder.log(step, self.sampler.epochs_done(step), metrics)

    # -- measurements, checkpoints, result ----------------------------------------------------------------------------

    def evaluate_and_probe(self) -> None:
        """Validate and probe, if due at this step. Collective."""
        validate, probe = self.evaluator.due(), self.probes.due()
        if not (validate or probe):
            return
        timer = self.world.timer
        with self.algorithm.evaluated_model() as model:
            if self.state.step == 0:
                with timer.phase("evaluation"):
                    ghost_size = self.config.batch.ghost_size
                    model = untrained_with_statistics(model, self.batches, self.world, ghost_size)
            if validate:
                with timer.phase("evaluation"):
                    score = self.evaluator.validate(model)
                self.log({f"val/{name}": value for name, value in score.items()})
                metric = self.task.metric
                self.progress(
                    self.state.step, self.state.num_steps, f"val {metric.format(score[metric.name], digits=1)}"
                )
            if probe or self.probes.due():  # if the target was reached just now, this step is the last
                with timer.phase("probe"):
                    also = None if validate else self.evaluator.score_validation
                    self.probes.measure(model, self._record_observation, also)

    def _record_observation(self, observation: Observation) -> None:
        for probe_set, layer_spectra in observation.spectra.items():
            self.recorder.spectra(self.state.step, layer_spectra, probe_set)
        update = {} if self._update_norm is None else {"train/update_norm": float(self._update_norm)}
        self.log(observation.metrics | (update if "norms" in self.config.probe.diagnostics else {}))

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint; with `wait`, return when it is on disk. Collective.

        Raises:
            UsageError: if `wait` and it cannot be written.
        """
        with self.world.timer.phase("checkpoint"):
            states: dict[str, Any] = {"optimizer": self.strategy.optimizer_state(), "algorithm": self.algorithm.state()}
            if self.evaluator.best:
                states["best"] = self.evaluator.best["model"]
            states["run"] = {
                "train": self.state.state_dict(),
                "step_metrics": self.step_metrics.state_dict(),
                "evaluator": self.evaluator.state_dict(),
                "probes": self.probes.state_dict(),
                "scaler": self.strategy.execution.scaler.state_dict(),
                "stream": stream.state_dict() if (stream := self.resolved.splits.train.stream) else {},
                "seconds": self.recorder.seconds(),
            }
            info = {
                "world_size": self.world.size,
                "strategy": self.resolved.strategy,
                "launcher": self.context.launcher,
                "config": self.config.model_dump(mode="json"),
            }
            with self.algorithm.unsharded_model() as model:
                self.checkpoints.save(self.state.step, {"model": model.state_dict(), **states}, info, wait=wait)

    def result(self) -> dict[str, Any]:
        """The result of the run, with the scores of the last and the best model on the test samples. Collective."""
        state, evaluator = self.state, self.evaluator
        with self.algorithm.evaluated_model() as model, self.world.timer.phase("evaluation"):
            scores = evaluator.final_scores(model)
        found = evaluator.summary(self.sampler.epochs_done)
        self.log(scores | {name: value for name, value in found.items() if name in TO_TARGET and value is not None})
        samples = self.sampler.epochs_done(state.step) * len(self.resolved.splits.train)
        speed = {
            "num_steps": state.step,
            "train_seconds": round(state.train_seconds, 3),
            "samples_per_second": round(samples / max(state.train_seconds, 1e-9), 1),
        }
        if evaluator.test_correct is not None:
            self.recorder.test_correct(evaluator.test_correct)
        num_test = {"num_test": len(self.resolved.splits.test)}
        probes = self.probes.summary()
        return scores | num_test | found | speed | probes | self.times.totals() | memory_peaks(self.world)

    def close(self) -> None:
        """Wait for a checkpoint that is being written, release the model, and end processes that read samples."""
        self.checkpoints.close()
        self.profile.close()
        self.strategy.close()
        self.resolved.splits.close()


def _exported(trainer: Trainer) -> dict[str, Any]:
    """Export the final model, if MLflow wants it; returns what run.json says about it. {} on ranks other than 0."""
    config = trainer.config
    if trainer.world.rank != 0 or not (config.mlflow.enabled and config.mlflow.log_model):
        return {}
    trainer.recorder.flush()
    trainer.progress(trainer.state.step, trainer.state.num_steps, EXPORTING)
    from gengap_dist.training.export import try_export  # torch's compiler is slow to import

    return try_export(trainer.resolved.out, config, trainer.resolved.info["data"], trainer.state.step)
