"""What can be told wrong about a run before it starts, from its config, its network and the number of ranks. Pure."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import has_batch_norm
from gengap_dist.parallel.out_of_memory import is_out_of_memory
from gengap_dist.parallel.strategies.deepspeed import check as check_zero
from gengap_dist.probes.activations import eval_context


def strategy_name(config: RunConfig, num_ranks: int) -> str:
    """The strategy that launch.strategy stands for; ddp on one rank, as an elastic run may be left with, is single.

    >>> strategy_name(RunConfig(), 1), strategy_name(RunConfig(), 8)
    ('single', 'ddp')
    """
    name = config.launch.strategy
    if name in ("auto", "ddp"):
        return "ddp" if num_ranks > 1 else "single"
    return name


def before_data(config: RunConfig, num_ranks: int, device_type: str | None) -> list[Callable[[], None]]:
    """Every check that needs neither data nor network: a run stops at the first that raises, a plan lists them all."""
    each = [partial(check, config, num_ranks) for check in (check_ranks, check_strategy, check_algorithm)]
    return [*each, partial(check_switches, config, num_ranks, device_type)]


def check_ranks(config: RunConfig, num_ranks: int) -> None:
    """Refuse more ranks than one step has samples.

    Raises:
        UsageError: if some ranks would have nothing to do in any step.
    """
    size = config.batch.global_size
    if size < num_ranks:
        raise UsageError(
            f"batch.global_size ({size}) leaves {num_ranks - size} of {num_ranks} ranks without a sample: "
            f"choose at least {num_ranks}, or fewer ranks"
        )


def check_strategy(config: RunConfig, num_ranks: int) -> None:
    """Refuse a strategy that cannot serve so many ranks, this precision or this optimizer.

    Raises:
        UsageError: for single on more ranks, and for what a ZeRO stage cannot train.
    """
    name = strategy_name(config, num_ranks)
    if name == "single" and num_ranks > 1:
        raise UsageError(
            f"launch.strategy (single) does not fit {num_ranks} ranks: start one rank, or choose launch.strategy=auto"
        )
    if name.startswith("zero"):
        check_zero(config, int(name[-1]))


ALGORITHMS = {  # what needs to see or to copy whole parameters or gradients between passes, and where it can
    "algorithm.sam_rho": ("single", "ddp", "fsdp"),
    "algorithm.gradient_penalty": ("single", "ddp"),
    "algorithm.rank_penalty": ("single", "ddp"),
    "algorithm.weight_averaging": ("single", "ddp", "zero0", "zero1", "zero2"),
    "algorithm.local_sgd": ("single", "ddp"),
}


def check_algorithm(config: RunConfig, num_ranks: int) -> None:
    """Refuse a algorithm that the strategy cannot serve.

    Raises:
        UsageError: naming the algorithm and the strategies that can.
    """
    name = strategy_name(config, num_ranks)
    for setting, able in ALGORITHMS.items():
        value = getattr(config.algorithm, setting.removeprefix("algorithm."))
        if value is not None and name not in able:
            raise UsageError(
                f"{setting} ({value}) is not for launch.strategy={name}, where a rank does not see whole weights and "
                f"gradients between passes: choose {' or '.join(able)}"
            )


SWITCHES = {  # the others keep parameters in pieces, or call the network and scale the loss themselves
    "train.autocast": ("float16", ("single", "ddp"), "bfloat16"),
    "train.channels_last": (True, ("single", "ddp"), "false"),
    "train.compile": (True, ("single", "ddp"), "false"),
}


def check_switches(config: RunConfig, num_ranks: int, device_type: str | None) -> None:
    """Refuse switches of precision and speed that the strategy, the device or the algorithm cannot serve.

    Args:
        config: the run.
        num_ranks: ranks.
        device_type: of every rank, `cpu` or `cuda`; None: not yet known.

    Raises:
        UsageError: naming the switch, what it does not go with, and what does.
    """
    name, train, algorithm = strategy_name(config, num_ranks), config.train, config.algorithm
    for setting, (refused, able, instead) in SWITCHES.items():
        if getattr(train, setting.removeprefix("train.")) == refused and name not in able:
            raise UsageError(
                f"{setting} ({str(refused).lower()}) is not for launch.strategy={name}: choose "
                f"{' or '.join(able)}, or {setting}={instead}"
            )
    if train.autocast == "float16" and device_type == "cpu":
        raise UsageError("train.autocast (float16) is for GPUs, and this run is on a CPU: choose bfloat16, or null")
    if train.tf32 and device_type == "cpu":
        raise UsageError("train.tf32 (true) is for GPUs, and this run is on a CPU: choose train.tf32=false")
    if config.data.device == "cuda" and device_type == "cpu":
        raise UsageError("data.device (cuda) is for GPUs, and this run is on a CPU: choose data.device=auto")
    if train.compile and train.activation_checkpointing:
        raise UsageError(
            "train.compile and train.activation_checkpointing both decide what is computed twice: choose one, or "
            "neither"
        )
    if train.compile and config.norm == "sync":
        raise UsageError(
            "train.compile (true) cannot look into model.norm (sync), where ranks meet in every layer: choose "
            "model.norm=ghost, or train.compile=false"
        )
    inside = [switch for switch in ("compile", "activation_checkpointing") if getattr(train, switch)]
    if algorithm.rank_penalty is not None and inside:
        raise UsageError(
            f"algorithm.rank_penalty ({algorithm.rank_penalty}) takes activations out of forward passes, which "
            f"train.{inside[0]} (true) hides or repeats: choose train.{inside[0]}=false"
        )
    if algorithm.gradient_penalty is not None and train.autocast:
        raise UsageError(
            f"algorithm.gradient_penalty ({algorithm.gradient_penalty}) takes small differences of gradients, which "
            f"train.autocast ({train.autocast}) rounds away: choose train.autocast=null"
        )
    if algorithm.rank_penalty is not None and train.autocast == "float16":
        raise UsageError(
            f"algorithm.rank_penalty ({algorithm.rank_penalty}) works with numbers too small for train.autocast "
            "(float16): choose bfloat16, or null"
        )


def norm_size(config: RunConfig, model: nn.Module, sizes: Iterable[int], num_ranks: int) -> list[int] | None:
    """Sizes of batch norm's groups of samples in steps of `sizes`; None for a network without batch norm."""
    if not has_batch_norm(model):
        return None
    return sorted(set().union(*(_norm_sizes(config, size, num_ranks) for size in sizes)))


