"""`batch.micro_size=auto`: chooses a micro-batch size that fits in memory and is fast, the same on all ranks.

The memory of each size is estimated with passes of fake tensors. Sizes that fit are measured (`search`). The result is
cached under a key of everything it depends on, in the user's cache folder, and saved in run.json, so that a resumed run
continues with the same size.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cores import processor_name
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.runtime_context import local_size
from gengap_dist.errors import UsageError
from gengap_dist.parallel import memory_model
from gengap_dist.training.autotune.available_memory import available_memory
from gengap_dist.training.autotune.cache import MicroSize, as_run_info, load_micro_sizes, lookup, store
from gengap_dist.training.autotune.search import samples_per_second
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, max_over_ranks
from gengap_dist.training.checks import strategy_name
from gengap_dist.training.tasks import Task

TEMPORARY = 2  # peak over saved memory of a pass: 1.1 to 1.9 for LeNet-5, ResNets, VGG-16 and ViT
OTHER_BYTES = 64 * 2**20  # library buffers, which matter for small networks
GIB = 2**30
REMEDY = "set train.activation_checkpointing=true, start more ranks, or choose a smaller network or data.image_size"


class Workload(NamedTuple):
    """What is computed: a network, and its task."""

    model: nn.Module
    task: Task


class Hardware(NamedTuple):
    """The hardware of a rank, and the number of ranks that share it."""

    device: str
    threads: int
    local_ranks: int
    num_ranks: int


def resolve_micro_size(
    config: RunConfig, workload: Workload, world: World, previous: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config with a number for batch.micro_size, and how it was chosen; None if it was set. Collective.

    The network, random states and gradients are not changed: a copy of the network is measured. It is not compiled,
    even if train.compile is true, because every size would need a compilation.

    Args:
        config: the run, which `checks.check_auto` has passed.
        workload: its network, unsharded, and its task.
        world: the ranks.
        previous: the choice saved in run.json, if the run is resumed; the value on rank 0 is used.

    Raises:
        UsageError: if no size fits in memory.
    """
    if config.batch.micro_size != "auto":
        return config, None
    gpus = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), world.timer.phase("other", "choosing batch.micro_size"):
        result = _choose_micro_size(config, workload, world, previous)
    world.timer.pop_seconds()  # exclude this time from the run
    return with_micro_size(config, result["size"]), result


