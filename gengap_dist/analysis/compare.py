"""Runs in, comparison out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from gengap_dist.analysis.arm_roles import Arm, arms_of, same
from gengap_dist.analysis.claims import claims
from gengap_dist.analysis.correlations import correlations
from gengap_dist.analysis.critical_batch import updates_to_target
from gengap_dist.analysis.results import Comparison, Gap, Run
from gengap_dist.statistics.paired import holm, minimum_detectable_effect, p_value, paired

FEW_PAIRS = 8


def compare(runs: Sequence[Run], baseline: str) -> Comparison:
    """Everything that a set of runs says against its baseline; what is missing is missing there, too, and said.

    Args:
        runs: all runs, also those that came to no end; arms stand in the order of their first runs.
        baseline: name of the arm that the others are compared with.
    """
    arms = arms_of(runs)
    gaps = _gaps(runs, arms, baseline)
    found = correlations(runs)
    return Comparison(
        baseline=baseline,
        gaps=gaps,
        correlations=found,
        target=updates_to_target(runs, baseline),
        claims=claims(runs, baseline, found),
        caveats=_caveats(runs, arms, baseline, gaps),
    )


def _gaps(runs: Sequence[Run], arms: dict[str, Arm], baseline: str) -> dict[str, Gap]:
    base = arms[baseline].accuracies() if baseline in arms else {}
    out: dict[str, Gap] = {}
    for name, arm in arms.items():
        if name == baseline or not (base.keys() & arm.accuracies().keys()):
            continue
        difference = paired(base, arm.accuracies())
        values = np.array([*difference.differences.values()])
        n = len(values)
        out[name] = Gap(
            paired=difference,
            p=p_value(values),
            holm=None,
            ci_half_width=(difference.student[1] - difference.student[0]) / 2 if difference.student else None,
            minimum_detectable_effect=minimum_detectable_effect(float(values.std(ddof=1)), n)
            if difference.student
            else None,
            matched=_matched(arm, arms[baseline]),
            lost=lost(runs, name),
        )
    corrected = holm([gap.p for gap in out.values()])
    return {name: gap._replace(holm=p) for (name, gap), p in zip(out.items(), corrected, strict=True)}


def _matched(arm: Arm, base: Arm) -> str:
    words = []
    for word, of in (("epochs", lambda run: run.num_epochs), ("updates", lambda run: run.num_updates)):
        ours, theirs = (float(np.mean([of(run) for run in each.runs.values()])) for each in (arm, base))
        if same(ours, theirs):
            words.append(word)
    return " and ".join(words)


def lost(runs: Sequence[Run], arm: str) -> str:
    """How many runs of an arm ended otherwise than finished, in words; empty if none."""
    counts = Counter(run.status for run in runs if run.arm == arm and run.status != "finished")
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _caveats(runs: Sequence[Run], arms: dict[str, Arm], baseline: str, gaps: dict[str, Gap]) -> list[str]:
    out = []
    if baseline not in arms or not arms[baseline].runs:
        out.append(f"The baseline ({baseline}) has no finished run: there is nothing to compare the others with.")
    ended = [f"{name}: {words}" for name in arms if (words := lost(runs, name))]
    if ended:
        out.append(
            "Runs that came to no result are counted and left out of means, so what is left may look better than the "
            f"arm is: {'; '.join(ended)}."
        )
    num_pairs = [len(gap.paired.differences) for gap in gaps.values()]
    if num_pairs and max(num_pairs) == 1:
        out.append("With one pair of seeds there is no interval, and no difference can be told from none.")
    elif widths := [gap.ci_half_width for gap in gaps.values() if gap.ci_half_width is not None]:
        n, width = max(num_pairs), 100 * float(np.median(widths))
        finds = 100 * float(
            np.median(
                [gap.minimum_detectable_effect for gap in gaps.values() if gap.minimum_detectable_effect is not None]
            )
        )
        out.append(
            f"With {n} seeds a loss or gain under {width:.2f} points (median over arms) cannot be told from none, and "
            f"a true one of {finds:.2f} points would be missed one time in five."
        )
        if n < FEW_PAIRS:
            out.append(f"With {n} pairs read the t interval: the bootstrap cannot reach beyond the differences it saw.")
    seeds = max((len(arm.runs) for arm in arms.values()), default=0)
    short = [f"{name} ({n})" for name, gap in gaps.items() if (n := len(gap.paired.differences)) < seeds]
    if short:
        out.append(f"Fewer than {seeds} pairs: {', '.join(short)}.")
    if any(gap.p is None and len(gap.paired.differences) > 1 for gap in gaps.values()):
        out.append("Where all pairs differ by exactly as much there is no spread to judge by, and so no interval.")
    if len({run.num_probe_samples for arm in arms.values() for run in arm.runs.values() if run.measures}) > 1:
        out.append("Probe sets are not equally large in all runs: near-rank loss is compared only where they are.")
    lacking = [name for name, arm in arms.items() if arm.runs and len(arm.accuracies()) < len(arm.runs)]
    if lacking:
        out.append(f"Some finished runs have no test accuracy: {', '.join(lacking)}.")
    measured = {name for arm in arms.values() for run in arm.runs.values() for name in run.measures}
    partly = [name for name, arm in arms.items() if any(measured - run.measures.keys() for run in arm.runs.values())]
    if measured and partly:
        out.append(f"Some explanations were not measured in every run: {', '.join(partly)}.")
    alone = [name for name in arms if name != baseline and name not in gaps]
    if alone and baseline in arms and arms[baseline].runs:
        out.append(f"No seed has both the baseline and: {', '.join(alone)}.")
    return out
