"""Which look at a study this is, and how sure its differences must be: from what study.json says."""

from collections.abc import Mapping, Sequence
from typing import Any

from gengap_dist.analysis.rules.look import Look
from gengap_dist.statistics.sequential import OPEN_FIRST_LEVEL, OPEN_LATER_LEVEL, TOTAL_LEVEL, look_level

NEVER = Look(level=0.0)  # nothing is sure


def look_of(seeds: Sequence[int], judged: Sequence[Sequence[int]], section: Mapping[str, Any]) -> Look:
    """The look at a study with these seeds.

    Args:
        seeds: of the study now.
        judged: lists of seeds of the earlier looks, the present one perhaps among them.
        section: the settings of the study, of which `looks` and `may_extend` are read.

    >>> look_of(range(5), [], {}).level, look_of(range(10), [], {"looks": [10, 20]}).level
    (0.05, 0.01)
    >>> look_of(range(8), [[0, 1, 2]], {}).by_e_value
    True
    """
    earlier = [each for each in judged if {*each} != {*seeds}]
    declared, num = [int(each) for each in section.get("looks") or ()], len(seeds)
    if declared:
        if num not in declared:
            shown = " and ".join(map(str, declared))
            return NEVER._replace(sentence=f"Looks were declared at {shown} seeds: with {num} nothing is judged.")
        level, at = look_level(declared, num), declared.index(num) + 1
        sentence = f"This is look {at} of {len(declared)}, declared at {' and '.join(map(str, declared))} seeds"
        return Look(level, sentence=f"{sentence}: its level is {level:.3g}." if len(declared) > 1 else "")
    if section.get("may_extend"):
        if not earlier:
            return Look(OPEN_FIRST_LEVEL, sentence="The study may be extended: its first look has a level of 0.04.")
        return Look(
            OPEN_LATER_LEVEL,
            by_e_value=True,
            sentence=f"The study was extended after {_counts(earlier)} seeds, as declared: it is judged by e-values of "
            "at least 100.",
        )
    if earlier:
        return Look(
            TOTAL_LEVEL,
            by_e_value=True,
            sentence=f"The study was already judged with {_counts(earlier)} seeds, and an extension was not declared: "
            "it is judged by e-values of at least 20 (false alarms up to 6.4%).",
        )
    return Look()


def _counts(judged: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(len(each)) for each in judged)
