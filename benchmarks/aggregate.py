"""Measures time and memory of aggregating many run folders: means and intervals over seeds.

    python benchmarks/aggregate.py [--arms 100] [--seeds 10] [--metrics 200] [--points 1000] [--folder DIR]

Every run has every metric at every point, with 17 digits, and names like those of probes. Each case is timed in its own
process, with the files in the page cache:

- aggregate: mean and 95% t interval of every metric at every point over the seeds of each arm, as in the arms'
  curves in MLflow, one arm after the other; the first arm is checked against json, numpy and scipy
- compare: the same folders read as a study and compared, as for a report
- both again without metrics.npz, from metrics.jsonl only, as for runs of other programs
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

from gengap_dist.analysis.seed_aggregates import Curves, curves, select_charted
from gengap_dist.analysis.study_data import MEASURED_AT, read_study
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.runs.run_folder import RunRecorder, read_info, read_metrics_table, write_info
from gengap_dist.runs.schema import RunStatus, StudyInfo

LIMIT_SECONDS, LIMIT_MIB = 30, 1024


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write a study of arms x seeds; a seed has the same metrics in every arm, and each run has its own files."""
    kinds = ("near_rank_loss/{}/rel_1e-2", "near_rank_loss/{}/abs_1e-2", "effective_rank/{}")
    names = [kinds[i % 3].format(f"layer{i // 3}.conv") for i in range(options.metrics - 2)]
    names += ["val/accuracy", MEASURED_AT]
    config = validate(RunConfig, {})
    arms = [f"arm{number}" for number in range(options.arms)]
    for seed in track(range(options.seeds), "writing"):
        rng = np.random.default_rng(seed)
        (first := folder / "runs" / arms[0] / f"seed{seed}").mkdir(parents=True)
        recorder = RunRecorder(first)
        recorder.start(config.model_copy(update={"seed": seed}), {})
        for step, row in enumerate(rng.random((options.points, options.metrics)).tolist()):
            recorder.log(step, step / 10, dict(zip(names, row, strict=True)))
        recorder.finish(RunStatus.FINISHED, {"num_steps": options.points})
        info = read_info(first)
        for number, arm in enumerate(arms):
            run = folder / "runs" / arm / f"seed{seed}"
            if number:
                run.mkdir(parents=True)
                for path in first.glob("metrics.*"):
                    shutil.copyfile(path, run / path.name)
            info.config["batch"]["global_size"] = 64 + number
            info.result["test/accuracy"] = 0.9 - number / 1000 + rng.normal() / 500
            write_info(run, info)
    seeds = [*range(options.seeds)]
    study = StudyInfo(status=RunStatus.FINISHED, name="many", question="", baseline=arms[0], arms=arms, seeds=seeds)
    write_info(folder, study)


def aggregate(folder: Path) -> dict[str, float]:
    """Curves of every arm: seconds, peak memory of this process in MiB, and the largest error of the first arm."""
    began = time.perf_counter()
    first: Curves | None = None
    for arm in sorted((folder / "runs").iterdir()):
        arm_curves = curves([select_charted(read_metrics_table(run)) for run in sorted(arm.iterdir())])
        first = first or arm_curves
    seconds, peak = time.perf_counter() - began, _peak()
    assert first is not None
    return {"seconds": seconds, "mib": peak, "error": _error(folder / "runs" / "arm0", first)}


def compare(folder: Path) -> dict[str, float]:
    """Read and compare the study as for a report: seconds and peak memory of this process in MiB."""
    began = time.perf_counter()
    comparison = read_study(folder).comparison
    assert len(comparison.gaps) == len(list((folder / "runs").iterdir())) - 1
    return {"seconds": time.perf_counter() - began, "mib": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _error(arm: Path, arm_curves: Curves) -> float:
    """Largest absolute difference from means and intervals computed with json and scipy, at a few steps."""
    runs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in sorted(arm.iterdir())]
    worst = 0.0
    for row in (0, len(arm_curves.steps) // 2, len(arm_curves.steps) - 1):
        for name, curve in arm_curves.by_name.items():
            values = np.array([lines[arm_curves.steps[row]][name] for lines in runs])
            low, _ = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            (at,) = np.flatnonzero(curve.at == row)
            computed = curve.mean[at], curve.ci_half_width[at]
            worst = max(worst, abs(computed[0] - values.mean()), abs(computed[1] - (values.mean() - low)))
    return worst


def main() -> int:
    """Write the folders, time each case in its own process, print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("arms", 100), ("seeds", 10), ("metrics", 200), ("points", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="folder for the runs (about 10 GiB; default: a temporary folder)")
    parser.add_argument("--only", choices=("aggregate", "compare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"aggregate": aggregate, "compare": compare}[options.only](options.folder)))
        return 0
    console = Console()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        make(folder, options)
        size = sum(path.stat().st_size for path in folder.glob("runs/*/*/metrics.jsonl")) / 2**30
        runs = options.arms * options.seeds
        console.print(f"{runs:,} runs x {options.metrics} metrics x {options.points:,} points, {size:.1f} GiB")
        for case in ("aggregate", "compare", "aggregate, without npz", "compare, without npz"):
            if "without" in case:
                for path in folder.glob("runs/*/*/metrics.npz"):
                    path.unlink()
            command = [sys.executable, __file__, "--only", case.partition(",")[0], "--folder", str(folder)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            error = f", largest error {result['error']:.1e}" if "error" in result else ""
            console.print(f"{case}: {result['seconds']:.1f} s, peak {result['mib']:,.0f} MiB{error}")
            if result["seconds"] > LIMIT_SECONDS or result["mib"] > LIMIT_MIB:
                console.print(f"  above the limit of {LIMIT_SECONDS} s and {LIMIT_MIB} MiB")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
