"""gengap_dist beside its peers and beside the limit: the same work, in turns, on the same ranks.

    python benchmarks/peers.py --data DIR [--only lenet5_512 mlp_4096] [--ranks 1 2] [--rounds 15]

Every round gives each candidate a turn of as many steps as the limit takes --seconds for; ratios are taken within a
round, and one that the machine's noise covers is not printed. Ours and theirs have ranks of their own, because a run of
ours tells malloc to keep freed memory for its whole process. Before turns the loaders' processes come to rest, and the
first steps of a turn do not count: they use up what a loader has read ahead in the others' time, and take up memory
that was given back after the turn before. Peak memory is that of a rank's own process (not of its loader's), each
candidate alone on fresh ranks.

Figures go to docs/benchmarks/peers.json, workload by workload, and from there into docs/benchmarks.md with a picture.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import page
import paired_timing
import psutil
import torch
from baselines import WORKLOADS, Field, Turn, Workload, candidates, come_to_rest
from rich.console import Console
from worker_pool import WorkerPool

from gengap_dist.data import datasets
from gengap_dist.distributed.launchers.local import threads_per_rank
from gengap_dist.distributed.process_group import World

MEMORY_OF = ("lenet5_8192", "mlp_4096", "resnet56_1024")
MEMORY_STEPS = 3
WARM_STEPS = 3


# -- what ranks do ----------------------------------------------------------------------------------------------------

TURNS: dict[str, Turn] = {}  # by candidate, in this rank


@cache
def pictures(name: str, data: Path) -> datasets.Splits:
    """Of a workload; loaded once."""
    return datasets.load(WORKLOADS[name].settings(data).data)


def set_up(world: World, name: str, data: Path, who: str) -> float:
    """Let a candidate take its first step; MiB of the training pictures."""
    if world.rank:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for as long as it lives
    workload, splits = WORKLOADS[name], pictures(name, data)
    given, work = Field(workload, splits, world, data), candidates(workload)[who].work
    TURNS[who] = Turn(lambda turn: work(given, turn))
    TURNS[who].steps(1)
    give_back()
    return splits.train.pixels.nbytes / 2**20 if isinstance(splits.train.pixels, torch.Tensor) else 0.0


def take_turn(world: World, who: str, num_steps: int, untimed: int = 0) -> float:
    """Seconds of `num_steps`, after some that do not count and when the loaders are at rest."""
    come_to_rest()
    if untimed:
        TURNS[who].steps(untimed)
    world.barrier()
    began = time.perf_counter()
    TURNS[who].steps(num_steps)
    world.barrier()
    took = time.perf_counter() - began
    give_back()
    return took


def give_back() -> None:
    """Free memory, to the system: all candidates' together would be more than there is."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_mib(world: World) -> float:
    """The most that any rank has held until now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peaks = torch.zeros(world.size)
    peaks[world.rank] = int(line.split()[1]) / 1024
    return float(world.all_reduce(peaks).max())


def end_loaders(world: World) -> None:
    """Loaders' processes would outlive the ranks."""
    for loader in psutil.Process().children():
        loader.kill()


# -- the rounds -------------------------------------------------------------------------------------------------------


def speeds(name: str, num_ranks: int, options: argparse.Namespace, kinds: dict[str, str]) -> tuple[Any, float]:
    """Images per second of every candidate in every round, and MiB of the training pictures."""
    workload, threads = WORKLOADS[name], threads_per_rank(num_ranks)
    ours, theirs = WorkerPool(num_ranks, "cpu", threads), WorkerPool(num_ranks, "cpu", threads)
    pools = {who: ours if kind == "ours" else theirs for who, kind in kinds.items()}
    data_mib = 0.0
    for who, pool in pools.items():
        print(f"  {who}", file=sys.stderr, flush=True)
        data_mib = pool(set_up, name, options.data, who)
    each = theirs(take_turn, "limit", WARM_STEPS) / WARM_STEPS
    num_steps = max(1, round(options.seconds / each))
    for who, pool in pools.items():
        pool(take_turn, who, min(WARM_STEPS, num_steps))

    def speed(who: str) -> float:
        return num_steps * workload.global_size / pools[who](take_turn, who, num_steps, workload.untimed)

    found = paired_timing.in_turns({who: partial(speed, who) for who in pools}, options.rounds or workload.rounds)
    for pool in (ours, theirs):
        pool(end_loaders)
        pool.leave()
    return found, data_mib


def memory(name: str, num_ranks: int, options: argparse.Namespace, who: str) -> tuple[float, float]:
    """Peak MiB of a rank of its own, after some steps, and MiB of the training pictures."""
    pool = WorkerPool(num_ranks, "cpu", threads_per_rank(num_ranks))
    data_mib = pool(set_up, name, options.data, who)
    pool(take_turn, who, MEMORY_STEPS)
    peak = pool(peak_mib)
    pool(end_loaders)
    pool.leave()
    return peak, data_mib


def about(workload: Workload) -> dict[str, Any]:
    """What stands beside the figures, those who are not installed among it."""
    everybody = candidates(workload)
    return {
        "title": workload.title,
        "machine": paired_timing.machine(),
        "kinds": {who: one.kind for who, one in everybody.items()},
        "missing": {who: one.package for who, one in everybody.items() if not one.installed},
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds FashionMNIST, MNIST, cifar10-jpeg")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="some workloads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: 15, and less of slow workloads")
    parser.add_argument("--seconds", type=float, default=0.4, help="that the limit takes for a turn")
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="images per second")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, too")
    parser.add_argument("--out", type=Path, default=page.DOCS, help="folder of benchmarks.md")
    options = parser.parse_args()
    console = Console(stderr=True)
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # ranks end by os._exit
    for name in options.only:
        found = about(WORKLOADS[name])
        for who, package in found["missing"].items():
            console.print(f"{who} is not installed and does not take part: pip install {package}")
        playing = {who: kind for who, kind in found["kinds"].items() if who not in found["missing"]}
        before = page.read(options.out, "peers").get(name, {})  # of other numbers of ranks, and memory
        if before.get("machine") == found["machine"]:
            found = before | found
        found.setdefault("images_per_second", {})
        for num_ranks in options.ranks if options.speed else ():
            console.print(f"{WORKLOADS[name].title}, {num_ranks} rank(s)")
            by_turn, found["data_mib"] = speeds(name, num_ranks, options, playing)
            for who, values in by_turn.items():
                console.print(f"  {statistics.median(values):>10,.0f} images/s  {who}", highlight=False)
            found["images_per_second"][str(num_ranks)] = by_turn
        if options.memory and name in MEMORY_OF:
            console.print(f"{WORKLOADS[name].title}, memory")
            peaks = {who: memory(name, max(options.ranks), options, who) for who in playing}
            found["peak_mib"] = {who: peak for who, (peak, _) in peaks.items()}
            found["data_mib"] = max(size for _, size in peaks.values())
        page.keep(options.out, "peers", {name: found})
        page.write(options.out)
    console.print(f"written: {options.out / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
