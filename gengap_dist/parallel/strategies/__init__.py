"""How gradients become one update."""

from collections.abc import Callable
from functools import partial

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.parallel.strategies.base import OptimizerState, Strategy
from gengap_dist.parallel.strategies.ddp import DDP
from gengap_dist.parallel.strategies.deepspeed import DeepSpeedZero
from gengap_dist.parallel.strategies.fsdp import FSDP
from gengap_dist.parallel.strategies.single import Single

STRATEGIES: dict[str, Callable[[RunConfig, World], Strategy]] = {
    "single": Single,
    "ddp": DDP,
    **{f"zero{stage}": partial(DeepSpeedZero, stage=stage) for stage in range(4)},
    "fsdp": FSDP,
}

__all__ = ["DDP", "FSDP", "STRATEGIES", "OptimizerState", "Single", "Strategy", "DeepSpeedZero"]
