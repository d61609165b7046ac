"""Measures start-up time: seconds of --help, of a 50-step run, and of nine runs as nine commands and as one study.

    python benchmarks/startup.py [--rounds 6] [--ranks 1] [--out FILE]

The commands are run with their defaults (digits, LeNet-5, reports, MLflow); all except --help take turns. Nine commands
and a study of 3 arms x 3 seeds compute the same nine runs. If the 95% interval of a ratio contains 1 or is wider than
20% of the median, only the interval is shown.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import paired_timing
import yaml
from rich.console import Console
from rich.table import Table

ARMS = {"sb": 32, "mb": 128, "lb": 512}
SEEDS = (0, 1, 2)
STEPS = 50
HELP, RUN, NINE, STUDY = "--help", f"one run of {STEPS} steps", "nine commands", "a 3 x 3 study"


def seconds(*words: object, folder: Path) -> float:
    """Seconds of a command, from start to exit.

    Raises:
        CalledProcessError: if it fails.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "gengap_dist", *map(str, words)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - began


def one(folder: Path, names: "itertools.count[int]", *words: object) -> float:
    """Seconds of one run in a new folder."""
    return seconds("train", "--train.steps", STEPS, *words, "--out", f"run{next(names)}", folder=folder)


def nine(folder: Path, names: "itertools.count[int]", *words: object) -> float:
    """Seconds of all arms and seeds, one command after the other."""
    each = itertools.product(ARMS.values(), SEEDS)
    return sum(one(folder, names, "--batch.global_size", size, "--seed", seed, *words) for size, seed in each)


def study(folder: Path, names: "itertools.count[int]", *words: object) -> float:
    """Seconds of the same runs as one study."""
    config = folder / "study.yaml"
    arms = [{"name": name, "set": {"batch.global_size": size}} for name, size in ARMS.items()]
    settings = {"name": "startup", "baseline": "sb", "seeds": [*SEEDS], "arms": arms}
    config.write_text(yaml.safe_dump({"train": {"steps": STEPS}, "study": settings}))
    return seconds("study", "--config", config, *words, "--out", f"study{next(names)}", folder=folder)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=paired_timing.MIN_ROUNDS)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    words = ("--launch.num_processes", options.ranks)
    with tempfile.TemporaryDirectory() as temporary:
        folder, names = Path(temporary), itertools.count()
        one(folder, names)  # creates the MLflow store, and fills the page cache
        candidates: dict[str, Callable[[], float]] = {
            HELP: partial(seconds, "train", "--help", folder=folder),
            RUN: partial(one, folder, names),
            NINE: partial(nine, folder, names, *words),
            STUDY: partial(study, folder, names, *words),
        }
        seconds_by_case = paired_timing.in_turns(candidates, options.rounds)
    speedup, machine = paired_timing.ratio(seconds_by_case[NINE], seconds_by_case[STUDY]), paired_timing.machine()
    table = Table(
        title=f"{paired_timing.machine_summary(machine)}; {options.rounds} rounds; nine runs on {options.ranks} rank(s)"
    )
    for head in ("", "seconds (median)", "min to max"):
        table.add_column(head, justify="right")
    for name, values in seconds_by_case.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}")
    Console(width=120).print(table, f"nine commands / study: {speedup}")
    if options.out:
        metadata = {"machine": machine, "ranks": options.ranks, "steps": STEPS}
        ratio = {**speedup._asdict(), "median": speedup.median if speedup.is_conclusive else None}
        options.out.write_text(json.dumps(metadata | {"seconds": seconds_by_case, "nine_over_study": ratio}, indent=1))


if __name__ == "__main__":
    main()
