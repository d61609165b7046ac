"""The plan of a run: all checks of the run, and all numbers that are known before it starts."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import BatchConfig, RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.cores import threads_per_rank
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import has_batch_norm
from gengap_dist.parallel import memory_model
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.memory_model import MemoryEstimate
from gengap_dist.parallel.out_of_memory import is_out_of_memory
from gengap_dist.preflight import communication_model
from gengap_dist.preflight.batch_layout import Cluster, Layout, layout
from gengap_dist.preflight.communication_model import Link, Message
from gengap_dist.preflight.machine_constants import ComputeConstants, Constants, workload_name
from gengap_dist.probes import layer_view
from gengap_dist.probes.activations import eval_context, leaf_names
from gengap_dist.probes.layers import select_layers
from gengap_dist.probes.spectra import measure
from gengap_dist.training.algorithms.base import batch_plan_for
from gengap_dist.training.algorithms.rank_penalty import RankPenalty
from gengap_dist.training.autotune.memory_format import with_memory_format
from gengap_dist.training.autotune.micro_batch import (
    Hardware,
    Workload,
    cached_micro_size,
    candidates,
    device_name,
    with_micro_size,
)
from gengap_dist.training.checks import (
    check_auto_micro_size,
    check_network,
    check_norm,
    check_parameters,
    startup_checks,
    strategy_name,
)
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.observer import PROBE_BLOCK
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.probed_layers import find_probed_layers, probe_set_sizes
from gengap_dist.training.tasks import build_task

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """One near-rank-loss measurement."""

    num_samples: int
    num_ranks_with_samples: int
    num_passes: int
    """Over the probe samples."""
    forms: dict[str, str]
    """By layer and view: rows x units, and the square matrix that is kept."""
    messages: list[Message]
    bytes_on_wire: int
    """Bytes sent by a rank."""


@dataclass(frozen=True)
class Time:
    """Predicted seconds of one step, without overlap of compute and communication."""

    compute: float
    """Forward, backward and update, on the rank with the most samples."""
    communication: float
    probe_communication: float
    """Of one measurement."""
    of_run: float
    """All steps; without evaluations, probes and checkpoints."""

    @property
    def step(self) -> float:
        """Compute plus communication."""
        return self.compute + self.communication


@dataclass(frozen=True)
class Plan:
    """The plan; fields that cannot be computed after an error are None or empty."""

    cluster: Cluster
    strategy: Strategy
    model: str
    num_parameters: int | None = None
    data: datasets.Sizes | None = None
    steps_per_epoch: int | None = None
    num_steps: int | None = None
    batch: Layout | None = None
    ragged: Layout | None = None
    """The last step of each epoch, if it is smaller."""
    has_batch_norm: bool = False
    memory: MemoryEstimate | None = None
    messages: list[Message] = field(default_factory=list)
    """Of one step."""
    bytes_on_wire: int = 0
    probe: Probe | None = None
    time: Time | None = None
    time_at_best: Time | None = None
    """Time with links between nodes as fast as inside nodes, if only the latter are known."""
    missing: str = ""
    """Why there is no prediction of time."""
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        tree = asdict(self)
        tree["cluster"]["num_ranks"] = self.cluster.num_ranks
        for name, section in (("memory", self.memory), ("time", self.time), ("time_at_best", self.time_at_best)):
            if isinstance(section, MemoryEstimate):
                tree[name]["total"] = section.total
            elif section:
                tree[name]["step"] = section.step
        if self.data:
            tree["data"] = self.data._asdict() | {"spec": asdict(self.data.spec)}
        return tree


def make_plan(config: RunConfig, cluster: Cluster, constants: Constants) -> Plan:
    """The plan of a run of `config` on `cluster`; nothing is trained and no data are read."""
    refused: list[str] = []

    def collect_refusal(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except (UsageError, RuntimeError, MemoryError, OverflowError) as error:
            cause = error.__cause__ or error  # of a user's own factory
            if not is_out_of_memory(cause) and "verflow" not in str(cause):
                if not isinstance(error, UsageError):
                    raise
                refused.append(str(error))
                return None
            refused.append(
                f"model.name ({config.model.name}) needs more memory than this machine has: choose "
                "smaller model.widths, a smaller data.image_size, or plan it on a larger machine"
            )
        return None

    given_config, (config, assumed) = config, _with_micro_size(config, cluster)
    num_ranks, batch = cluster.num_ranks, config.batch
    strategy = strategy_name(config, num_ranks)
    fields: dict[str, Any] = {"cluster": cluster, "strategy": strategy, "model": config.model.name, "refused": refused}
    fields["batch"] = layout(batch_plan_for(config, batch.global_size, num_ranks))
    device = config.launch.device
    for check in startup_checks(config, num_ranks, None if device == "auto" else device):
        collect_refusal(check)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if sizes := collect_refusal(lambda: datasets.sizes(config.data)):
            sampler = collect_refusal(lambda: EpochSampler.of(config, sizes.num_train))
            fields |= {"data": sizes} | _step_fields(config, sampler, num_ranks, collect_refusal)
            if workload := collect_refusal(lambda: _workload(config, sizes)):
                model = workload.model
                collect_refusal(lambda: check_auto_micro_size(given_config, model))
                collect_refusal(lambda: check_parameters(given_config, model, num_ranks))
                collect_refusal(lambda: check_norm(config, model, sampler.sizes() if sampler else [], num_ranks))
                collect_refusal(lambda: build_optimizer(config.scaled_optim, model))
                if config.algorithm.rank_penalty is not None:
                    collect_refusal(
                        lambda: RankPenalty(config, workload.task).check(
                            model, lambda: _inputs(config, sizes, 1), sizes.num_train, num_ranks
                        )
                    )
                fields |= (
                    collect_refusal(
                        lambda: _model_fields(config, cluster, workload, sizes, fields["batch"], collect_refusal)
                    )
                    or {}
                )
                fields |= _time_fields(config, constants, fields)
    fields["warned"] = sorted({str(warning.message) for warning in caught})
    return Plan(**fields, assumed=assumed + _assumptions(config, strategy, fields))


def _with_micro_size(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, list[str]]:
    """The config with a number for batch.micro_size=auto, and the reason; torch's default memory format."""
    if config.train.channels_last == "auto":
        config = with_memory_format(config, False)
    if config.batch.micro_size != "auto":
        return config, []
    known = None
    with suppress(UsageError, RuntimeError, MemoryError):  # the plan lists the error
        sizes = datasets.sizes(config.data)
        known = cached_micro_size(config, _workload(config, sizes), _hardware(config, cluster))
    if known:
        return with_micro_size(config, known), [
            f"batch.micro_size=auto found {known} on this machine before; another machine may differ"
        ]
    sizes_to_try = candidates(config, cluster.num_ranks)
    size = max([size for size in sizes_to_try if size <= BatchConfig().max_micro_size] or sizes_to_try[:1])
    assumption = f"batch.micro_size=auto is assumed to choose {size}: no such run was measured on this machine yet"
    return with_micro_size(config, size), [assumption] if len(sizes_to_try) > 1 else []


