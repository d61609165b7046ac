"""Compares the step time of two checkouts of this project, in turns on one machine.

    git worktree add ../before COMMIT
    python benchmarks/before_after.py --data DIR --before ../before [--only lenet5_512 resnet56_128] [--ranks 2]

Workloads and turns are those of peers.py, for the candidates of this package: each checkout has its own ranks, which
import its modules. The result is the ratio of step times, after over before, round by round; below 1 is faster.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import paired_timing
import peers
from baselines import AUTO, PLAIN, WORKLOADS
from rich.console import Console
from world_pool import WorldPool

HERE = Path(__file__).parent


def ranks_of(checkout: Path, num_ranks: int) -> WorldPool:
    """Ranks that import their modules from a checkout: multiprocessing's children inherit sys.path."""
    before = sys.path[:]
    sys.path[:0] = [str(checkout / "benchmarks"), str(checkout)]
    try:
        return WorldPool(num_ranks, "cpu")
    finally:
        sys.path[:] = before


def seconds(
    pools: dict[str, WorldPool], name: str, candidate: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per step of a candidate, round by round, by checkout."""
    workload = WORKLOADS[name]
    for pool in pools.values():
        pool(peers.set_up, name, options.data, candidate)
        pool(peers.take_turn, candidate, peers.WARM_STEPS)
    each = pools["before"](peers.take_turn, candidate, peers.WARM_STEPS) / peers.WARM_STEPS
    num_steps = max(1, round(options.seconds / each))

    def turn(when: str) -> float:
        return pools[when](peers.take_turn, candidate, num_steps, workload.untimed) / num_steps

    return paired_timing.in_turns({when: partial(turn, when) for when in pools}, options.rounds)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST, MNIST, cifar10-jpeg")
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=["lenet5_512", "resnet56_128"])
    parser.add_argument("--who", nargs="+", default=[PLAIN, AUTO], help="our candidates")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of a turn")
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # ranks end by os._exit
    console = Console(highlight=False)
    console.print(
        f"{paired_timing.machine_summary(paired_timing.machine())}; {options.ranks} rank(s), "
        f"{options.rounds} rounds in turns"
    )
    for name in options.only:
        checkouts = {"before": options.before.resolve(), "after": HERE.parent}
        pools = {when: ranks_of(checkout, options.ranks) for when, checkout in checkouts.items()}
        for who in options.who:
            by_checkout = seconds(pools, name, who, options)
            medians: Any = {when: f"{1000 * statistics.median(values):.2f} ms" for when, values in by_checkout.items()}
            ratio = paired_timing.ratio(by_checkout["after"], by_checkout["before"])
            console.print(f"{WORKLOADS[name].title}, {who}: {medians['before']} -> {medians['after']}, ratio {ratio}")
        for pool in pools.values():
            pool(peers.end_loaders)
            pool.close()


if __name__ == "__main__":
    main()
