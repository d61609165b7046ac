"""A run in which everything that may be `auto` is decided: data, network, schedule, strategy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.parallel.execution import check_compiler, keep_freed_memory
from gengap_dist.training.algorithms.base import batch_plan_for
from gengap_dist.training.autotune.memory_format import resolve_memory_format
from gengap_dist.training.autotune.micro_batch import Workload, resolve_micro_size
from gengap_dist.training.checks import (
    check_auto_micro_size,
    check_norm,
    check_parameters,
    norm_group_sizes,
    startup_checks,
    strategy_name,
)
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.probed_layers import ProbedLayers, find_probed_layers
from gengap_dist.training.setup import (
    Progress,
    build_model,
    inspect_network,
    load_data,
    previous_run_info,
    two_samples,
)
from gengap_dist.training.tasks import Task, build_task, described_metric


@final
@dataclass(frozen=True)
class ResolvedRun:
    """What a trainer is built from; the same on every rank, but for the memory that holds it."""

    config: RunConfig
    """Without `auto` for the size of micro-batches and the memory format."""
    requested_config: RunConfig
    """As the user gave it; it is saved in the run folder."""
    out: Path
    """The run folder."""
    splits: datasets.Splits
    """The samples, where data.device wants them."""
    preprocess: Preprocess
    task: Task
    sampler: EpochSampler
    schedule: Schedule
    model: nn.Module
    """Initialised, on the device of this rank, unsharded."""
    strategy: Strategy
    """Name of the parallel strategy."""
    has_unused_parameters: bool
    """Whether some trainable parameters got no gradient in a pass before the first step."""
    probed_layers: ProbedLayers
    """What the probe measures, and with how many samples."""
    info: Mapping[str, Any]
    """What run.json says about the data and about the choices made here."""


def resolve_run(config: RunConfig, out: Path, world: World, progress: Progress, context: RuntimeContext) -> ResolvedRun:
    """Check a run, load its data, build its network, and decide everything that is `auto`. Collective.

    Raises:
        UsageError: if the config does not match the data, the model or the machine.
    """
    for check in startup_checks(config, world.size, world.device.type):
        check()
    if config.train.compile:
        check_compiler(world.device.type)
    if world.device.type == "cpu":
        keep_freed_memory()
    loaded: datasets.Splits = context.data.get(
        datasets.data_key(config.data, config.seed), lambda: load_data(config, world, progress)
    )
    splits = datasets.place_splits(loaded, config.data, world.device)
    sampler = EpochSampler.of(config, len(splits.train), in_order=splits.in_order)
    schedule = Schedule.of(config, sampler)
    task = build_task(config, loaded.spec)
    model = build_model(config, loaded, task, world)
    check_parameters(config, model, world.size)
    inspection = inspect_network(config, loaded, model, task, world)
    probed_layers = find_probed_layers(model, two_samples(config, loaded, world)[0], config.probe)
    check_auto_micro_size(config, model)
    resolved, choices = _resolve_auto(config, out, Workload(model, task), world, progress)
    check_norm(resolved, model, sampler.sizes(), world.size)
    step_sizes = [phase.size for phase in sampler.phases]
    info = {
        "metric": described_metric(task, loaded.train.targets),
        "data": datasets.summary(loaded, config.data) if world.rank == 0 else None,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "norm_size": norm_group_sizes(resolved, model, step_sizes, world.size),
        "unused_parameters": inspection.unused_parameters,
        "depends_on_ranks": inspection.depends_on_ranks,
        "last_hidden_layer": probed_layers.last_hidden,
        "small_size": _noise_small_size(resolved, world.size),
        **choices,
    }
    return ResolvedRun(
        config=resolved,
        requested_config=config,
        out=out,
        splits=splits,
        preprocess=Preprocess(loaded.pixels, world.device, getattr(torch, config.train.dtype)),
        task=task,
        sampler=sampler,
        schedule=schedule,
        model=model,
        strategy=strategy_name(resolved, world.size),
        has_unused_parameters=bool(inspection.unused_parameters),
        probed_layers=probed_layers,
        info=info,
    )


def _resolve_auto(
    config: RunConfig, out: Path, workload: Workload, world: World, progress: Progress
) -> tuple[RunConfig, dict[str, Any]]:
    """The config without `auto`, and the choices for run.json. Collective."""
    previous = None
    if "auto" in (config.batch.micro_size, config.train.channels_last):
        progress(0, 0, "measuring the fastest setting on this machine")
        previous = previous_run_info(out)
    known_format = (previous and previous.channels_last_auto) or {}
    known_size = (previous and previous.micro_size_auto) or {}
    config, memory_format = resolve_memory_format(config, workload, world, known_format)
    config, micro_size = resolve_micro_size(config, workload, world, known_size)
    if world.device.type == "cuda":  # the peaks of the run, without those of measuring and of earlier runs
        torch.cuda.reset_peak_memory_stats(world.device)
        torch.cuda.reset_accumulated_memory_stats(world.device)
    choices = {
        "micro_size": config.batch.micro_size,
        "micro_size_auto": micro_size,
        "channels_last": config.train.channels_last,
        "channels_last_auto": memory_format,
    }
    return config, choices


def _noise_small_size(config: RunConfig, num_ranks: int) -> float | None:
    """The small batch size of the noise scale, harmonic mean over ranks; None without smaller gradients."""
    size = config.batch.global_size
    plan = batch_plan_for(config, size, num_ranks)
    first_sizes = [plan.micro_batches(rank)[0].size for rank in range(num_ranks)]
    inverses = [1 / first for first in first_sizes if 0 < first < size]
    return len(inverses) / sum(inverses) if inverses else None
