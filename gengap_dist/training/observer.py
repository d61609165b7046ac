"""Measurements of a run's network on a fixed probe set: near-rank loss, its controls, loss, and other diagnostics."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gengap_dist.config.measures import OWN_BATCH
from gengap_dist.config.sections import ProbeConfig, RunConfig
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.datasets import Samples
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import LayerSpectrum, measure, metrics
from gengap_dist.probes.hessian import hessian_eigenvalues, hessian_trace, keskar_sharpness
from gengap_dist.probes.neural_collapse import ClassifierInputs, nc1
from gengap_dist.probes.progress import Progress, no_progress
from gengap_dist.probes.spectra.cost import MeasurementCost
from gengap_dist.probes.weights import distance_from_init, weight_spectra
from gengap_dist.training.evaluation import BlockSums
from gengap_dist.training.probed_layers import ProbedLayers, probe_set_sizes, warn_of_sizes
from gengap_dist.training.tasks import Task

PROBE_BLOCK = (
    128  # probe samples in one pass; blocks are not split between ranks, so spectra do not depend on their number
)
NUM_EIGENVALUES = 3

Batches = list[tuple[Tensor, Tensor]]
Metrics = dict[str, float]
StageProgress = Callable[[str, float, float], None]
"""Called with the name of a measurement, and as `Progress`; with 0 of 1 when it begins."""


class Observation(NamedTuple):
    """The result of one measurement."""

    metrics: Metrics
    spectra: dict[str, list[LayerSpectrum]]
    """By probe set: "" is the fixed one, `n<N>` and `own_batch` are controls, `weights` those of weights."""


class ProbeObserver:
    """Measures a network on probe samples of the training set, drawn by `data.split_seed`.

    They are the same for all arms and seeds of a study; with data.subset=per_seed, for all arms of a seed.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        train_set: Samples,
        preprocess: Preprocess,
        initial_P: Tensor,
        layers: ProbedLayers,
        world: World,
    ) -> None:
        """An observer of networks for `task` that were initialised with `initial_P` [P].

        Warns if the training set has fewer samples than probe.num_samples, of which all are then the probe set, and if
        a layer has few samples for each of its units.
        """
        self.config: ProbeConfig = config.probe
        self.task, self.train_set, self.preprocess = task, train_set, preprocess
        self.initial_P, self.world = initial_P, world
        self._permutation = torch.from_numpy(seeded_rng(config.data.split_seed, 2).permutation(len(train_set)))
        sample_bytes = math.prod(task.spec.input_shape) * preprocess.dtype.itemsize
        sizes = probe_set_sizes(self.config, layers, sample_bytes, len(train_set))
        self.num_samples = sizes[-1]
        self.samples_per_unit = layers.samples_per_unit(self.num_samples)
        """N / D of the probe set by layer key."""
        if self.config.enabled:
            warn_of_sizes(self.config, layers, self.num_samples, len(train_set))
        self.controls = {f"n{size}": size for size in sizes[:-1]}
        if self.config.own_batch:
            self.controls[OWN_BATCH] = config.batch.global_size
        self._block_size = task.spec.block_size(PROBE_BLOCK)
        self._failed_diagnostics: set[str] = set()

    def __call__(
        self,
        model: nn.Module,
        *,
        controls: bool,
        required: bool = True,
        diagnostics: bool = True,
        on_stage: StageProgress | None = None,
    ) -> Observation:
        """Run all configured measurements, each with its `probe_seconds/...`. Collective.

        Those of the near-rank loss are also split into `probe_seconds_by_part/...`.

        Args:
            model: the network; not changed.
            controls: also measure the control sets.
            required: raise an error if near-rank loss cannot be measured; otherwise it is left out, with a warning.
            diagnostics: also measure what probe.diagnostics names.
            on_stage: called after each step of a measurement.

        Raises:
            UsageError: if `required`, and the network or a layer that the user named cannot be measured.
        """
        found, spectra = {}, {}
        began = time.monotonic()
        batches = self._batches(self.num_samples)
        sums = BlockSums(self.task, self.num_samples, self._block_size, self.world)
        sets = {"": self.num_samples} | (self.controls if controls else {})
        classifier: ClassifierInputs | None = None
        for name, size in sets.items():
            began = time.monotonic() if name else began
            own = self._batches(size) if name else batches
            cost = MeasurementCost(_progress(on_stage, f"near-rank loss of {size:,} samples"))
            try:
                if not name and diagnostics and self._collects_features:
                    classifier = ClassifierInputs(model)
                with nullcontext() if name or classifier is None else classifier.attached():
                    spectra[name] = measure(
                        model,
                        [batch.inputs for batch in own],
                        layers=self.config.layers,
                        views=self.config.views,
                        world=self.world,
                        memory_mib=self.config.memory_mib,
                        method=self.config.method,
                        on_outputs=None if name else partial(_after_pass, sums, own, classifier),
                        cost=cost,
                    )
            except UsageError as error:  # the same on every rank
                if required:
                    raise
                warnings.warn(f"near-rank loss is not measured now: {error}", stacklevel=2)
                classifier = None
                continue
            found |= metrics(spectra[name], name)
            if not name:  # computed in the same passes
                found |= {f"probe/{metric}": value for metric, value in sums.score().items()}
                found |= {f"probe_seconds_by_part/{part}": seconds for part, seconds in cost.seconds().items()}
            found[f"probe_seconds/{f'control/{name}' if name else 'near_rank_loss'}"] = time.monotonic() - began
        labelled = [(batch.inputs, batch.targets) for batch in batches]
        for name, diagnostic in DIAGNOSTICS.items():
            if not diagnostics or name not in self.config.diagnostics or name in self._failed_diagnostics:
                continue
            began = time.monotonic()
            try:
                values, spectra_of_it = diagnostic(model, labelled, self, _Measured(on_stage, classifier))
            except UsageError as error:  # the same on every rank: not applicable to this network
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                self._failed_diagnostics.add(name)
                continue
            found |= values | {f"probe_seconds/{name}": time.monotonic() - began}
            if spectra_of_it:
                spectra[name] = spectra_of_it
        return Observation(found, spectra)

    @property
    def _collects_features(self) -> bool:
        """Whether neural collapse takes its features from the passes of the near-rank loss."""
        name = "neural_collapse"
        return name in self.config.diagnostics and name not in self._failed_diagnostics and _has_classes(self.task)

    def _batches(self, size: int) -> list["_Block"]:
        """This rank's blocks of the first `size` probe samples; smaller probe sets are subsets of larger ones."""
        chosen = self._permutation[:size].sort().values.to(self.world.device)
        out = []
        for start, stop in blocks(size, self._block_size, self.world):
            indices = chosen[start:stop]
            inputs = self.preprocess(self.train_set.inputs[indices])
            out.append(_Block(start, inputs, self.train_set.targets[indices]))
        return out