def _hardware(config: RunConfig, cluster: Cluster) -> Hardware:
    """The hardware of a rank, if the machines of the cluster were like this one."""
    local, kind = cluster.gpus_per_node, config.launch.device
    on_gpu = kind == "cuda" or (kind == "auto" and local <= torch.cuda.device_count())
    device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    threads = threads_per_rank(local, config.launch.threads_per_rank).number
    return Hardware(device_name(device), threads, local, cluster.num_ranks)


def _step_fields(
    config: RunConfig, sampler: EpochSampler | None, num_ranks: int, collect_refusal: Callable[..., Any]
) -> dict[str, Any]:
    batch, schedule = config.batch, sampler and collect_refusal(lambda: Schedule.of(config, sampler))
    if sampler is None or schedule is None:
        return {}
    last_size = sampler.num_samples % batch.global_size
    return {
        "steps_per_epoch": sampler.steps_per_epoch,
        "num_steps": schedule.num_steps,
        "ragged": layout(batch_plan_for(config, last_size, num_ranks)) if last_size else None,
    }


def _workload(config: RunConfig, sizes: datasets.Sizes) -> Workload:
    task = build_task(config, sizes.spec)
    model = models.from_config(config, sizes.spec, World()).to(getattr(torch, config.train.dtype))
    check_network(config, model, _inputs(config, sizes, 2), sizes.spec.zero_targets(2), task)
    return Workload(model, task)


