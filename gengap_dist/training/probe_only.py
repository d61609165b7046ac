"""Measures networks without training."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gengap_dist.compat.float32_precision import training_float32
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.out_of_memory import explaining_out_of_memory
from gengap_dist.probes.weights import flat_parameters
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import NullRecorder, RunRecorder
from gengap_dist.runs.schema import RunStatus
from gengap_dist.training.algorithms.update_bn import untrained_with_statistics
from gengap_dist.training.observer import Observation, ProbeObserver, StageProgress
from gengap_dist.training.probed_layers import find_probed_layers
from gengap_dist.training.setup import build_model, load_data, two_samples
from gengap_dist.training.tasks import build_task, described_metric


def probe(
    config: RunConfig,
    world: World,
    networks: Sequence[tuple[int, Path, dict[str, Tensor] | None]],
    out: Path | None,
    on_stage: StageProgress | None = None,
) -> list[tuple[int, Observation]]:
    """Measure networks on the config's probe set without training. Collective.

    Controls and diagnostics are those of the last network; with `out`, of all.

    Args:
        config: data, model and probe.
        world: the ranks.
        networks: per network its number of optimizer steps, the file of the weights, and the weights; None: untrained.
        out: folder for results in the format of a run folder, or None.
        on_stage: called after each step of a measurement.

    Raises:
        UsageError: if the config does not match the data or the model, or the weights do not match the model.
    """
    with training_float32(world.device, tf32=config.train.tf32), explaining_out_of_memory(world):
        splits = load_data(config, world, lambda done, total, note: None)
        task = build_task(config, splits.spec)
        model = build_model(config, splits, task, world)
        train_set = datasets.place_splits(splits, config.data, world.device).train
        preprocess = Preprocess(splits.pixels, world.device, getattr(torch, config.train.dtype))
        batches = BatchLoader(train_set, preprocess, config.data, config.seed, splits.spec.num_classes)
        layers = find_probed_layers(model, two_samples(config, splits, world)[0], config.probe)
        observer = ProbeObserver(config, task, train_set, preprocess, flat_parameters(model), layers, world)
        recorder = RunRecorder(out) if out and world.rank == 0 else NullRecorder()
        observations = []
        for number, (step, path, state) in enumerate(networks):
            if state is not None:
                state, removed = checkpoint.without_wrappers(state, model)
                if removed and world.rank == 0:
                    warnings.warn(f"{' and '.join(removed)} was removed from the names in {path}", stacklevel=2)
                checkpoint.restore(model, state, path)
            if number == 0:
                facts = {
                    "metric": described_metric(task, splits.train.targets),
                    "data": datasets.summary(splits, config.data) if world.rank == 0 else None,
                    "world_size": world.size,
                    "device": str(world.device.type),
                    "launcher": "probe",
                    "num_parameters": sum(p.numel() for p in model.parameters()),
                    "num_steps": networks[-1][0],
                    "num_probe_samples": observer.num_samples,
                    "samples_per_unit": observer.samples_per_unit,
                    "last_hidden_layer": layers.last_hidden,
                }
                recorder.start(config, facts)
                recorder.resume(0, 0.0, {})
            evaluated_model = (
                model
                if state is not None
                else untrained_with_statistics(model, batches, world, config.batch.ghost_size)
            )
            everything = out is not None or number == len(networks) - 1
            stages = on_stage and partial(_of_step, on_stage, step if len(networks) > 1 else None)
            observations.append(
                (step, observer(evaluated_model, controls=everything, diagnostics=everything, on_stage=stages))
            )
            for probe_set, spectra in observations[-1][1].spectra.items():
                recorder.spectra(step, spectra, probe_set)
            recorder.log(step, 0.0, observations[-1][1].metrics)
        recorder.finish(RunStatus.FINISHED, {"num_steps": networks[-1][0]})
        return observations


def _of_step(on_stage: StageProgress, step: int | None, stage: str, done: float, total: float) -> None:
    on_stage(stage if step is None else f"step {step:,}: {stage}", done, total)
