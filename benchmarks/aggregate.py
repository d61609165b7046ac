"""Means and intervals over the seeds of many runs, from their folders: time and memory.

    python benchmarks/aggregate.py [--arms 100] [--seeds 10] [--metrics 200] [--points 1000] [--folder DIR]

Every run has every metric at every point, in 17 digits, under names such as our probes give. Each is timed in a process
of its own, files in the page cache:

- aggregate: mean and 95% t interval of every metric at every point over the seeds of each arm, as the arms' curves in
  MLflow have them, one arm after the other; the first arm is checked against json, numpy and scipy
- compare: the same folders read as a study and compared, as a report does
- both again without metrics.npz, from the lines alone, as of runs that something else has written
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy import stats

from gengap_dist.analysis.seed_aggregates import Curves, curves
from gengap_dist.analysis.study_data import MEASURED_AT, read_study
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.runs.run_folder import FINISHED, RunRecorder, read_info, read_metrics_table

LIMIT_SECONDS, LIMIT_MIB = 30, 1024


def make(folder: Path, given: argparse.Namespace) -> None:
    """A study of arms x seeds; a seed has the same metrics in every arm, each run files of its own."""
    kinds = ("near_rank_loss/{}/rel_1e-2", "near_rank_loss/{}/abs_1e-2", "effective_rank/{}")
    names = [kinds[i % 3].format(f"layer{i // 3}.conv") for i in range(given.metrics - 2)]
    names += ["val/accuracy", MEASURED_AT]
    config = validate(RunConfig, {})
    arms = [f"arm{number}" for number in range(given.arms)]
    for seed in track(range(given.seeds), "writing"):
        rng = np.random.default_rng(seed)
        (first := folder / "runs" / arms[0] / f"seed{seed}").mkdir(parents=True)
        book = RunRecorder(first)
        book.start(config.model_copy(update={"seed": seed}), {})
        for step, row in enumerate(rng.random((given.points, given.metrics)).tolist()):
            book.log(step, step / 10, dict(zip(names, row, strict=True)))
        book.finish(FINISHED, {"num_steps": given.points})
        info = read_info(first)
        for number, arm in enumerate(arms):
            run = folder / "runs" / arm / f"seed{seed}"
            if number:
                run.mkdir(parents=True)
                for path in first.glob("metrics.*"):
                    shutil.copyfile(path, run / path.name)
            info["config"]["batch"]["global_size"] = 64 + number
            info["result"]["test/accuracy"] = 0.9 - number / 1000 + rng.normal() / 500
            (run / "run.json").write_text(json.dumps(info))
    study = {"name": "many", "question": "", "baseline": arms[0], "arms": arms, "seeds": [*range(given.seeds)]}
    (folder / "study.json").write_text(json.dumps({"schema": 1, "status": FINISHED, **study}))


def aggregate(folder: Path) -> dict[str, float]:
    """Curves of every arm: seconds, peak memory of this process in MiB, and the largest error of the first arm."""
    began = time.perf_counter()
    first: Curves | None = None
    for arm in sorted((folder / "runs").iterdir()):
        found = curves([read_metrics_table(run) for run in sorted(arm.iterdir())])
        first = first or found
    seconds, peak = time.perf_counter() - began, _peak()
    assert first is not None
    return {"seconds": seconds, "mib": peak, "error": _error(folder / "runs" / "arm0", first)}


def compare(folder: Path) -> dict[str, float]:
    """The study as a report reads it, and what is said of it: seconds and peak memory."""
    began = time.perf_counter()
    said = read_study(folder).comparison
    assert len(said.gaps) == len(list((folder / "runs").iterdir())) - 1
    return {"seconds": time.perf_counter() - began, "mib": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _error(arm: Path, found: Curves) -> float:
    """Largest absolute difference to means and intervals by json and scipy, of a few steps."""
    runs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in sorted(arm.iterdir())]
    worst = 0.0
    for row in (0, len(found.steps) // 2, len(found.steps) - 1):
        for column, name in enumerate(found.names):
            values = np.array([lines[found.steps[row]][name] for lines in runs])
            low, _ = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            mine = found.mean[row, column], found.half[row, column]
            worst = max(worst, abs(mine[0] - values.mean()), abs(mine[1] - (values.mean() - low)))
    return worst


def main() -> int:
    """Write the folders, time both in processes of their own, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("arms", 100), ("seeds", 10), ("metrics", 200), ("points", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where the folders go (some 10 GiB; default: a temporary one)")
    parser.add_argument("--only", choices=("aggregate", "compare"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps({"aggregate": aggregate, "compare": compare}[given.only](given.folder)))
        return 0
    console = Console()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        make(folder, given)
        size = sum(path.stat().st_size for path in folder.glob("runs/*/*/metrics.jsonl")) / 2**30
        runs = given.arms * given.seeds
        console.print(f"{runs:,} runs x {given.metrics} metrics x {given.points:,} points, {size:.1f} GiB")
        for what in ("aggregate", "compare", "aggregate, lines alone", "compare, lines alone"):
            if "alone" in what:
                for path in folder.glob("runs/*/*/metrics.npz"):
                    path.unlink()
            command = [sys.executable, __file__, "--only", what.partition(",")[0], "--folder", str(folder)]
            took = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            error = f", largest error {took['error']:.1e}" if "error" in took else ""
            console.print(f"{what}: {took['seconds']:.1f} s, peak {took['mib']:,.0f} MiB{error}")
            if took["seconds"] > LIMIT_SECONDS or took["mib"] > LIMIT_MIB:
                console.print(f"  above the limit of {LIMIT_SECONDS} s and {LIMIT_MIB} MiB")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