def _model_fields(
    config: RunConfig,
    cluster: Cluster,
    workload: Workload,
    sizes: datasets.Sizes,
    batch: Layout,
    collect_refusal: Callable[..., Any],
) -> dict[str, Any]:
    model, task = workload
    num_ranks, strategy = cluster.num_ranks, strategy_name(config, cluster.num_ranks)
    itemsize = getattr(torch, config.train.dtype).itemsize
    parameter_bytes = itemsize * sum(p.numel() for p in model.parameters())
    gradient_bytes = itemsize * sum(p.numel() for p in model.parameters() if p.requires_grad)
    messages = (
        communication_model.step_messages(strategy, gradient_bytes, parameter_bytes, batch.micro_batches_per_rank[1])
        if num_ranks > 1
        else []
    )
    if (shard_size := config.launch.shard_size) and num_ranks % shard_size == 0:
        messages = communication_model.hybrid_messages(messages, cluster, shard_size)
    weight_bytes = memory_model.weight_bytes(config, model, strategy, num_ranks)
    probe, probe_bytes = collect_refusal(lambda: _probe(config, model, sizes, num_ranks)) or (None, 0)
    if probe and CAPABILITIES[strategy].sharding.parameters:
        probe_bytes += parameter_bytes
    min_micro_size = 2 if has_batch_norm(model) else 1  # batch norm refuses to train on one sample
    micro_size = max(batch.micro_sizes[1], min_micro_size)
    activation_bytes, activations_method = memory_model.saved_for_backward(
        config, model, task.spec, task.training_loss_sum, micro_size
    )
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "has_batch_norm": has_batch_norm(model),
        "messages": messages,
        "bytes_on_wire": sum(message.on_wire(num_ranks) for message in messages),
        "memory": MemoryEstimate(
            **weight_bytes,
            data=0 if (config.data.device, config.launch.device) == ("cpu", "cuda") else sizes.num_bytes,
            activations=activation_bytes,
            activations_method=activations_method,
            probe=probe_bytes,
            probe_limit=config.probe.memory_mib * 2**20 if probe else 0,
        ),
        "probe": probe,
    }


