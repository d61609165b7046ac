"""`batch.micro_size=auto`: a number that fits and is fast, the same on all ranks, found once and remembered.

What does not fit is known before it is tried: passes of fake images say what a size saves for its backward pass. What
fits is measured (`fastest`). The answer is kept under a mark of all that it depends on: in the user's cache folder, and
in the run's record, so that a resumed run goes on with the same number.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.sampler import batch_size_schedule
from gengap_dist.distributed.process_group import World, local_size
from gengap_dist.errors import UsageError
from gengap_dist.parallel import memory_model
from gengap_dist.training.autotune.available_memory import available_memory
from gengap_dist.training.autotune.cache import MicroSize, as_fact, load_micro_sizes, lookup, store
from gengap_dist.training.autotune.search import images_per_second
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload, most
from gengap_dist.training.checks import strategy_name

TEMPORARY = 2  # what a pass holds at its most, over what it saves: 1.1 to 1.9 for LeNet-5, ResNets, VGG-16 and ViT
OTHER_BYTES = 64 * 2**20  # buffers of libraries, which small networks do not outweigh
GIB = 2**30
REMEDY = "set train.activation_checkpointing=true, start more ranks, or choose a smaller network or data.image_size"


class ModelShape(NamedTuple):
    """A network, what it takes and what it tells apart."""

    model: nn.Module
    in_channels: int
    num_classes: int


class Hardware(NamedTuple):
    """Where a rank computes, and beside how many."""

    device: str
    threads: int
    local_ranks: int
    num_ranks: int


def resolve_micro_size(
    config: RunConfig, network: ModelShape, world: World, before: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config with a number for batch.micro_size, and how that was found; None if it was one already. Collective.

    The network, random states and gradients stay as they are: a twin of the network is measured. It is not compiled,
    whatever train.compile says: every size would cost a compilation, and the run's own would then serve all of them.

    Args:
        config: the run, which `checks.check_auto` has passed.
        network: its network, whole.
        world: the ranks.
        before: how it was found when the run began, if it is resumed; rank 0's word holds.

    Raises:
        UsageError: if nothing fits.
    """
    if config.batch.micro_size != "auto":
        return config, None
    gpus = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), world.timer.phase("other", "choosing batch.micro_size"):
        found = _found(config, network, world, before)
    world.timer.pop_seconds()  # that time is not the run's
    return resolved_micro_size(config, found["size"]), found