def _norm_sizes(config: RunConfig, size: int, num_ranks: int) -> set[int]:
    """Sizes of batch norm's groups in a step of `size`, and in the one that algorithm.local_sgd makes of it."""
    batch, algorithm = config.batch, config.algorithm
    if config.norm == "sync":
        return {size}
    cuts = [(size, num_ranks)]
    if algorithm.local_sgd == "post_local_sgd":
        cuts.append((size, algorithm.workers))
    elif algorithm.local_sgd == "swap":  # a worker's epoch ends with the same images modulo its own batch
        own = batch.global_size // algorithm.workers
        cuts.append((size % own or own, 1))
    group = batch.ghost_size or algorithm.penalty_size  # a penalty's groups are micro-batches of their own
    return set().union(*(BatchPlan(*cut, batch.max_micro_size, group).norm_sizes() for cut in cuts))


def check_auto(config: RunConfig, model: nn.Module) -> None:
    """Refuse to choose micro-batches by speed where they decide what is learned.

    Raises:
        UsageError: for batch.micro_size=auto with batch norm over micro-batches.
    """
    if config.batch.micro_size == "auto" and config.norm == "local" and has_batch_norm(model):
        raise UsageError(
            "batch.micro_size (auto) is chosen by speed, and model.norm (local) takes its statistics over "
            "micro-batches: the result would depend on the machine; choose a number, or model.norm=ghost with "
            "batch.ghost_size, or group"
        )


def check_norm(config: RunConfig, model: nn.Module, sizes: Iterable[int], num_ranks: int) -> None:
    """Refuse batch norm over one sample, and over a global batch that no rank has its part of at once.

    Args:
        config: the run.
        model: its network.
        sizes: of all steps, the ragged ones included.
        num_ranks: ranks.

    Raises:
        UsageError: naming the step, the ranks and what to change.
    """
    batch = config.batch
    if not has_batch_norm(model):
        return
    for size in sorted(sizes, reverse=True):
        share = -(-size // num_ranks)
        if config.norm == "sync" and share > batch.max_micro_size:
            raise UsageError(
                f"batch.micro_size ({batch.micro_size}) cuts the {share} samples that a rank has of a step of {size}, "
                f"and model.norm (sync) takes its statistics over the whole step: choose at least {share}, more ranks, "
                "or model.norm=ghost"
            )
        if 1 in _norm_sizes(config, size, num_ranks):
            workers = f", {config.algorithm.workers} algorithm.workers," if config.algorithm.local_sgd else ""
            raise UsageError(
                f"batch.global_size ({batch.global_size}) on {num_ranks} rank(s){workers} leaves batch norm a group "
                f"of one sample in a step of {size}: choose another global_size, a larger micro_size or fewer "
                f"{'workers' if workers else 'ranks'}"
            )


def check_logits(config: RunConfig, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Run the network on a few images [n, C, H, W]; it must put out [n, num_classes].

    Raises:
        UsageError: if it cannot take them, or puts out something else.
    """
    with eval_context(model):
        try:
            logits = model(images)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"model.name ({config.model.name}) cannot take images of {list(images.shape[1:])} "
                f"({str(error).splitlines()[0]}): change the model, or data.image_size"
            ) from None
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != [len(images), num_classes]:
        raise UsageError(
            f"model.name ({config.model.name}) puts out {shape} for {len(images)} images, "
            f"needs {[len(images), num_classes]}: its last layer must have one unit for each of the classes"
        )