class _Block(NamedTuple):
    """Probe samples that pass through the network together."""

    start: int
    """Position of the first one in the probe set."""
    inputs: Tensor
    targets: Tensor


def _after_pass(
    sums: BlockSums, batches: Sequence[_Block], classifier: ClassifierInputs | None, number: int, outputs: Tensor
) -> None:
    sums.add(batches[number].start, outputs, batches[number].targets)
    if classifier is not None:
        classifier.add(outputs)


def _has_classes(task: Task) -> bool:
    return task.spec.num_classes is not None and not task.spec.target_shape


class _Measured(NamedTuple):
    """What a diagnostic gets beside network and samples."""

    on_stage: StageProgress | None
    classifier: ClassifierInputs | None
    """What the passes of the near-rank loss have found; None: there were none, or it is not needed."""

    def progress(self, stage: str) -> Progress:
        """That of a diagnostic, which begins now."""
        return _progress(self.on_stage, stage)


def _progress(on_stage: StageProgress | None, stage: str) -> Progress:
    if on_stage is None:
        return no_progress
    on_stage(stage, 0.0, 1.0)
    return partial(on_stage, stage)


Diagnosed = tuple[Metrics, list[LayerSpectrum]]
Diagnostic = Callable[[nn.Module, Batches, ProbeObserver, _Measured], Diagnosed]


def _norms(model: nn.Module, batches: Batches, observer: ProbeObserver, measured: _Measured) -> Diagnosed:
    return distance_from_init(model, observer.initial_P), []


def _weights(model: nn.Module, batches: Batches, observer: ProbeObserver, measured: _Measured) -> Diagnosed:
    found = weight_spectra(model, world=observer.world, on_progress=measured.progress("spectra of weights"))
    return metrics(found), found


def _neural_collapse(model: nn.Module, batches: Batches, observer: ProbeObserver, measured: _Measured) -> Diagnosed:
    spec = observer.task.spec
    if not _has_classes(observer.task):
        targets = "sequences" if spec.num_classes else "real numbers"
        raise UsageError(f"NC1 needs one class for each sample, and the targets are {targets}")
    on_progress = measured.progress("neural collapse")
    value = nc1(model, batches, world=observer.world, features=measured.classifier, on_progress=on_progress)
    return {"nc1": value}, []


def _hessian(model: nn.Module, batches: Batches, observer: ProbeObserver, measured: _Measured) -> Diagnosed:
    task, world = observer.task, observer.world
    options = {"num_targets": task.num_targets, "world": world}
    on_progress = measured.progress("Hessian eigenvalues, at most")
    values = hessian_eigenvalues(model, batches, task.loss_sum, **options, num=NUM_EIGENVALUES, on_progress=on_progress)
    on_progress = measured.progress("Hessian trace")
    trace, error = hessian_trace(model, batches, task.loss_sum, **options, on_progress=on_progress)
    found = {f"hessian/eigenvalue_{number}": value for number, value in enumerate(values, 1)}
    return found | {"hessian/trace": trace, "hessian/trace_standard_error": error}, []


def _keskar(model: nn.Module, batches: Batches, observer: ProbeObserver, measured: _Measured) -> Diagnosed:
    task = observer.task
    on_progress = measured.progress("Keskar sharpness")
    value = keskar_sharpness(
        model, batches, task.loss_sum, num_targets=task.num_targets, world=observer.world, on_progress=on_progress
    )
    return {"keskar_sharpness": value}, []


DIAGNOSTICS: dict[str, Diagnostic] = {  # without noise_scale, which is computed from training gradients
    "norms": _norms,
    "weights": _weights,
    "neural_collapse": _neural_collapse,
    "hessian": _hessian,
    "keskar": _keskar,
}


def measurement_seconds(values: Metrics) -> float:
    """Seconds that a measurement took, without controls.

    >>> measurement_seconds({"nc1": 9.0, "probe_seconds/near_rank_loss": 1.0, "probe_seconds/control/n64": 5.0})
    1.0
    """
    times = {name: value for name, value in values.items() if name.startswith("probe_seconds/")}
    return sum(value for name, value in times.items() if "/control/" not in name)
