"""Which look at a study this is, and how sure its differences must be: from what study.json says."""

from collections.abc import Mapping, Sequence
from typing import Any

from gengap_dist.analysis.rules.look import Look
from gengap_dist.statistics.sequential import OPEN_FIRST_LEVEL, OPEN_LATER_LEVEL, TOTAL_LEVEL, look_level

NEVER = Look(level=0.0)  # nothing is sure


def look_of(
    seeds: Sequence[int], judged: Sequence[Sequence[int]], declared: Mapping[str, Any], *, complete: bool = True
) -> Look:
    """The look at a study with these seeds.

    Args:
        seeds: of the study now.
        judged: lists of seeds of the earlier looks, the present one perhaps among them.
        declared: `looks` and `may_extend`, as they were at the first look.
        complete: whether every run of the study has ended.

    >>> look_of(range(5), [], {}).level, look_of(range(10), [], {"looks": [10, 20]}).level
    (0.05, 0.01)
    >>> look_of(range(8), [[0, 1, 2]], {}).by_e_value, look_of(range(8), [], {}, complete=False).level
    (True, 0.0)
    """
    earlier, num = [each for each in judged if {*each} != {*seeds}], len(seeds)
    if not complete:
        return NEVER._replace(sentence="Not all runs of the study have ended, or can be read: nothing is judged.")
    sizes = [int(each) for each in declared.get("looks") or ()]
    as_declared = all(len(each) in sizes and {*each} < {*seeds} for each in earlier)
    if sizes and as_declared:
        shown = " and ".join(map(str, sizes))
        if num not in sizes:
            return NEVER._replace(sentence=f"Looks were declared at {shown} seeds: with {num} nothing is judged.")
        level = look_level(sizes, num)
        name = f"look {sizes.index(num) + 1} of {len(sizes)}"
        sentence = f"This is {name}, declared at {shown} seeds: its level is {level:.3g}."
        return Look(level, sentence=sentence, name=name) if len(sizes) > 1 else Look(level)
    if declared.get("may_extend") and not earlier:
        sentence = "The study may be extended: its first look has a level of 0.04."
        return Look(OPEN_FIRST_LEVEL, sentence=sentence, name="first look")
    if declared.get("may_extend") and all({*each} < {*seeds} for each in earlier):
        return Look(
            OPEN_LATER_LEVEL,
            by_e_value=True,
            sentence=f"The study was extended after {_counts(earlier)} seeds, as declared: it is judged by e-values of "
            "at least 100.",
            name="by e-values",
        )
    if earlier:
        return Look(
            TOTAL_LEVEL,
            by_e_value=True,
            sentence=f"The study was already judged with {_counts(earlier)} seeds, and this look was not declared: it "
            "is judged by e-values of at least 20 (false alarms up to 6.4%).",
            name="by e-values",
        )
    return Look()


def _counts(judged: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(len(each)) for each in judged)
