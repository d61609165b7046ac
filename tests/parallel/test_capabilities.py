"""What strategies can do: one table, from which the checks, the plan and the documentation follow."""

from typing import get_args

import pytest

from gengap_dist.config.measures import Optimizer
from gengap_dist.errors import UsageError
from gengap_dist.parallel.capabilities import CAPABILITIES, Algorithm, Switch
from gengap_dist.training.checks import SWITCHES, startup_checks
from tests.conftest import ROOT, config

VALUES = {
    "sam_rho": 0.1, "gradient_penalty": 0.1, "rank_penalty": 0.1, "weight_averaging": "ema", "local_sgd": "swap",
}  # fmt: skip


def table() -> str:
    """The table of docs/recipes.md."""
    rows = {f"`algorithm.{name}`": lambda each, name=name: name in each.algorithms for name in get_args(Algorithm)}
    rows |= {
        f"`train.{setting}={str(value).lower()}`": lambda each, name=name: name in each.switches
        for name, (setting, value, _) in SWITCHES.items()
    }
    rows |= {f"`train.dtype={name}`": lambda each, name=name: name in each.dtypes for name in ("float32", "float64")}
    rows |= {f"`optim.name={name}`": lambda each, name=name: name in each.optimizers for name in get_args(Optimizer)}
    rows |= {"`optim.name=module:factory`": lambda each: each.own_optimizer}
    rows |= {"`launch.shard_size`": lambda each: each.shard_groups}
    lines = ["| | " + " | ".join(CAPABILITIES) + " |", "|---" * (len(CAPABILITIES) + 1) + "|"]
    for name, holds in rows.items():
        lines.append(
            "| ".join([f"| {name} ", *("yes " if holds(each) else "no " for each in CAPABILITIES.values())]) + "|"
        )
    return "\n".join(lines)


def test_the_documentation_has_this_table():
    assert table() in (ROOT / "docs" / "recipes.md").read_text(), f"docs/recipes.md should hold\n{table()}"


def refused(strategy: str, **settings: object) -> str:
    """The message of the checks before a run on one rank; empty if they pass."""
    run = config(launch__strategy=strategy, **settings)
    try:
        for check in startup_checks(run, 1, "cuda"):
            check()
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", [name for name in CAPABILITIES if name != "ddp"])  # on one rank, that is single
def test_what_a_strategy_does_not_support_is_refused_with_those_that_do(strategy):
    capabilities = CAPABILITIES[strategy]
    for algorithm in get_args(Algorithm):
        more = {"algorithm__penalty_size": 8} if algorithm == "gradient_penalty" else {}
        message = refused(strategy, **{f"algorithm__{algorithm}": VALUES[algorithm]}, **more)
        assert bool(message) == (algorithm not in capabilities.algorithms), message
        for name, other in CAPABILITIES.items() if message else ():
            assert (name in message.partition("choose ")[2]) == (algorithm in other.algorithms), message
    for switch in get_args(Switch):
        setting, value, _ = SWITCHES[switch]
        assert bool(refused(strategy, **{f"train__{setting}": value})) == (switch not in capabilities.switches)
    for dtype in ("float32", "float64"):
        assert bool(refused(strategy, train__dtype=dtype)) == (dtype not in capabilities.dtypes)
    assert bool(refused(strategy, launch__shard_size=1)) == (not capabilities.shard_groups)
    for optimizer in get_args(Optimizer):
        assert bool(refused(strategy, optim__name=optimizer)) == (optimizer not in capabilities.optimizers)
    assert ("may need whole" in refused(strategy, optim__name="own:optimizer")) == (not capabilities.own_optimizer)
