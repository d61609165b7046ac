"""Tests the paper's claims (Oyedotun et al. 2022) on a study: each is supported, contradicted or undecided.

The rules are in `rules`, one file for each claim, and docs/statistics.md explains them. No claim is decided by a
correlation. The result is deterministic, and the evidence contains the numbers used.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from gengap_dist.analysis.answer import answer
from gengap_dist.analysis.arm_roles import group_by_arm, roles
from gengap_dist.analysis.results import Claim, InterventionResult, Run
from gengap_dist.analysis.rules.explanation import judge_explanation
from gengap_dist.analysis.rules.gap import judge_gap, judge_growth
from gengap_dist.analysis.rules.judged import JudgedStudy
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.rules.remedies import judge_longer_training, judge_scaling
from gengap_dist.analysis.rules.training import Training, judge_training
from gengap_dist.runs.metric import ACCURACY, MetricDescription

MARGIN = 0.005  # half a percentage point of a share; of other metrics this part of the baseline's mean


class Judgement(NamedTuple):
    """What the rules say of a study."""

    answer: str
    """One sentence."""
    claims: list[Claim]
    """In the paper's order."""
    training: dict[str, Training]
    """By arm."""
    interventions: list[InterventionResult]
    """Of each large batch that has one."""
    margin: float | None = None
    """A smaller difference of scores does not count."""


def judge(
    runs: Sequence[Run],
    baseline: str,
    metric: MetricDescription = ACCURACY,
    margin: float | None = None,
    look: Look | None = None,
) -> Judgement:
    """Judge a study; nothing is claimed if its baseline has no finished run.

    Args:
        runs: all runs, with any status.
        baseline: the arm that the others are compared with.
        metric: of their scores.
        margin: a smaller difference of scores does not count; None: half a percentage point of a share, and 0.5% of
            the baseline's mean of other metrics.
        look: how sure differences must be; None: 95%, at a single look.
    """
    look = look or Look()
    arms = group_by_arm(runs)
    if baseline not in arms or not arms[baseline].runs:
        return Judgement("", [], {}, [])
    base, is_share = arms[baseline], metric.unit == "share"
    if margin is None:
        margin = MARGIN * (1.0 if is_share else abs(fmean(base.scores().values() or [0.0])))
    training = judge_training(arms, base, margin, look, is_share=is_share)
    study = JudgedStudy(metric, margin, look, base, arms, roles(arms, baseline), training)
    gap, gaps = judge_gap(study)
    growth, growths = judge_growth(study)
    explanation, interventions = judge_explanation(study)
    claims = [gap, growth, explanation, judge_scaling(study), judge_longer_training(study)]
    return Judgement(answer(study, gaps, growths, explanation), claims, training, interventions, margin)
