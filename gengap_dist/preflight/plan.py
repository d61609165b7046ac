"""The whole plan of a run: every check the run would make, and every number that is known before it starts."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.config.sections import BatchConfig, RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.sampler import EpochSampler, batch_size_schedule
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.launchers.local import threads_per_rank
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import has_batch_norm
from gengap_dist.parallel import memory_model
from gengap_dist.parallel.memory_model import Memory
from gengap_dist.preflight import communication_model
from gengap_dist.preflight.batch_layout import Cluster, Layout, layout
from gengap_dist.preflight.communication_model import Link, Message
from gengap_dist.preflight.machine_constants import ComputeConstants, Constants, workload
from gengap_dist.probes import layer_view
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.layers import choose
from gengap_dist.probes.spectra import measure
from gengap_dist.training.algorithms.base import batch_plan_for
from gengap_dist.training.algorithms.rank_penalty import RankPenalty
from gengap_dist.training.autotune.memory_format import resolved_memory_format
from gengap_dist.training.autotune.micro_batch import (
    Hardware,
    ModelShape,
    candidates,
    device_name,
    earlier,
    resolved_micro_size,
)
from gengap_dist.training.checks import before_data, check_auto, check_logits, check_norm, strategy_name
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.observer import PROBE_BLOCK
from gengap_dist.training.optimizer import build_optimizer as build_optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """One near-rank-loss measurement."""

    num_samples: int
    num_ranks_with_images: int
    num_passes: int
    """Over the probe images."""
    forms: dict[str, str]
    """By layer and view: rows x units, and which square matrix is kept."""
    messages: list[Message]
    bytes_on_wire: int
    """Sent by a rank."""


@dataclass(frozen=True)
class Time:
    """Predicted seconds of one step, nothing overlapped."""

    compute: float
    """Of the rank with the most samples: forward, backward and the update."""
    communication: float
    probe_communication: float
    """Of one measurement."""
    of_run: float
    """All steps; without evaluations, probes and checkpoints."""

    @property
    def step(self) -> float:
        """Computing, then talking."""
        return self.compute + self.communication


@dataclass(frozen=True)
class Plan:
    """Everything; what cannot be said, because something was refused before, is None or empty."""

    cluster: Cluster
    strategy: str
    model: str
    num_parameters: int | None = None
    data: datasets.Sizes | None = None
    steps_per_epoch: int | None = None
    num_steps: int | None = None
    batch: Layout | None = None
    ragged: Layout | None = None
    """The last step of each epoch, if it is smaller."""
    has_batch_norm: bool = False
    memory: Memory | None = None
    messages: list[Message] = field(default_factory=list)
    """Of one step."""
    bytes_on_wire: int = 0
    probe: Probe | None = None
    time: Time | None = None
    time_at_best: Time | None = None
    """With the links between nodes as fast as those inside, where only the latter are known."""
    missing: str = ""
    """What a prediction of time lacks."""
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same, as JSON values."""
        tree = asdict(self)
        tree["cluster"]["num_ranks"] = self.cluster.num_ranks
        for name, found in (("memory", self.memory), ("time", self.time), ("time_at_best", self.time_at_best)):
            if isinstance(found, Memory):
                tree[name]["total"] = found.total
            elif found:
                tree[name]["step"] = found.step
        if self.data:
            tree["data"] = self.data._asdict()
        return tree


