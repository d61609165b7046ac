"""Checks of a run before it starts, from its config, its network and the number of ranks. Pure functions."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

from torch import Tensor, nn

from gengap_dist.config.measures import Strategy
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import has_batch_norm
from gengap_dist.parallel.capabilities import CAPABILITIES, Algorithm, Switch, strategies_with
from gengap_dist.parallel.out_of_memory import is_out_of_memory
from gengap_dist.probes.activations import eval_context
from gengap_dist.training.tasks import Task


def strategy_name(config: RunConfig, num_ranks: int) -> Strategy:
    """The name of the strategy that launch.strategy selects; auto and ddp on one rank are single.

    >>> strategy_name(RunConfig(), 1), strategy_name(RunConfig(), 8)
    ('single', 'ddp')
    """
    name = config.launch.strategy
    if name in ("auto", "ddp"):
        return "ddp" if num_ranks > 1 else "single"
    return name


def startup_checks(config: RunConfig, num_ranks: int, device_type: str | None) -> list[Callable[[], None]]:
    """All checks that need neither data nor network: a run stops at the first that raises, a plan lists all errors."""
    checks = [partial(check, config, num_ranks) for check in (check_ranks, check_strategy, check_algorithm)]
    return [*checks, partial(check_switches, config, num_ranks, device_type)]


def check_ranks(config: RunConfig, num_ranks: int) -> None:
    """Refuse more ranks than samples in one step.

    Raises:
        UsageError: if some ranks would have no samples in every step.
    """
    size = config.batch.global_size
    if size < num_ranks:
        raise UsageError(
            f"batch.global_size ({size}) leaves {num_ranks - size} of {num_ranks} ranks without a sample: "
            f"choose at least {num_ranks}, or start fewer ranks"
        )


def check_strategy(config: RunConfig, num_ranks: int) -> None:
    """Refuse a strategy that does not support the number of ranks, launch.shard_size, the precision or the optimizer.

    Raises:
        UsageError: names the setting and the strategies that support it.
    """
    name = strategy_name(config, num_ranks)
    capabilities, dtype, optimizer = CAPABILITIES[name], config.train.dtype, config.optim.name
    if capabilities.single_rank and num_ranks > 1:
        raise UsageError(
            f"launch.strategy ({name}) does not support {num_ranks} ranks: start one rank, or choose "
            "launch.strategy=auto"
        )
    shard_size = config.launch.shard_size
    if shard_size and not capabilities.shard_groups:
        raise UsageError(
            f"launch.shard_size ({shard_size}) is not supported by launch.strategy={name}: choose "
            f"{strategies_with(lambda each: each.shard_groups, num_ranks)}, or launch.shard_size=null"
        )
    if shard_size and num_ranks % shard_size:
        raise UsageError(
            f"launch.shard_size ({shard_size}) does not divide the number of ranks ({num_ranks}): choose a divisor of "
            "it, or launch.shard_size=null"
        )
    if dtype not in capabilities.dtypes:
        raise UsageError(
            f"train.dtype ({dtype}) is not supported by launch.strategy={name}, which keeps "
            f"{' or '.join(capabilities.dtypes)} weights: choose train.dtype={capabilities.dtypes[0]}, or "
            f"launch.strategy={strategies_with(lambda each: dtype in each.dtypes, num_ranks)}"
        )
    if config.optim.is_own and not capabilities.own_optimizer:
        raise UsageError(
            f"optim.name ({optimizer}) is not supported by launch.strategy={name}, where a rank has shards, and an "
            "optimizer of your own may need whole parameters: choose "
            f"{strategies_with(lambda each: each.own_optimizer, num_ranks)}"
        )
    if not config.optim.is_own and optimizer not in capabilities.optimizers:
        raise UsageError(
            f"optim.name ({optimizer}) is not supported by launch.strategy={name}, where a rank sees shards of many "
            f"layers as one vector and cannot compute what it needs of a whole layer: choose "
            f"{strategies_with(lambda each: optimizer in each.optimizers, num_ranks)}"
        )


def check_algorithm(config: RunConfig, num_ranks: int) -> None:
    """Refuse an algorithm that the strategy does not support.

    Raises:
        UsageError: names the setting and the strategies that support it.
    """
    name = strategy_name(config, num_ranks)
    for algorithm in get_args(Algorithm):
        value = getattr(config.algorithm, algorithm)
        if value is not None and algorithm not in CAPABILITIES[name].algorithms:
            raise UsageError(
                f"algorithm.{algorithm} ({value}) is not supported by launch.strategy={name}, where a rank has no "
                "unsharded weights and gradients between passes: choose "
                f"{strategies_with(lambda each, algorithm=algorithm: algorithm in each.algorithms, num_ranks)}"
            )


SWITCHES: dict[Switch, tuple[str, object, str]] = {  # setting, its value, the alternative
    "float16": ("autocast", "float16", "bfloat16"),
    "channels_last": ("channels_last", True, "false"),
    "compile": ("compile", True, "false"),
}


def check_switches(config: RunConfig, num_ranks: int, device_type: str | None) -> None:
    """Refuse settings of precision and speed that the strategy, the device or the algorithm does not support.

    Args:
        config: the run.
        num_ranks: number of ranks.
        device_type: `cpu` or `cuda`, the same on every rank; None: not yet known.

    Raises:
        UsageError: names the setting, what it conflicts with, and an alternative.
    """
    name, train, algorithm = strategy_name(config, num_ranks), config.train, config.algorithm
    for switch, (setting, refused, alternative) in SWITCHES.items():
        if getattr(train, setting) == refused and switch not in CAPABILITIES[name].switches:
            raise UsageError(
                f"train.{setting} ({str(refused).lower()}) is not supported by launch.strategy={name}: choose "
                f"{strategies_with(lambda each, switch=switch: switch in each.switches, num_ranks)}, or "
                f"train.{setting}={alternative}"
            )
    if train.autocast == "float16" and device_type == "cpu":
        raise UsageError("train.autocast (float16) needs a GPU, and this run is on a CPU: choose bfloat16, or null")
    if train.tf32 and device_type == "cpu":
        raise UsageError("train.tf32 (true) needs a GPU, and this run is on a CPU: choose train.tf32=false")
    if config.data.device == "cuda" and device_type == "cpu":
        raise UsageError("data.device (cuda) needs a GPU, and this run is on a CPU: choose data.device=auto")
    if train.compile and train.activation_checkpointing:
        raise UsageError(
            "train.compile and train.activation_checkpointing cannot be used together: choose one, or neither"
        )
    if train.compile and config.norm == "sync":
        raise UsageError(
            "train.compile (true) does not support model.norm (sync), which communicates in every layer: choose "
            "model.norm=ghost, or train.compile=false"
        )
    conflicting = [switch for switch in ("compile", "activation_checkpointing") if getattr(train, switch)]
    if algorithm.rank_penalty is not None and conflicting:
        raise UsageError(
            f"algorithm.rank_penalty ({algorithm.rank_penalty}) reads activations in forward hooks, which "
            f"train.{conflicting[0]} (true) skips or repeats: choose train.{conflicting[0]}=false"
        )
    if algorithm.gradient_penalty is not None and train.autocast:
        raise UsageError(
            f"algorithm.gradient_penalty ({algorithm.gradient_penalty}) computes small differences of gradients, which "
            f"train.autocast ({train.autocast}) loses in rounding: choose train.autocast=null"
        )
    if algorithm.rank_penalty is not None and train.autocast == "float16":
        raise UsageError(
            f"algorithm.rank_penalty ({algorithm.rank_penalty}) computes values too small for train.autocast "
            "(float16): choose bfloat16, or null"
        )


def norm_group_sizes(config: RunConfig, model: nn.Module, sizes: Iterable[int], num_ranks: int) -> list[int] | None:
    """Sizes of batch norm's sample groups in steps of `sizes`, ascending; None without batch norm."""
    if not has_batch_norm(model):
        return None
    return sorted(set().union(*(_norm_group_sizes_of_step(config, size, num_ranks) for size in sizes)))


