"""What a run costs at a number of ranks and threads: a few of its steps, one validation and one measurement, timed."""

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from gengap_dist.config.loading import flat, validate
from gengap_dist.config.sections import FrozenModel, RunConfig
from gengap_dist.distributed.cores import processor_name
from gengap_dist.distributed.cpu_wait import CpuWait
from gengap_dist.distributed.worker_pool import Worker
from gengap_dist.runs.own_files import default_path, read_own, write_own
from gengap_dist.runs.run_folder import versions

MIN_SECONDS, MIN_STEPS = 0.3, 3
LONG_SECONDS = 1.0
"""A step or a measurement that takes longer is timed only once."""
BUSY_SHARE = 0.2
FOLDER_BYTES = 500_000  # of metrics, spectra, report and figures of a run, about
END_SECONDS = 1.0  # of the last checkpoint and the exported model, about


class ArmFacts(NamedTuple):
    """What is known of an arm of a study before it trains."""

    num_steps: int
    num_epochs: float
    num_parameters: int | None = None
    """None if the network was not built."""
    disk_bytes: int | None = None
    """Of a run folder, about: checkpoints, the exported network, and `FOLDER_BYTES`."""


class RunCost(FrozenModel):
    """Seconds and memory of one run with a number of ranks and threads."""

    step_seconds: NonNegativeFloat
    validation_seconds: NonNegativeFloat
    """Of one validation."""
    probe_seconds: NonNegativeFloat
    """Of one measurement, with a validation."""
    num_steps: PositiveInt
    num_validations: NonNegativeInt
    num_probes: NonNegativeInt
    end_seconds: NonNegativeFloat
    """Of the final scores and what is written at the end."""
    memory_bytes: NonNegativeInt
    """Resident memory of a rank, or of its GPU."""
    cpu_wait_share: NonNegativeFloat
    """Share of the time of measuring in which rank 0 waited for a core; its seconds are without that."""
    depends_on_ranks: bool
    """Whether the result of the run depends on the number of ranks."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        validations = self.num_validations * self.validation_seconds
        return (
            self.num_steps * self.step_seconds + validations + self.num_probes * self.probe_seconds + self.end_seconds
        )


def measure_cost(worker: Worker, config: RunConfig) -> RunCost:
    """The job of each rank of a pool that measures a run; nothing is kept. Collective.

    Raises:
        UsageError: as the run would.
    """
    from gengap_dist.distributed.process_group import init_process_group
    from gengap_dist.models.batch_norm import has_batch_norm
    from gengap_dist.parallel.execution import torch_settings
    from gengap_dist.runs.run_folder import NullRecorder
    from gengap_dist.training.probe_scheduler import MIN_MEASUREMENTS
    from gengap_dist.training.resolved_run import resolve_run
    from gengap_dist.training.trainer import Trainer

    world = init_process_group(config.launch.device, config.launch.timeout_seconds)
    silent = lambda done, total, note: None  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, torch_settings(config.train, world.device):
        resolved = resolve_run(config, Path(folder), world, silent, worker.context)
        local_norm = config.norm == "local" and has_batch_norm(resolved.model)
        trainer = Trainer(resolved, world, NullRecorder(), silent, worker.context)
        try:
            cpu_wait = CpuWait(None)
            trainer.start(resume=False)  # validates and measures the untrained network
            began = trainer.evaluator.seconds, trainer.probes.seconds
            if sum(began) < LONG_SECONDS:  # again, without the cost of a first time
                trainer.evaluate_and_probe()
                began = trainer.evaluator.seconds - began[0], trainer.probes.seconds - began[1]
            seconds = _time_steps(trainer)
            waited = cpu_wait.share() or 0.0
            seconds, *began = (each * (1 - waited) for each in (seconds, *began))
        finally:
            trainer.close()
    numbers = range(resolved.schedule.num_steps + 1)
    validations = sum(map(trainer.evaluator.planned, numbers))
    # of the losses that probe.at_losses names at most all are reached; a measurement validates, too
    probes = sum(map(trainer.probes.possible, numbers)) + 1 + trainer.probes.trigger.num_remaining
    probe_seconds = sum(began)
    if (largest := config.probe.max_time_fraction) is not None and probes > 2:
        # those that may be skipped take at most their share of the rest
        rest, always = seconds * resolved.schedule.num_steps + validations * began[0], min(probes, MIN_MEASUREMENTS)
        probe_seconds = min(probe_seconds, (largest * rest + always * probe_seconds) / probes)
    samples = [len(split) for split in (resolved.splits.val, resolved.splits.train, resolved.splits.test)]
    return RunCost(
        step_seconds=seconds,
        validation_seconds=began[0],
        probe_seconds=probe_seconds,
        num_steps=resolved.schedule.num_steps,
        num_validations=validations,
        num_probes=probes,
        end_seconds=began[0] * (samples[1] + 2 * samples[2]) / max(1, samples[0]) + END_SECONDS,
        memory_bytes=_memory(world.device),
        cpu_wait_share=waited,
        depends_on_ranks=local_norm or bool(resolved.info["depends_on_ranks"]),
    )


def _time_steps(trainer: Any) -> float:
    """Median seconds of a few steps on this rank. Collective: steps wait for each other."""
    trainer.model.train()
    seconds: list[float] = []
    while not trainer.state.at_end:
        began = time.perf_counter()
        trainer.step_metrics.add(trainer.state.step, trainer.step(), preemption_requested=False)
        for _ in trainer.step_metrics.read(in_flight=0):
            pass
        seconds.append(time.perf_counter() - began)
        timed = len(seconds) if seconds[0] > LONG_SECONDS else len(seconds) - 1  # the first is slower
        enough = sum(seconds) > (MIN_SECONDS if timed >= MIN_STEPS else LONG_SECONDS)
        if trainer.world.broadcast_int(int(enough)):
            break
    return statistics.median(seconds[1:] or seconds)


def _memory(device: Any) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return psutil.Process().memory_info().rss


# -- the cache -------------------------------------------------------------------------------------------------------


class RunCosts(FrozenModel):
    """run_costs.json: what was measured on one machine."""

    machine: dict[str, str] = {}
    found: dict[str, RunCost] = {}


def this_machine() -> dict[str, str]:
    """What a cost depends on besides the run: processor, cores, versions."""
    return {"processor": processor_name(), "cores": str(os.cpu_count()), **versions()}


def cost_key(config: RunConfig, device: str, num_ranks: int, threads: int) -> str:
    """Names a run without its seed and what costs nothing, at a number of ranks and threads."""
    settings: Mapping[str, Any] = {
        name: value
        for name, value in flat(config).items()
        if name != "seed" and not name.startswith(("mlflow.", "checkpoint.", "launch."))
    }
    text = json.dumps([settings, config.launch.strategy, device, num_ranks, threads], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class CostCache:
    """Costs that were measured before; not those of a file that is damaged, others' to write, or another machine's."""

    def __init__(self, warn: Any) -> None:
        """`warn` is called with one sentence if the file is of no use."""
        self.path, self.warn = default_path().with_name("run_costs.json"), warn
        self.machine = this_machine()
        self.found: dict[str, RunCost] = {}
        try:
            known = validate(RunCosts, json.loads(read_own(self.path))) if self.path.exists() else RunCosts()
        except (OSError, ValueError, TypeError) as error:
            warn(f"{self.path} is of no use ({error}): the costs of runs are measured again, and it is overwritten")
            return
        if known.found and known.machine != self.machine:
            changed = next(name for name in self.machine if known.machine.get(name) != self.machine[name])
            warn(
                f"{self.path} is of another machine ({changed} was {known.machine.get(changed)}, and is "
                f"{self.machine[changed]}): the costs of runs are measured again"
            )
            return
        self.found = dict(known.found)

    def add(self, new: Mapping[str, RunCost]) -> None:
        """Keep costs for later studies, but not those of a machine that other programs kept busy."""
        new = {key: cost for key, cost in new.items() if cost.cpu_wait_share < BUSY_SHARE}
        if not new:
            return
        self.found |= new
        content = RunCosts(machine=self.machine, found=self.found).model_dump(mode="json")
        try:
            write_own(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            self.warn(f"{self.path} cannot be written ({error.strerror}): the next study measures its runs again")