def make_plan(config: RunConfig, cluster: Cluster, constants: Constants) -> Plan:
    """The plan of a run of `config` on `cluster`; nothing is trained, no data are read."""
    refused: list[str] = []

    def tried(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UsageError as error:
            refused.append(str(error))
            return None

    given, (config, assumed) = config, _with_micro_size(config, cluster)
    num_ranks, batch = cluster.num_ranks, config.batch
    strategy = strategy_name(config, num_ranks)
    found: dict[str, Any] = {"cluster": cluster, "strategy": strategy, "model": config.model.name, "refused": refused}
    found["batch"] = layout(batch_plan_for(config, batch.global_size, num_ranks))
    device = config.launch.device
    for check in before_data(config, num_ranks, None if device == "auto" else device):
        tried(check)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if sizes := tried(lambda: datasets.sizes(config.data)):
            order = tried(
                lambda: EpochSampler(
                    sizes.num_train, batch.global_size, config.seed, growth=batch_size_schedule(config)
                )
            )
            found |= {"data": sizes} | _steps(config, order, num_ranks, tried)
            if model := tried(lambda: _model(config, sizes)):
                tried(lambda: check_auto(given, model))
                tried(lambda: check_norm(config, model, order.sizes() if order else [], num_ranks))
                tried(lambda: build_optimizer(config.optim, model))
                if config.algorithm.rank_penalty is not None:
                    tried(lambda: RankPenalty(config.algorithm).layers(model, lambda: _example(config, sizes)))
                found |= _of_model(config, cluster, model, sizes, found["batch"], tried)
                found |= _time(config, constants, found)
    found["warned"] = sorted({str(warning.message) for warning in caught})
    return Plan(**found, assumed=assumed + _assumed(config, strategy, found))


def _with_micro_size(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, list[str]]:
    """The config with a number for batch.micro_size=auto, and in words why that one; torch's own order of pictures."""
    if config.train.channels_last == "auto":
        config = resolved_memory_format(config, False)
    if config.batch.micro_size != "auto":
        return config, []
    known = None
    with suppress(UsageError):  # the plan will list it
        sizes = datasets.sizes(config.data)
        network = ModelShape(_model(config, sizes), sizes.in_channels, sizes.num_classes)
        known = earlier(config, network, _place(config, cluster))
    if known:
        return resolved_micro_size(config, known), [
            f"batch.micro_size=auto found {known} on this machine before; another may differ"
        ]
    choice = candidates(config, cluster.num_ranks)
    size = max([size for size in choice if size <= BatchConfig().max_micro_size] or choice[:1])
    said = f"batch.micro_size=auto is taken to find {size}: nothing was measured yet of such a run on this machine"
    return resolved_micro_size(config, size), [said] if len(choice) > 1 else []


def _place(config: RunConfig, cluster: Cluster) -> Hardware:
    """Where a rank of the cluster would compute, if its machines were like this one."""
    local, kind = cluster.gpus_per_node, config.launch.device
    on_gpu = kind == "cuda" or (kind == "auto" and local <= torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    return Hardware(device_name(device), int(threads_per_rank(local)["OMP_NUM_THREADS"]), local, cluster.num_ranks)


def _steps(config: RunConfig, order: EpochSampler | None, num_ranks: int, tried: Callable[..., Any]) -> dict[str, Any]:
    batch, schedule = config.batch, order and tried(lambda: Schedule.of(config, order))
    if order is None or schedule is None:
        return {}
    rest = order.num_samples % batch.global_size
    return {
        "steps_per_epoch": order.steps_per_epoch,
        "num_steps": schedule.num_steps,
        "ragged": layout(batch_plan_for(config, rest, num_ranks)) if rest else None,
    }


def _model(config: RunConfig, sizes: datasets.Sizes) -> nn.Module:
    side, dtype = config.data.image_size, getattr(torch, config.train.dtype)
    model = models.from_config(config, sizes.num_classes, sizes.in_channels, World()).to(dtype)
    check_logits(config, model, torch.zeros(2, sizes.in_channels, side, side, dtype=dtype), sizes.num_classes)
    return model


def _of_model(
    config: RunConfig,
    cluster: Cluster,
    model: nn.Module,
    sizes: datasets.Sizes,
    batch: Layout,
    tried: Callable[..., Any],
) -> dict[str, Any]:
    num_ranks, strategy = cluster.num_ranks, strategy_name(config, cluster.num_ranks)
    side, itemsize = config.data.image_size, getattr(torch, config.train.dtype).itemsize
    whole = itemsize * sum(p.numel() for p in model.parameters())
    trained = itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
    messages = (
        communication_model.step_messages(strategy, trained, whole, batch.micro_batches_per_rank[1])
        if num_ranks > 1
        else []
    )
    held = memory_model.weights(config, model, strategy, num_ranks)
    probe, probe_bytes = tried(lambda: _probe(config, model, sizes, num_ranks)) or (None, 0)
    if probe and memory_model.SHARDING[strategy].parameters:
        probe_bytes += whole
    least = 2 if has_batch_norm(model) else 1  # which refuses to train on one image
    micro_size = max(batch.micro_sizes[1], least)
    saved, how = memory_model.saved_for_backward(config, model, (sizes.in_channels, side, side), micro_size)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "has_batch_norm": has_batch_norm(model),
        "messages": messages,
        "bytes_on_wire": sum(message.on_wire(num_ranks) for message in messages),
        "memory": Memory(
            **held,
            data=0 if (config.data.device, config.launch.device) == ("cpu", "cuda") else sizes.num_bytes,
            activations=saved,
            activations_by=how,
            probe=probe_bytes,
            probe_limit=config.probe.memory_mib * 2**20 if probe else 0,
        ),
        "probe": probe,
    }


def probe_counts(config: RunConfig, sizes: datasets.Sizes, num_ranks: int) -> list[int]:
    """Images of the probe set on every rank."""
    size = min(max(config.probe.num_samples), sizes.num_train)
    return [sum(s.size for s in blocks(size, PROBE_BLOCK, World(rank, num_ranks))) for rank in range(num_ranks)]


def _example(config: RunConfig, sizes: datasets.Sizes) -> Tensor:
    side = config.data.image_size
    return torch.zeros(1, sizes.in_channels, side, side, dtype=getattr(torch, config.train.dtype))


def _probe(config: RunConfig, model: nn.Module, sizes: datasets.Sizes, num_ranks: int) -> tuple[Probe, int] | None:
    probe = config.probe
    if not probe.enabled:
        return None
    counts = probe_counts(config, sizes, num_ranks)
    example = _example(config, sizes)
    with eval_context(model):
        sites = layer_view.layer_views(choose(model, example, probe.layers), probe.views, sum(counts))
    passes = measure.plan_passes(sites, max(counts), probe.memory_mib)
    device_type = "cuda" if config.launch.device == "cuda" else "cpu"
    options = {"method": probe.method, "memory_mib": probe.memory_mib, "device_type": device_type}
    messages = communication_model.probe_messages(sites, passes, counts, **options)
    stream = measure.stream_bytes(device_type, probe.memory_mib)
    num_bytes = memory_model.probe_bytes(sites, passes, max(counts), stream) + max(counts) * example.nbytes
    forms = {
        "/".join(filter(None, (site.layer.name, site.view))): f"{site.num_rows} x {site.num_units}, kept as "
        + f"{site.size} x {site.size} ({'rows' if site.wide else 'units'})"
        for site in sites
    }
    on_wire = sum(message.on_wire(num_ranks) for message in messages)
    return Probe(sum(counts), sum(map(bool, counts)), len(passes), forms, messages, on_wire), num_bytes


def _time(config: RunConfig, constants: Constants, found: dict[str, Any]) -> dict[str, Any]:
    cluster, batch = found["cluster"], found["batch"]
    compute = constants.compute.get(workload(config, found["data"].in_channels, batch.micro_sizes[1]))
    inside, between = (Link(c.alpha, c.beta) if c else None for c in (constants.inside, constants.between))
    needs_inside = cluster.gpus_per_node > 1 or (cluster.nodes > 1 and between is None)
    if compute is None or (needs_inside and inside is None):
        what = "this network" if compute is None else "the link inside a node"
        return {"missing": f"{what} is not calibrated: add --calibrate"}
    near, far = inside or Link(0.0, 0.0), between or inside or Link(0.0, 0.0)
    computing, talking = step_seconds(cluster, batch, found["messages"], compute, near, far)
    probed = found["probe"].messages if found["probe"] else []
    probing = sum(communication_model.seconds(message, cluster, near, far) for message in probed)
    # a batch larger than the data set is refused, and has no steps
    time = Time(computing, talking, probing, (found.get("num_steps") or 0) * (computing + talking))
    if cluster.nodes > 1 and between is None:
        missing = 'the link between nodes is not measured here: give its constants as "between" with --constants FILE'
        return {"time_at_best": time, "missing": missing}
    return {"time": time}


def step_seconds(
    cluster: Cluster,
    batch: Layout,
    messages: Sequence[Message],
    compute: ComputeConstants,
    inside: Link,
    between: Link,
) -> tuple[float, float]:
    """Seconds of one step: computing, of the rank with the most samples, and then talking."""
    computing = batch.samples_per_rank[1] * compute.seconds_per_sample + compute.seconds_per_update
    return computing, sum(communication_model.seconds(message, cluster, inside, between) for message in messages)


def _assumed(config: RunConfig, strategy: str, found: dict[str, Any]) -> list[str]:
    """What the numbers take for granted."""
    counted = "pictures are counted, not opened"
    said = [
        counted if config.data.name == "imagefolder" else f"{config.data.name} has as many images as was published",
        "bytes are of one rank; sums of losses, validation and checkpoints are not counted, nor are the diagnostics "
        f"({', '.join(config.probe.diagnostics) or 'none'})",
        "memory leaves out temporaries of single operations, buckets, libraries and the CUDA context",
        "time is computing and then talking: backward passes that hide communication are faster; nodes share no links",
    ]
    if config.launch.device == "auto" and config.probe.enabled:
        said.append("the probe works in blocks that suit a CPU; with launch.device=cuda they are larger")
    if config.data.augment:
        said.append(f"augmentation ({', '.join(config.data.augment)}) is part of the measured time")
    if strategy.startswith("zero") or strategy == "fsdp":
        said.append(f"{strategy} sends what its published scheme says (Rajbhandari et al. 2020), with no padding")
    return said
