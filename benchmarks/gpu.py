"""Tests and benchmarks on a GPU: CUDA results against CPU results, synchronizations, memory, speed, compilation.

    make gpu [PART=correctness]                      or, with options,
    python benchmarks/gpu.py [--part PART] [--seconds 480] [--again] [--only PATTERN...] [--list] [--out FILE]

One GPU is enough; Ray, MLflow and the network are not used. Parts, all in this order without --part:

  correctness  metrics of short runs of many configurations, compared with those on a CPU
  sync         how often a step waits for the GPU, and where
  memory       running out of memory; peaks compared with `gengap plan`
  speed        images per second against plain torch, Lightning and the bare step, in turns; linear algebra
  compile      torch.compile: agreement, first step, recompilations, gain

Each part has a time limit of --seconds. Every result is written to the JSON immediately, and a page is generated from
it; the same command continues with the remaining items, as long as GPU, torch and code are the same. Exit code 1: an
item failed. 2: the measurement could not start.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_parts import ledger as ledgers
from gpu_parts import written
from gpu_parts.items import Answer, Item, Part, attempt
from gpu_parts.ledger import Ledger, machine
from rich.console import Console
from world_pool import WorldPool

from gengap_dist.distributed.worker_pool import RankFailed
from gengap_dist.errors import UsageError

PARTS = {name: f"gpu_parts.{name}" for name in ("correctness", "sync", "memory", "speed")}
PARTS["compile"] = "gpu_parts.compilation"
INTERRUPTED = 130
OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"


class OutOfTime(Exception):
    """A part has reached its time limit."""


class Worker:
    """The process that uses the GPU; it is replaced after an item that may have changed its state."""

    def __init__(self) -> None:
        """The process is started on first use."""
        self._pool: WorldPool | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="gengap_gpu_")
        # for the process and its children: the user's caches are neither read nor written
        names = ("TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        os.environ |= dict.fromkeys(names, self._folder.name)
        os.environ["PYTHONWARNINGS"] = (
            "ignore::UserWarning:multiprocessing.resource_tracker"  # the process is ended by SIGKILL
        )

    def __call__(self, item: Item, seconds: float) -> Answer:
        """The answer of an item, within `seconds`.

        Raises:
            OutOfTime: if it takes longer; the process is killed.
        """
        try:
            with _alarm(seconds):
                answer = self._call(attempt, item.job)
        except RankFailed:
            answer = {"good": False, "text": "its process died", "error": "its process died", "at": []}
        except BaseException:
            self.end(kill=True)
            raise
        if item.alone or "error" in answer:
            self.end(kill=True)
        return answer

    def machine(self) -> dict[str, Any]:
        """The machine of the process."""
        return self._call(machine)

    def _call(self, job: Any, *args: Any) -> Any:
        if self._pool is None:
            self._pool = WorldPool(1, "cuda")
        return self._pool(job, *args)

    def end(self, *, kill: bool = False) -> None:
        """End the process."""
        if self._pool is None:
            return
        self._pool.close(kill=kill)
        self._pool = None


class _alarm:
    """Raises OutOfTime in the main thread after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(0.01, seconds)

    def __enter__(self) -> None:
        def ring(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def part_of(name: str) -> Part:
    """A part by its name."""
    return import_module(PARTS[name]).PART


def chosen(part: Part, patterns: Sequence[str]) -> list[Item]:
    """The items of a part that match a pattern."""
    return [item for item in part.items if any(fnmatch(item.name, pattern) for pattern in patterns)]


def measure(name: str, options: argparse.Namespace, ledger: Ledger, worker: Worker, console: Console) -> bool:
    """Measure one part within its time limit; returns whether all known answers are good."""
    deadline = time.monotonic() + options.seconds
    items, num_left, num_bad = chosen(part_of(name), options.only), 0, 0
    console.rule(name, align="left")
    for number, item in enumerate(items, 1):
        answer, seconds = ledger.answer(name, item.name), max(0.0, deadline - time.monotonic())
        head = f"{number:>3}/{len(items)} {item.name}: "
        if item.missing:
            answer = {"good": True, "text": f"{item.missing} is not installed", "missing": item.missing}
            ledger.keep(name, item.name, answer)
        elif answer is None or options.again:
            if (expected := ledger.seconds(name, item.name) or item.seconds) > seconds:
                num_left += 1
                console.print(f"{head}takes {expected:.0f} s, and {seconds:.0f} s are left", highlight=False)
                continue
            began = time.monotonic()
            try:
                answer = worker(item, seconds)
            except OutOfTime:
                took = round(time.monotonic() - began, 1)
                ledger.keep(name, item.name, {"cut_off": True, "seconds": took})
                num_left += 1
                console.print(f"{head}was cut off after {took} s", highlight=False)
                continue
            answer["seconds"] = round(time.monotonic() - began, 1)
            ledger.keep(name, item.name, answer)
        num_bad += not answer["good"]
        mark = "ok " if answer["good"] else "BAD"
        console.print(f"{mark} {head}{answer['text']}", highlight=False, markup=False)
        for place in answer.get("at", ()):
            console.print(f"        at {place}", highlight=False, markup=False)
    if num_left:
        console.print(f"{num_left} of {len(items)} items are left: run the same command again", highlight=False)
    console.print(f"{num_bad} of {len(items)} are not as they should be", highlight=False)
    return not num_bad


def show(names: Sequence[str], options: argparse.Namespace, ledger: Ledger | None) -> None:
    """Print the items that would be measured."""
    for name in names:
        for item in chosen(part_of(name), options.only):
            if options.again or ledger is None or ledger.answer(name, item.name) is None:
                print(f"{name:12} {item.name}" + (f" ({item.missing} is not installed)" if item.missing else ""))


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], help="default: all of them")
    parser.add_argument("--seconds", type=float, default=480.0, help="for each part (default: 480)")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON; the page is the same name with .md")
    parser.add_argument("--only", nargs="+", default=["*"], help="only items whose name matches one of these patterns")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--list", action="store_true", help="print the items, and measure nothing")
    options = parser.parse_args()
    names = [options.part] if options.part else [*PARTS]
    if not torch.cuda.is_available():
        if options.list:
            return show(names, options, None)
        raise SystemExit(
            _refused(f"this machine shows torch {torch.__version__} no GPU, and all that is measured here runs on one")
        )
    worker, console = Worker(), Console(soft_wrap=True)
    try:
        ledger = Ledger(options.out, worker.machine())
        if options.list:
            return show(names, options, ledger)
        console.print(written.machine_summary(ledger.session["machine"]), highlight=False)
        good, page = True, options.out.with_suffix(".md")
        for name in names:
            good &= measure(name, options, ledger, worker, console)
            page.write_text(written.page(ledgers.read(options.out), {name: part_of(name) for name in PARTS}))
        console.print(f"written: {options.out} and {page}")
    except UsageError as error:
        raise SystemExit(_refused(str(error))) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    finally:
        worker.end(kill=True)
    raise SystemExit(0 if good else 1)


def _refused(sentence: str) -> int:
    print(f"gpu: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
