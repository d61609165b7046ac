"""Rule 3: how much of the gap does a remedy close, a scaled learning rate or longer training?

With G the score that the same batch loses without the remedy, and E what it loses with it, both paired by seed: it
resolves the gap if E is surely below the margin and below G/4; does not if E is surely above 3G/4; closes it mostly if
E is surely below G/4; partly if E is surely below G.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import (
    SCALED,
    Arm,
    scaled_names,
    shorter_counterpart,
    unscaled_counterpart,
    updates,
)
from gengap_dist.analysis.results import Claim, Outcome
from gengap_dist.analysis.rules.judged import JudgedStudy, completions
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.statistics.paired import are_equal, differences, holm

ENOUGH_UPDATES = 0.98  # of the baseline's
QUARTER, MOST = 0.25, 0.75

Grade = Literal["resolves", "does not", "mostly", "partly", "undecided"]
ORDER: tuple[Grade, ...] = ("resolves", "mostly", "partly", "does not", "undecided")  # from most to least


class Graded(NamedTuple):
    """A grade, and the two-sided p of the test that gave it; 1 if undecided."""

    grade: Grade
    p: float


def grade(left: np.ndarray, lost: np.ndarray, margin: float, look: Look) -> Graded:
    """The grade of a remedy by what is left with it, E [n], and what is lost without it, G [n], in scores.

    >>> lost = np.array([0.098, 0.101, 0.1, 0.103])  # without noise
    >>> [grade(part * lost, lost, 0.005, Look()).grade for part in (0.01, 0.1, 0.5, 0.9)]
    ['resolves', 'mostly', 'partly', 'does not']
    """
    if are_equal(left) or are_equal(lost):
        return Graded("undecided", 1.0)  # pairs that differ by exactly the same decide nothing
    below = [(left, margin), (left - QUARTER * lost, 0.0)]
    if all(look.is_below(values, limit) for values, limit in below):
        return Graded("resolves", max(look.p(values, limit) for values, limit in below))
    tests: list[tuple[Grade, np.ndarray, int]] = [
        ("does not", left - MOST * lost, 1),
        ("mostly", left - QUARTER * lost, -1),
        ("partly", left - lost, -1),
    ]
    for name, values, sign in tests:
        if look.is_above(sign * values):
            return Graded(name, look.p(values))
    return Graded("undecided", 1.0)


class _Asked(NamedTuple):
    text: str
    graded: Graded | None
    """None: not asked."""


def judge_scaling(study: JudgedStudy) -> Claim:
    """Claim 4: scaling the learning rate, and what rules scale with it, does not resolve the gap."""
    find = unscaled_counterpart((arm for arm in study.arms.values() if arm.runs), study.base)
    pairs = [(arm, find(arm)) for arm in study.roles.scaled]
    scaled = [scaled_names(arm, without or study.base) for arm, without in pairs]
    names = [name for name in dict.fromkeys(SCALED.values()) if any(name in each for each in scaled)]
    words = " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part) or "learning rate"
    return _judged("scaling", f"Scaling the {words} does not resolve the gap.", study, pairs, min_updates=0.0)


def judge_longer_training(study: JudgedStudy) -> Claim:
    """Claim 5: longer training does not resolve the gap; only arms with the baseline's updates are asked."""
    find = shorter_counterpart(arm for arm in study.arms.values() if arm.runs)
    pairs = [(arm, find(arm)) for arm in study.roles.longer]
    claim = "Longer training, with as many updates as the small batch, does not resolve the gap."
    return _judged("longer_training", claim, study, pairs, min_updates=ENOUGH_UPDATES)


def _judged(
    key: str, claim: str, study: JudgedStudy, pairs: Sequence[tuple[Arm, Arm | None]], *, min_updates: float
) -> Claim:
    control = (
        f"The arm with the same batch without the remedy, which must surely lose {study.metric.name} against the "
        "baseline."
    )
    asked = [_asked(study, arm, without, min_updates) for arm, without in pairs]
    graded = [each for each in asked if each.graded]
    corrected = holm([each.graded.p for each in graded if each.graded])
    grades: list[Grade] = [
        each.graded.grade if each.graded and p is not None and p < study.look.level else "undecided"
        for each, p in zip(graded, corrected, strict=True)
    ]
    words = {id(each): f": {name}" for each, name in zip(graded, grades, strict=True)}
    evidence = " ".join(f"{each.text}{words.get(id(each), '')}." for each in asked)
    if not asked:
        return Claim(key, claim, "undecided", "No arm has the remedy.", control, "not asked")
    if not grades:
        return Claim(key, claim, "undecided", evidence, control, "not asked")
    outcome: Outcome = "undecided"
    if "resolves" in grades:
        outcome = "contradicted"
    elif set(grades) == {"does not"}:
        outcome = "supported"
    best = min(grades, key=ORDER.index)
    names = {"resolves": "resolves it", "does not": "does not", "undecided": ""}
    return Claim(key, claim, outcome, evidence, control, names.get(best, f"closes it {best}"))


def _asked(study: JudgedStudy, arm: Arm, without: Arm | None, min_updates: float) -> _Asked:
    base = study.base
    if without is None:
        return _Asked(f"{arm.name} has no arm without the remedy to compare with", None)
    if updates(arm) < min_updates * updates(base):
        return _Asked(f"{arm.name} is not asked: {updates(arm):,.0f} of {updates(base):,.0f} updates", None)
    groups = study.scores(base), study.scores(without), study.scores(arm)
    lost, left = differences(groups[0], groups[1]), differences(groups[0], groups[2])
    seeds = sorted(lost.keys() & left.keys())
    if len(seeds) < 2:
        return _Asked(f"{arm.name}, {without.name} and {base.name} have fewer than two seeds in common", None)
    lost, left = ({seed: values[seed] for seed in seeds} for values in (lost, left))
    if not study.look.is_above(array_of(lost)):
        return _Asked(
            f"{arm.name} is not asked: {without.name} does not surely lose ({study.described(lost)}{study.unit})", None
        )
    closed = 1 - fmean(left.values()) / fmean(lost.values())
    text = (
        f"{arm.name} closes {closed:.0%} of the {study.show(fmean(lost.values()), signed=False)}{study.unit} that "
        f"{without.name} loses, {study.described(left)} are left"
    )
    graded = grade(array_of(left), array_of(lost), study.margin, study.look)
    if missing := study.missing((arm, without, base), groups):
        every = [
            grade(
                array_of(differences(of_base, of_arm)),
                array_of(differences(of_base, of_other)),
                study.margin,
                study.look,
            )
            for of_base, of_other, of_arm in completions(groups, missing, study.bounds)
        ]
        if {each.grade for each in every} != {graded.grade}:
            return _Asked(
                f"{text}, {len(missing)} of {len(seeds) + len(missing)} pairs are missing", Graded("undecided", 1.0)
            )
        graded = Graded(graded.grade, max(each.p for each in every))
    return _Asked(text, graded)