def with_micro_size(config: RunConfig, size: int) -> RunConfig:
    """The config with `size` for batch.micro_size."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": size})})


def _choose_micro_size(
    config: RunConfig, workload: Workload, world: World, previous: Mapping[str, Any]
) -> dict[str, Any]:
    hardware = hardware_of(world)
    description, sizes = describe_workload(config, workload, hardware), candidates(config, world.size)
    key = cache_key(description)
    free_bytes = -max_over_ranks(-float(available_memory(world.device, hardware.local_ranks)), world) - fixed_bytes(
        config, workload.model, world.size
    )
    cached = lookup(MicroSize, key, previous) if world.rank == 0 else {}
    size, num_bytes = (world.broadcast_int(cached.get(name, 0)) for name in ("size", "pass_bytes"))
    if size and num_bytes <= free_bytes:
        return {**cached, "size": size}  # only rank 0 records it
    plain = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    dtype = getattr(torch, config.train.dtype)
    model = models.from_config(plain, workload.task.spec, World()).to(world.device, dtype)
    pass_bytes = pass_bytes_function(config, model, workload.task)
    fitting = [size for size in sizes if pass_bytes(size) <= free_bytes]
    if not fitting:
        least, free = pass_bytes(sizes[0]) / GIB, max(0.0, free_bytes) / GIB
        raise UsageError(
            f"batch.micro_size (auto) finds no size that fits in memory: a pass of {sizes[0]} takes about "
            f"{least:.3g} GiB, and gradients, optimizer and copies of weights leave a rank {free:.3g} GiB: {REMEDY}"
        )
    rates: dict[int, float] = {}
    if len(sizes) > 1:
        synthetic = SyntheticWorkload(plain, model, workload.task, world.device)
        rates = samples_per_second(synthetic, config, sizes[-1], fitting, world)
        if not rates:
            raise UsageError(
                f"batch.micro_size (auto) ran out of memory in a pass of {fitting[0]} "
                f"({synthetic.out_of_memory_message or 'on another rank'}): {REMEDY}"
            )
    size = world.broadcast_int(max(rates, key=lambda size: rates[size], default=sizes[0]))
    result = MicroSize(size=size, samples_per_second=rates, pass_bytes=pass_bytes(size), where=description)
    if world.rank == 0:
        store(key, result)
    return as_run_info(result, key, "measurement" if rates else "there is no other")


def cached_micro_size(config: RunConfig, workload: Workload, hardware: Hardware) -> int | None:
    """The cached micro-batch size for such a run on such hardware, if any."""
    result = load_micro_sizes().found.get(cache_key(describe_workload(config, workload, hardware)))
    return result and result.size


def hardware_of(world: World) -> Hardware:
    """The hardware of this rank."""
    return Hardware(device_name(world.device), torch.get_num_threads(), local_size(), world.size)


def device_name(device: torch.device) -> str:
    """The model name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def describe_workload(config: RunConfig, workload: Workload, hardware: Hardware) -> dict[str, Any]:
    """Everything the result depends on: network, samples, settings, how the batch is split, and the machine.

    A user's network is identified by its name and the names and shapes of its parameters: other changes to it do not
    cause a new measurement.
    """
    shapes = [(name, list(parameter.shape)) for name, parameter in workload.model.named_parameters()]
    spec, train = workload.task.spec, config.train
    return {
        "model": config.model.model_dump(mode="json"),
        "parameters": cache_key(dict(shapes)),
        "task": config.task.name,
        "inputs": list(spec.input_shape),
        "outputs": list(spec.output_shape),
        "augment": list(config.data.augment),
        "sizes": candidates(config, hardware.num_ranks),
        **{
            name: getattr(train, name)
            for name in ("dtype", "autocast", "channels_last", "activation_checkpointing", "deterministic")
        },
        "strategy": strategy_name(config, hardware.num_ranks),
        **hardware._asdict(),
        "torch": torch.__version__,
    }


def cache_key(description: Mapping[str, Any]) -> str:
    """A short hash of `description`."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]


def candidates(config: RunConfig, num_ranks: int) -> list[int]:
    """Powers of two times batch.ghost_size, up to a rank's share of the largest step; and that share.

    There is only one candidate with a gradient penalty, whose groups are micro-batches, and with model.norm=sync, which
    needs the whole share in one pass.

    >>> candidates(RunConfig.model_validate({"batch": {"global_size": 100}}), num_ranks=3)
    [1, 2, 4, 8, 16, 32, 34]
    >>> candidates(RunConfig.model_validate({"batch": {"global_size": 300, "ghost_size": 20}}), num_ranks=2)
    [20, 40, 80, 160]
    """
    if config.algorithm.penalty_size:
        return [config.algorithm.penalty_size]
    group = config.batch.ghost_size or 1
    share = -(-max(config.batch.sizes) // group // num_ranks)  # in groups; the last may be incomplete
    powers = [2**power for power in range(share.bit_length()) if 2**power < share]
    return [group * share] if config.norm == "sync" else [group * size for size in (*powers, share)]


def fixed_bytes(config: RunConfig, model: nn.Module, num_ranks: int) -> int:
    """Bytes that a rank still needs for gradients, optimizer state and copies of weights.

    At least those of a copy of the network and its gradients, which the measurement needs.
    """
    weight_bytes = memory_model.weight_bytes(config, model, strategy_name(config, num_ranks), num_ranks)
    later_bytes = weight_bytes["gradients"] + weight_bytes["optimizer_state"] + weight_bytes["kept_weights"]
    return OTHER_BYTES + max(later_bytes, 2 * sum(parameter.nbytes for parameter in model.parameters()))


def pass_bytes_function(config: RunConfig, model: nn.Module, task: Task) -> Callable[[int], int]:
    """The peak bytes of a pass as a function of its samples: linear, fitted to two passes of fake tensors."""
    group = config.batch.ghost_size or 2
    one, two = (
        memory_model.saved_for_backward(config, model, task.spec, task.training_loss_sum, size)[0]
        for size in (group, 2 * group)
    )
    return lambda size: TEMPORARY * (one + (two - one) * (size - group) // group)
