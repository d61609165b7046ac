"""How gradients become one update."""

from gengap_dist.strategies.base import Strategy
from gengap_dist.strategies.ddp import DDP
from gengap_dist.strategies.single import Single

STRATEGIES: dict[str, type[Strategy]] = {"single": Single, "ddp": DDP}

__all__ = ["DDP", "STRATEGIES", "Single", "Strategy"]
