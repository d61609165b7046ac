"""The runs of an arm as one: mean and interval over its seeds, at every step that all of them have.

Pure functions of what run folders hold.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.comparison.measures import CONTROLS, MEASURED
from gengap_dist.comparison.pairing import paired, t_interval

CHARTED = re.compile("val/(accuracy|loss)|" + MEASURED)

Line = dict[str, Any]


class Seed(NamedTuple):
    """What a run folder says: run.json, and the lines of metrics.jsonl if the run has finished."""

    info: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean of a value over seeds, and its 95% interval m +- t s / sqrt(n) (Student); one seed has no interval.

    >>> {name: round(value, 3) for name, value in summary("a", [1.0, 2.0, 3.0]).items()}
    {'a/mean': 2.0, 'a/ci_low': -0.484, 'a/ci_high': 4.484}
    >>> summary("a", [1.0])
    {'a/mean': 1.0}
    """
    mean = {f"{name}/mean": float(np.mean(values))}
    interval = t_interval(values) if np.isfinite(values).all() else None
    return mean | ({f"{name}/ci_low": interval[0], f"{name}/ci_high": interval[1]} if interval else {})


def over_seeds(arm: Sequence[Seed], baseline: Sequence[Seed] = ()) -> list[Line]:
    """Lines as those of metrics.jsonl, in rising order of step; the last one also has the results.

    Curves are NAME/mean, /ci_low and /ci_high over the finished seeds, at the steps where each of them has NAME.
    Results have NAME/num_seeds as well, `sb_lb_gap` is the baseline's test accuracy minus the arm's, paired by seed,
    and `num_runs/STATUS` counts all runs, those without a result too.

    Args:
        arm: all runs of the arm.
        baseline: all runs of the baseline; none for the baseline itself.
    """
    finished = [seed for seed in arm if seed.info["status"] == "finished"]
    lines = _curves([seed.lines for seed in finished])
    if not lines:
        lines = [{"step": 0, "seconds": 0.0}]
    last = lines[-1]
    for name in sorted(set[str]().union(*(seed.info["result"] for seed in finished))):
        values = [seed.info["result"].get(name) for seed in finished]
        numbers = [float(value) for value in values if isinstance(value, int | float | str)]
        if numbers and not name.startswith("time/"):
            last |= summary(name, numbers) | {f"{name}/num_seeds": len(numbers)}
    theirs, ours = _accuracies(baseline), _accuracies(arm)
    if theirs.keys() & ours.keys():
        gap = paired(theirs, ours)
        last |= {"sb_lb_gap/mean": gap.mean, "sb_lb_gap/num_seeds": len(gap.differences)}
        if gap.student:
            last |= {"sb_lb_gap/ci_low": gap.student[0], "sb_lb_gap/ci_high": gap.student[1]}
    counts = Counter(seed.info["status"] for seed in arm)
    last |= {f"num_runs/{status}": float(number) for status, number in counts.items()}
    return lines


def _curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Line]:
    by_step = [{line["step"]: line for line in lines} for lines in runs]
    common = sorted(set.intersection(*map(set, by_step))) if by_step else []
    out: list[Line] = []
    for step in common:
        here = [lines[step] for lines in by_step]
        names = [name for name in here[0] if all(name in line for line in here) and _charted(name, here[0])]
        line = {"step": step, "seconds": float(np.mean([line["seconds"] for line in here]))}
        for name in names:
            line |= summary(name, [line[name] for line in here])
        if names or step == common[-1]:
            out.append(line)
    return out


def _charted(name: str, line: Mapping[str, Any]) -> bool:
    """Whether a curve is worth drawing; the loss of training wherever validation stands beside it."""
    if name == "train/loss":
        return "val/accuracy" in line
    return bool(CHARTED.fullmatch(name)) and not CONTROLS.search(name)


def _accuracies(seeds: Sequence[Seed]) -> dict[int, float]:
    """Seed to test accuracy, of the runs that have one."""
    found = {seed.info["seed"]: seed.info.get("result", {}).get("test/accuracy") for seed in seeds}
    return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}