def probe_counts(config: RunConfig, model: nn.Module, sizes: datasets.Sizes, num_ranks: int) -> list[int]:
    """Number of samples of the probe set on each rank that has any: the first ones."""
    example = _inputs(config, sizes, 1)
    layers = find_probed_layers(model, example, config.probe)
    *_, size = probe_set_sizes(config.probe, layers, example.nbytes, sizes.num_train)
    block_size = sizes.spec.block_size(PROBE_BLOCK)
    num_with_samples = min(num_ranks, -(-size // block_size))
    worlds = [World(rank, num_ranks) for rank in range(num_with_samples)]
    return [sum(span.size for span in blocks(size, block_size, world)) for world in worlds]


def _inputs(config: RunConfig, sizes: datasets.Sizes, num: int) -> Tensor:
    return sizes.spec.zero_inputs(num, getattr(torch, config.train.dtype))


def _probe(config: RunConfig, model: nn.Module, sizes: datasets.Sizes, num_ranks: int) -> tuple[Probe, int] | None:
    probe = config.probe
    if not probe.enabled:
        return None
    counts = probe_counts(config, model, sizes, num_ranks)
    example = _inputs(config, sizes, 1)
    with eval_context(model):
        views = layer_view.build_layer_views(select_layers(model, example, probe.layers), probe.views, sum(counts))
    passes = measure.plan_passes(views, max(counts), probe.memory_mib)
    device_type = "cuda" if config.launch.device == "cuda" else "cpu"
    options = {"method": probe.method, "memory_mib": probe.memory_mib, "device_type": device_type}
    sizes_of_network = {"input_size": example.numel(), "num_leaves": len(leaf_names(model))}
    messages = communication_model.probe_messages(
        views, passes, counts, num_ranks=num_ranks, **sizes_of_network, **options
    )
    block_bytes = measure.stream_bytes(device_type, probe.memory_mib)
    num_bytes = memory_model.probe_bytes(views, passes, max(counts), block_bytes) + max(counts) * example.nbytes
    forms = {
        "/".join(filter(None, (view.layer.name, view.view))): f"{view.num_rows} x {view.num_units}, kept as "
        + f"{view.size} x {view.size} ({'rows' if view.is_wide else 'units'})"
        for view in views
    }
    on_wire = sum(message.on_wire(num_ranks) for message in messages)
    return Probe(sum(counts), len(counts), len(passes), forms, messages, on_wire), num_bytes


def _time_fields(config: RunConfig, constants: Constants, fields: dict[str, Any]) -> dict[str, Any]:
    cluster, batch = fields["cluster"], fields["batch"]
    compute = constants.compute.get(workload_name(config, fields["data"].spec, batch.micro_sizes[1]))
    inside, between = (Link(c.alpha, c.beta) if c else None for c in (constants.inside, constants.between))
    needs_inside = cluster.gpus_per_node > 1 or (cluster.nodes > 1 and between is None)
    if compute is None or (needs_inside and inside is None):
        uncalibrated = "this network" if compute is None else "the link inside a node"
        return {"missing": f"{uncalibrated} is not calibrated: add --calibrate"}
    inside_link, between_link = inside or Link(0.0, 0.0), between or inside or Link(0.0, 0.0)
    compute_seconds, communication_seconds = step_seconds(
        cluster, batch, fields["messages"], compute, inside_link, between_link
    )
    probe_messages = fields["probe"].messages if fields["probe"] else []
    probe_seconds = sum(
        communication_model.collective_seconds(message, cluster, inside_link, between_link)
        for message in probe_messages
    )
    # a batch larger than the data set is refused, so there is no number of steps
    time = Time(
        compute_seconds,
        communication_seconds,
        probe_seconds,
        (fields.get("num_steps") or 0) * (compute_seconds + communication_seconds),
    )
    if cluster.nodes > 1 and between is None:
        missing = 'the link between nodes is not measured: give its constants as "between" with --constants FILE'
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
    """(compute, communication) seconds of one step; compute is that of the rank with the most samples."""
    compute_seconds = batch.samples_per_rank[1] * compute.seconds_per_sample + compute.seconds_per_update
    return compute_seconds, sum(
        communication_model.collective_seconds(message, cluster, inside, between) for message in messages
    )


def _assumptions(config: RunConfig, strategy: Strategy, fields: dict[str, Any]) -> list[str]:
    """Assumptions behind the numbers, one sentence each."""
    known_from = f"{config.data.name} has the published number of images"
    if config.data.is_own or config.data.is_tokens:
        known_from = f"{config.data.name} was loaded to count its samples"
    elif config.data.name == "imagefolder":
        known_from = "image files are counted, not opened"
    assumptions = [
        known_from,
        "bytes are per rank, without loss sums, validation, checkpoints and diagnostics "
        f"({', '.join(config.probe.diagnostics) or 'none'})",
        "memory does not include temporary tensors of single operations, buckets, libraries and the CUDA context",
        "time is compute plus communication: overlap in the backward pass makes a step faster; nodes share no links",
    ]
    if config.launch.device == "auto" and config.probe.enabled:
        assumptions.append("the probe uses block sizes for a CPU; with launch.device=cuda blocks are larger")
    if config.data.augment:
        assumptions.append(f"augmentation ({', '.join(config.data.augment)}) is part of the measured time")
    if CAPABILITIES[strategy].has_untimed_collectives:
        assumptions.append(
            f"{strategy} traffic is that of the published scheme (Rajbhandari et al. 2020), without padding"
        )
    return assumptions
