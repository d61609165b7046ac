"""Short runs of this package on one device, and their recorded metrics."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.runs.run_folder import prepare_folder
from gengap_dist.training.trainer import run

Settings = Mapping[str, Any]
Numbers = dict[tuple[int, str], float]
"""Metrics by (step, name), without times."""
TIMES = ("step", "seconds", "time/", "probe_seconds")
SHORT: Settings = {  # digits, included in the package
    "mlflow.enabled": False,
    "mlflow.system_seconds": None,
    "batch.global_size": 64,
    "train.steps": 4,
    "train.num_evals": 1,
    "probe.num_samples": 128,
    "probe.per_decade": None,
    "probe.max_time_fraction": None,
    "checkpoint.every_seconds": 1e9,
}
NO_PROBE: Settings = {"probe.enabled": False}


def config(settings: Settings, device: str) -> RunConfig:
    """A short run with `settings` on `device`."""
    return validate(RunConfig, nested({**SHORT, "launch.device": device, **settings}))


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary run folder."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "run"


def train(
    settings: Settings,
    device: str,
    out: Path,
    *,
    resume: bool = False,
    until: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """One run, or its steps up to `until`; returns its result."""
    prepare_folder(out, "run.json", resume=resume)
    done = 0

    def count(step: int, total: int, note: str) -> None:
        nonlocal done
        done = step
        progress(step, total, note)

    with suppress(Preempted):
        stop = until or math.inf
        return run(
            config(settings, device), out, resume=resume, progress=count, preemption_requested=lambda: done + 1 >= stop
        )
    return {}


def numbers(out: Path) -> Numbers:
    """All metrics of metrics.jsonl, without times."""
    by_key: Numbers = {}
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        by_key |= {(row["step"], name): float(value) for name, value in row.items() if not name.startswith(TIMES)}
    return by_key


def recorded(settings: Settings, device: str) -> Numbers:
    """The metrics of one run."""
    with folder() as out:
        train(settings, device, out)
        return numbers(out)