def resolved_micro_size(config: RunConfig, size: int) -> RunConfig:
    """The config with `size` for batch.micro_size."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": size})})


def _found(config: RunConfig, network: ModelShape, world: World, before: Mapping[str, Any]) -> dict[str, Any]:
    place = hardware_of(world)
    what, sizes = described(config, network, place), candidates(config, world.size)
    mark = cache_key(what)
    left = -most(-float(available_memory(world.device, place.local_ranks)), world) - fixed_bytes(
        config, network.model, world.size
    )
    known = lookup(MicroSize, mark, before) if world.rank == 0 else {}
    size, num_bytes = (world.broadcast_int(known.get(name, 0)) for name in ("size", "pass_bytes"))
    if size and num_bytes <= left:
        return {**known, "size": size}  # only rank 0 records it
    plain = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    dtype = getattr(torch, config.train.dtype)
    model = models.from_config(plain, network.num_classes, network.in_channels, World()).to(world.device, dtype)
    pass_bytes = in_passes(config, model, network.in_channels)
    fitting = [size for size in sizes if pass_bytes(size) <= left]
    if not fitting:
        least, free = pass_bytes(sizes[0]) / GIB, max(0.0, left) / GIB
        raise UsageError(
            f"batch.micro_size (auto) finds nothing that fits: a pass of {sizes[0]} takes about {least:.3g} GiB, and "
            f"gradients, optimizer and copies of weights leave a rank {free:.3g} GiB: {REMEDY}"
        )
    rates: dict[int, float] = {}
    if len(sizes) > 1:
        rehearsal = SyntheticWorkload(plain, model, network.in_channels, network.num_classes, world.device)
        rates = images_per_second(rehearsal, config, sizes[-1], fitting, world)
        if not rates:
            raise UsageError(
                f"batch.micro_size (auto) ran out of memory in a pass of {fitting[0]} "
                f"({rehearsal.refused or 'on another rank'}): {REMEDY}"
            )
    size = world.broadcast_int(max(rates, key=lambda size: rates[size], default=sizes[0]))
    found = MicroSize(size=size, images_per_second=rates, pass_bytes=pass_bytes(size), where=what)
    if world.rank == 0:
        store(mark, found)
    return as_fact(found, mark, "measurement" if rates else "there is no other")


def earlier(config: RunConfig, network: ModelShape, place: Hardware) -> int | None:
    """What was found before for such a run in such a place."""
    found = load_micro_sizes().found.get(cache_key(described(config, network, place)))
    return found and found.size


def hardware_of(world: World) -> Hardware:
    """Where this rank computes."""
    return Hardware(device_name(world.device), torch.get_num_threads(), local_size(), world.size)


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def described(config: RunConfig, network: ModelShape, place: Hardware) -> dict[str, Any]:
    """All that the answer depends on: the network, its pictures and switches, how the batch is cut, and the machine.

    A network of the user's own is known by its name and by the names and shapes of its parameters: one that changes in
    nothing else is not measured anew.
    """
    shapes = [(name, list(parameter.shape)) for name, parameter in network.model.named_parameters()]
    side, train = config.data.image_size, config.train
    return {
        "model": config.model.model_dump(mode="json"),
        "parameters": cache_key(dict(shapes)),
        "images": [network.in_channels, side, side],
        "num_classes": network.num_classes,
        "augment": list(config.data.augment),
        "sizes": candidates(config, place.num_ranks),
        **{
            name: getattr(train, name)
            for name in ("dtype", "autocast", "channels_last", "activation_checkpointing", "deterministic")
        },
        "strategy": strategy_name(config, place.num_ranks),
        **place._asdict(),
        "torch": torch.__version__,
    }


def cache_key(what: Mapping[str, Any]) -> str:
    """A short name for `what`, another for anything else."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def candidates(config: RunConfig, num_ranks: int) -> list[int]:
    """Powers of two, in groups of batch.ghost_size, up to a rank's share of the largest step; and that share.

    There is no choice where a gradient penalty's groups are micro-batches of their own, and with model.norm=sync, which
    takes the whole share at once.

    >>> candidates(RunConfig.model_validate({"batch": {"global_size": 100}}), num_ranks=3)
    [1, 2, 4, 8, 16, 32, 34]
    >>> candidates(RunConfig.model_validate({"batch": {"global_size": 300, "ghost_size": 20}}), num_ranks=2)
    [20, 40, 80, 160]
    """
    if config.algorithm.penalty_size:
        return [config.algorithm.penalty_size]
    group = config.batch.ghost_size or 1
    largest = max([config.batch.global_size, *(size for _, size in batch_size_schedule(config))])
    share = -(-largest // group // num_ranks)  # in groups, of which the last may be short
    powers = [2**power for power in range(share.bit_length()) if 2**power < share]
    return [group * share] if config.norm == "sync" else [group * size for size in (*powers, share)]


def fixed_bytes(config: RunConfig, model: nn.Module, num_ranks: int) -> int:
    """What a rank will still take for gradients, and for all that follows from them or from weights.

    Or, while sizes are measured, for a twin of the network and its gradients.
    """
    held = memory_model.weights(config, model, strategy_name(config, num_ranks), num_ranks)
    coming = held["gradients"] + held["optimizer_state"] + held["kept_weights"]
    return OTHER_BYTES + max(coming, 2 * sum(parameter.nbytes for parameter in model.parameters()))


def in_passes(config: RunConfig, model: nn.Module, in_channels: int) -> Callable[[int], int]:
    """Bytes that a pass takes at its most, by its images: what it saves grows along a line, which fake passes give."""
    group = config.batch.ghost_size or 2
    shape = (in_channels, config.data.image_size, config.data.image_size)
    one, two = (memory_model.saved_for_backward(config, model, shape, size)[0] for size in (group, 2 * group))
    return lambda size: TEMPORARY * (one + (two - one) * (size - group) // group)
