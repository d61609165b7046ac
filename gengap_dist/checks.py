"""What can be told wrong about a run before it starts, from its config, its network and the number of ranks. Pure."""

from torch import Tensor, nn

from gengap_dist.batching import BatchPlan
from gengap_dist.config import RunConfig, UsageError
from gengap_dist.models.norm import GhostBatchNorm1d, has_batch_norm
from gengap_dist.probes.capture import observing
from gengap_dist.strategies.deepspeed import check as check_zero


def strategy_name(config: RunConfig, num_ranks: int) -> str:
    """The strategy that launch.strategy stands for; ddp on one rank, as an elastic run may be left with, is single.

    >>> strategy_name(RunConfig(), 1), strategy_name(RunConfig(), 8)
    ('single', 'ddp')
    """
    name = config.launch.strategy
    if name in ("auto", "ddp"):
        return "ddp" if num_ranks > 1 else "single"
    return name


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


def check_norm(config: RunConfig, model: nn.Module, num_train: int, num_ranks: int) -> None:
    """Refuse batch norm over one sample, and ghost groups for a network that has no use for them.

    Raises:
        UsageError: if a group of batch norm holds one sample in a whole or a ragged step.
    """
    batch = config.batch
    if batch.ghost_size and not any(isinstance(m, GhostBatchNorm1d) for m in model.modules()):
        raise UsageError(
            f"batch.ghost_size ({batch.ghost_size}) has no effect on {config.model.name}, which has no ghost "
            "batch norm: set batch.ghost_size=null, or choose model.name=mlp"
        )
    if not has_batch_norm(model):
        return
    for size in filter(None, (batch.global_size, num_train % batch.global_size)):
        if 1 in BatchPlan(size, num_ranks, batch.micro_size, batch.ghost_size).norm_sizes():
            raise UsageError(
                f"batch.global_size ({batch.global_size}) on {num_ranks} rank(s) leaves batch norm a group "
                f"of one sample in a step of {size}: choose another global_size, a larger micro_size or fewer ranks"
            )


def check_logits(config: RunConfig, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Run the network on a few images [n, C, H, W]; it must put out [n, num_classes].

    Raises:
        UsageError: if it cannot take them, or puts out something else.
    """
    with observing(model):
        try:
            logits = model(images)
        except RuntimeError as error:
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