def _norm_group_sizes_of_step(config: RunConfig, size: int, num_ranks: int) -> set[int]:
    """Sizes of the sample groups of batch norm in a step of `size`, also with the workers of algorithm.local_sgd."""
    batch, algorithm = config.batch, config.algorithm
    if config.norm == "sync":
        return {size}
    splits = [(size, num_ranks)]
    if algorithm.local_sgd == "post_local_sgd":
        splits.append((size, algorithm.workers))
    elif algorithm.local_sgd == "swap":  # the last batch of a worker's epoch has this remainder
        worker_size = batch.global_size // algorithm.workers
        splits.append((size % worker_size or worker_size, 1))
    group = batch.ghost_size or algorithm.penalty_size  # each group of a penalty is one micro-batch
    return set().union(*(BatchPlan(*split, batch.max_micro_size, group).norm_sizes() for split in splits))


def check_parameters(config: RunConfig, model: nn.Module, num_ranks: int) -> None:
    """Refuse parameters without dimensions if the strategy does not support them.

    Raises:
        UsageError: names the parameter and the strategies that support it.
    """
    strategy = strategy_name(config, num_ranks)
    for name, parameter in model.named_parameters():
        if not parameter.ndim and not CAPABILITIES[strategy].scalar_parameters:
            raise UsageError(
                f"launch.strategy ({strategy}) does not support parameter {name}, which has no dimension: give it the "
                f"shape [1], or choose {strategies_with(lambda each: each.scalar_parameters, num_ranks)}"
            )


