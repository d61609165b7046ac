"""What each strategy shards, sends and supports: the only place that says it. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from gengap_dist.config.measures import Optimizer, Strategy

Algorithm = Literal["sam_rho", "gradient_penalty", "rank_penalty", "weight_averaging", "local_sgd"]
"""Settings of `algorithm` that need unsharded weights or gradients between passes, or another loop."""
Switch = Literal["float16", "channels_last", "compile"]
"""Settings of `train` that change the network or scale the loss before the strategy takes them."""


class Sharding(NamedTuple):
    """What a strategy shards over ranks instead of replicating it (Rajbhandari et al. 2020, ZeRO)."""

    state: bool = False
    gradients: bool = False
    parameters: bool = False
    master_weights: bool = False
    """Whether the engine keeps float32 copies of its shard of the parameters, even of float32 ones (DeepSpeed does)."""


@dataclass(frozen=True)
class Capabilities:
    """What one strategy can do."""

    sharding: Sharding = Sharding()
    algorithms: tuple[Algorithm, ...] = ()
    """Algorithms that it supports."""
    switches: tuple[Switch, ...] = ()
    """Switches that it supports."""
    dtypes: tuple[str, ...] = ("float32", "float64")
    """Values of train.dtype that it supports."""
    optimizers: tuple[Optimizer, ...] = get_args(Optimizer)
    """Values of optim.name that it supports."""
    own_optimizer: bool = True
    """Whether it supports a user's own optimizer, which may need whole parameters."""
    traffic: Literal["none", "all-reduce", "all-reduce and all-gather", "all-gather and reduce-scatter"] = "all-reduce"
    """What a step sends: nothing; gradients; also updated parameters; or parameters for each pass, and gradients."""
    sends_every_micro_batch: bool = False
    """Whether gradients are sent after every micro-batch, not only after the last. All ranks must then do equally many
    micro-steps, with empty ones if needed; see `BatchPlan.micro_batches`."""
    shard_groups: bool = False
    """Whether launch.shard_size ranks may shard one copy, instead of all ranks."""
    scalar_parameters: bool = False
    """Whether it supports parameters without dimensions."""
    single_rank: bool = False
    """Whether it is for one rank only."""
    needs_warmup_backward: bool = False
    """Whether the first backward pass changes the order in which gradients are summed. A run then starts with one
    without effect, so that a resumed run sums in the same order as an uninterrupted one."""
    has_untimed_collectives: bool = False
    """Whether the engine's passes contain collectives that the phase timer does not time."""
    package: str = ""
    """Package that it needs beside torch."""


_UNSHARDED = Capabilities(algorithms=get_args(Algorithm), switches=get_args(Switch), scalar_parameters=True)
_ZERO = Capabilities(
    algorithms=("weight_averaging",),
    dtypes=("float32",),  # the type of the weights that the engine keeps
    has_untimed_collectives=True,
    package="deepspeed",
)
_SHARDED_ZERO = replace(
    _ZERO,
    optimizers=("sgd", "adamw"),  # a rank sees shards of many layers as one vector, and no norm or matrix of a layer
    own_optimizer=False,
    traffic="all-reduce and all-gather",
)
CAPABILITIES: dict[Strategy, Capabilities] = {
    "single": replace(_UNSHARDED, traffic="none", single_rank=True),
    "ddp": replace(_UNSHARDED, needs_warmup_backward=True),  # it rebuilds its buckets after the first pass
    "zero0": _ZERO,
    "zero1": replace(_SHARDED_ZERO, sharding=Sharding(state=True, master_weights=True)),
    "zero2": replace(
        _SHARDED_ZERO,
        sharding=Sharding(state=True, gradients=True, master_weights=True),
        sends_every_micro_batch=True,
    ),
    "zero3": replace(
        _SHARDED_ZERO,
        sharding=Sharding(state=True, gradients=True, parameters=True, master_weights=True),
        algorithms=(),
        traffic="all-gather and reduce-scatter",
        sends_every_micro_batch=True,
    ),
    "fsdp": Capabilities(
        sharding=Sharding(state=True, gradients=True, parameters=True),
        algorithms=("sam_rho",),
        own_optimizer=False,
        traffic="all-gather and reduce-scatter",
        sends_every_micro_batch=True,
        shard_groups=True,
        has_untimed_collectives=True,
    ),
}


def strategies_with(holds: Callable[[Capabilities], bool], num_ranks: int) -> str:
    """The names of the strategies for `num_ranks` ranks that satisfy a condition, as words for a sentence.

    >>> strategies_with(lambda each: not each.package, 1), strategies_with(lambda each: "compile" in each.switches, 2)
    ('single, ddp or fsdp', 'ddp')
    """
    possible = {name: each for name, each in CAPABILITIES.items() if num_ranks == 1 or not each.single_rank}
    *first, last = [name for name, each in possible.items() if holds(each)]
    return f"{', '.join(first)} or {last}" if first else last