def check_auto_micro_size(config: RunConfig, model: nn.Module) -> None:
    """Refuse to choose the micro-batch size by speed if it changes the result.

    Raises:
        UsageError: for batch.micro_size=auto with batch norm over micro-batches.
    """
    if config.batch.micro_size == "auto" and config.norm == "local" and has_batch_norm(model):
        raise UsageError(
            "batch.micro_size (auto) is chosen by speed, and model.norm (local) computes statistics over "
            "micro-batches: the result would depend on the machine; choose a number, or model.norm=ghost with "
            "batch.ghost_size, or group"
        )


def check_norm(config: RunConfig, model: nn.Module, sizes: Iterable[int], num_ranks: int) -> None:
    """Refuse batch norm over one sample, and sync batch norm if a rank needs several micro-batches.

    Args:
        config: the run.
        model: its network.
        sizes: global batch sizes of all steps, including incomplete ones.
        num_ranks: number of ranks.

    Raises:
        UsageError: names the step size, the ranks and the setting to change.
    """
    batch = config.batch
    if not has_batch_norm(model):
        return
    for size in sorted(sizes, reverse=True):
        share = -(-size // num_ranks)
        if config.norm == "sync" and share > batch.max_micro_size:
            raise UsageError(
                f"batch.micro_size ({batch.micro_size}) splits the {share} samples of a rank in a step of {size}, "
                f"and model.norm (sync) computes statistics over the whole step: choose at least {share}, more ranks, "
                "or model.norm=ghost"
            )
        if 1 in _norm_group_sizes_of_step(config, size, num_ranks):
            workers = f", {config.algorithm.workers} algorithm.workers," if config.algorithm.local_sgd else ""
            raise UsageError(
                f"batch.global_size ({batch.global_size}) on {num_ranks} rank(s){workers} leaves batch norm a group "
                f"of one sample in a step of {size}: choose another global_size, a larger micro_size or fewer "
                f"{'workers' if workers else 'ranks'}"
            )


def check_network(config: RunConfig, model: nn.Module, inputs: Tensor, targets: Tensor, task: Task) -> None:
    """Run the network on a few inputs, and check its outputs and the sums that the task makes of them.

    Raises:
        UsageError: if it fails on the inputs, has outputs of another shape, the sums are not sums, or it predicts
            tokens that it sees.
    """
    with eval_context(model):
        try:
            outputs = model(inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"model.name ({config.model.name}) does not accept inputs of shape {list(inputs.shape[1:])} "
                f"({str(error).splitlines()[0]}): change the model, or data.image_size"
            ) from None
        needed = [len(inputs), *task.spec.output_shape]
        shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if shape != needed:
            last = "must have one unit for each of the classes" if task.spec.num_classes else "must have this shape"
            raise UsageError(
                f"model.name ({config.model.name}) outputs {shape} for {len(inputs)} inputs, needs {needed}: its last "
                f"layer {last}"
            )
        task.check(outputs, targets)
        if task.spec.token and config.task.name == "language_modeling" and inputs.shape[1] > 1:
            others = (inputs + 1) % outputs.shape[-1]
            others[:, 0] = inputs[:, 0]
            first = outputs[:, 0]
            if (model(others)[:, 0] - first).abs().max() > 1e-4 * first.abs().max():  # more than rounding
                raise UsageError(
                    f"model.name ({config.model.name}) sees the tokens after a position, which it is to predict: "
                    "choose a causal network"
                )
