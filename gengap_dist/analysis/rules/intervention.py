"""Rule 4: does near-rank loss cause the loss of large batches? A two-sided intervention with placebo and two routes.

With A the score and R the near-rank loss of arms at the small batch S and at a large one L, with rank penalties that
raise (+) or lower (-) the rank, a placebo (p) or none (0), for each seed:

    lost   = A(S,0) - A(L,0)                                growth = R(L,0) - R(S,0)
    gain   = [A(L,+) - A(L,p)] - [A(S,+) - A(S,p)]          fall   = [R(L,p) - R(L,+)] - [R(S,p) - R(S,+)]
    cost   = A(S,p) - A(S,-)                                rise   = R(S,-) - R(S,p)
    raising = gain - k+ lost / 2, k+ = mean fall / mean growth
    lowering = cost - k- lost / 2, k- = mean rise / mean growth

Raising and lowering above 0: more than half of the loss goes through the rank. A route is a way to raise the rank; two
are needed, because each may help training by other means.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm, Intervention
from gengap_dist.analysis.results import Claim, Outcome
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN, JudgedStudy, Outcomes, share
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.analysis.rules.training import training_margin
from gengap_dist.statistics.equivalence import is_equivalent
from gengap_dist.statistics.paired import holm
from gengap_dist.statistics.share import share_interval

SAME_RANK = 0.15  # of the growth: routes that reach the same near-rank loss
QUARTER, HALF = 0.25, 0.5

Finding = Literal[
    "does not grow",
    "not asked",
    "explains most",
    "explains less than half",
    "routes disagree",
    "contributes",
    "undecided",
]
OUTCOMES: dict[Finding, Outcome] = {
    "does not grow": "contradicted",
    "explains most": "supported",
    "explains less than half": "contradicted",
}


class Route(NamedTuple):
    """Scores and near-rank losses of the arms that raise the rank in one way, and of their placebo: all [n]."""

    name: str
    large_raised: np.ndarray
    small_raised: np.ndarray
    large_placebo: np.ndarray
    small_placebo: np.ndarray


class Arms(NamedTuple):
    """One quantity of all arms of an intervention at one large batch, over the same n seeds: all [n]."""

    small: np.ndarray
    large: np.ndarray
    small_lowered: np.ndarray
    small_placebo: np.ndarray
    """Of the arm that lowers the rank."""
    routes: Sequence[Route]


class Verdict(NamedTuple):
    """What an intervention at one large batch found."""

    finding: Finding
    p: float
    """Two-sided p of the tests that decided, the largest of them; 1 if nothing did."""
    reason: str
    """The condition that failed; empty if none did."""


def judge_arms(scores: Arms, near_rank_losses: Arms, look: Look) -> Verdict:
    """The verdict from arms that all trained as well as the baseline.

    Args:
        scores: A, test scores.
        near_rank_losses: R of the same arms and seeds.
        look: how sure differences must be.
    """
    lost, growth = scores.small - scores.large, near_rank_losses.large - near_rank_losses.small
    if not look.is_above(lost):
        return Verdict("not asked", 1.0, "the large batch does not surely lose")
    if look.is_below(growth, NEAR_RANK_MARGIN):
        return Verdict("does not grow", max(look.p(lost), look.p(growth, NEAR_RANK_MARGIN)), "")
    if reason := _failed_condition(scores, near_rank_losses, look):
        return Verdict("not asked", 1.0, reason)
    gains, raisings = zip(*(gain_of(scores, near_rank_losses, at) for at in range(len(scores.routes))), strict=True)
    cost, lowering = cost_of(scores, near_rank_losses)
    tests: list[tuple[Finding, list[np.ndarray]]] = [
        ("explains most", [*raisings, lowering]),
        ("explains less than half", [-each for each in (*raisings, lowering)]),
    ]
    for finding, values in tests:
        if all(look.is_above(each) for each in values):
            return Verdict(finding, max(look.p(each) for each in values), "")
    if p := _disagree(scores, near_rank_losses, look):
        return Verdict("routes disagree", p, "")
    if all(look.is_above(each) for each in (*gains, cost)):
        return Verdict("contributes", max(look.p(each) for each in (*gains, cost)), "")
    return Verdict("undecided", 1.0, "the intervals are too wide to decide")


def gain_of(scores: Arms, near_rank_losses: Arms, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Of route number `at`: gain [n], and raising [n]."""
    route, ranks = scores.routes[at], near_rank_losses.routes[at]
    lost, growth = scores.small - scores.large, near_rank_losses.large - near_rank_losses.small
    gain = route.large_raised - route.large_placebo - (route.small_raised - route.small_placebo)
    return gain, gain - _fall(ranks).mean() / growth.mean() * lost / 2


def cost_of(scores: Arms, near_rank_losses: Arms) -> tuple[np.ndarray, np.ndarray]:
    """Of lowering the rank: cost [n], and lowering [n]."""
    lost, growth = scores.small - scores.large, near_rank_losses.large - near_rank_losses.small
    cost = scores.small_placebo - scores.small_lowered
    rise = near_rank_losses.small_lowered - near_rank_losses.small_placebo
    return cost, cost - rise.mean() / growth.mean() * lost / 2


def _fall(route: Route) -> np.ndarray:
    return route.large_placebo - route.large_raised - (route.small_placebo - route.small_raised)


def _failed_condition(scores: Arms, near_rank_losses: Arms, look: Look) -> str:
    """The first condition that is not surely true; empty if all are."""
    lost, growth = scores.small - scores.large, near_rank_losses.large - near_rank_losses.small
    rise = near_rank_losses.small_lowered - near_rank_losses.small_placebo
    if not look.is_above(growth, NEAR_RANK_MARGIN):
        return f"near-rank loss does not surely grow by more than {NEAR_RANK_MARGIN}"
    if len(scores.routes) < 2:
        return "only one way to raise the rank was tried: a second one, spread or trace beside logdet, is needed"
    for score, ranks in zip(scores.routes, near_rank_losses.routes, strict=True):
        if not look.is_above(_fall(ranks) - HALF * growth):
            return f"{score.name} does not surely take back half of the growth"
        moved = ranks.large_placebo - near_rank_losses.large, ranks.small_placebo - near_rank_losses.small
        if not all(look.is_within(each, QUARTER * growth) for each in moved):
            return f"the placebo of {score.name} may move near-rank loss by a quarter of the growth"
        if not look.is_within(score.small_raised - score.small_placebo, HALF * lost):
            return f"at the small batch {score.name} and its placebo may differ by half of the loss"
    if not look.is_above(rise - HALF * growth):
        return "lowering the rank does not surely reach half of the growth"
    return ""


def _disagree(scores: Arms, near_rank_losses: Arms, look: Look) -> float:
    """P of two routes that reach the same near-rank loss and surely other scores; 0 if there are none."""
    lost, growth = scores.small - scores.large, near_rank_losses.large - near_rank_losses.small
    for at, (first, ranks) in enumerate(zip(scores.routes, near_rank_losses.routes, strict=True)):
        for second, other in zip(scores.routes[at + 1 :], near_rank_losses.routes[at + 1 :], strict=True):
            apart = first.large_raised - second.large_raised
            same = abs(float((ranks.large_raised - other.large_raised).mean())) <= SAME_RANK * growth.mean()
            for sign in (1, -1):
                if same and look.is_above(sign * apart - QUARTER * lost):
                    return look.p(sign * apart - QUARTER * lost)
    return 0.0


# -- the claim --------------------------------------------------------------------------------------------------------


class _Trial(NamedTuple):
    """The arms of an intervention at one large batch."""

    large: Arm
    lowered: Intervention
    lowered_placebo: Intervention
    routes: list[tuple[Intervention, Intervention, Intervention, Intervention]]
    """Large raised, small raised, and the placebos of both."""

    @property
    def arms(self) -> list[Arm]:
        """All of them but the baseline, once each."""
        every = [self.lowered, self.lowered_placebo, *(each for route in self.routes for each in route)]
        return [self.large, *{each.arm.name: each.arm for each in every}.values()]


def judge_explanation(study: JudgedStudy) -> Claim:
    """Claim 3: near-rank loss causes the loss of large batches."""
    name = study.metric.name
    harm = f"{name} loss" if study.metric.higher_is_better else f"added {name}"
    claim = f"Near-rank loss causes the {harm} of large batches."
    control = (
        "Arms whose rank is raised and lowered, each against a placebo of the same gradient norm that leaves the rank "
        "as it is, at both batches; and a second way to raise the rank."
    )
    natural = [each.natural for each in study.roles.interventions]
    batches = [arm for arm in study.roles.plain if any(arm.name == other.name for other in natural)]
    batches = batches or study.roles.plain
    texts, verdicts = [], []
    for large in batches:
        verdict, text = _at_batch(study, large)
        texts.append(text)
        verdicts.append(verdict)
    evidence = " ".join(texts) or "No arm differs from the baseline only in its batch."
    corrected = holm([verdict.p for verdict in verdicts])
    findings: list[Finding] = [
        verdict.finding if verdict.p == 1.0 or (p is not None and p < study.look.level) else "undecided"
        for verdict, p in zip(verdicts, corrected, strict=True)
    ]
    decided: set[Finding] = {each for each in findings if each not in ("undecided", "not asked")}
    outcomes: set[Outcome] = {OUTCOMES.get(each, "undecided") for each in decided}
    outcome: Outcome = outcomes.pop() if len(outcomes) == 1 else "undecided"
    finding = " / ".join(sorted(decided)) or ("not asked" if set(findings) <= {"not asked"} else "")
    return Claim("explains", claim, outcome, evidence, control, finding)


def _at_batch(study: JudgedStudy, large: Arm) -> tuple[Verdict, str]:
    base = study.base
    lost, growth = study.lost(large, base), study.growth(large, base)
    reason = f"training of {large.name}: {study.training[large.name]}"
    if len(lost) < 2 or (reason := _trained_otherwise(study, large, lost)):
        return _not_asked(large, reason)
    facts = f"{large.name} loses {study.described(lost)}{study.unit}"
    if growth:
        facts += f", its near-rank loss grows by {share(growth, study.look)}"
    if len(growth) < 2:
        return _not_asked(large, "near-rank loss of the last hidden layer was not measured")
    if study.look.is_above(array_of(lost)) and study.look.is_below(array_of(growth), NEAR_RANK_MARGIN):
        verdict = Verdict(
            "does not grow", max(study.look.p(array_of(lost)), study.look.p(array_of(growth), NEAR_RANK_MARGIN)), ""
        )
        return verdict, f"{facts}, which is no growth that counts: what does not grow is not the cause."
    if not study.look.is_above(array_of(lost)):
        return _not_asked(large, "it does not surely lose", facts)
    trial = _trial(study, large)
    if isinstance(trial, str):
        return _not_asked(large, trial, facts)
    for arm in trial.arms:
        if reason := _trained_otherwise(study, arm, lost):
            return _not_asked(large, reason, facts)
    seeds = sorted(
        set.intersection(*({*study.scores(arm)} & {*study.near_rank_losses(arm)} for arm in (base, *trial.arms)))
    )
    if len(seeds) < 2 or len(seeds) < len(study.training[base.name].seeds):
        return _not_asked(large, "not all of its arms have all seeds", facts)
    scores, ranks = (_arms(study, trial, seeds, of) for of in (study.scores, study.near_rank_losses))
    verdict = judge_arms(scores, ranks, study.look)
    return verdict, f"{facts}. {_numbers(study, scores, ranks, seeds)} {large.name}: {verdict.finding}" + (
        f" ({verdict.reason})." if verdict.reason else "."
    )


def _trained_otherwise(study: JudgedStudy, arm: Arm, lost: Outcomes) -> str:
    """Why an arm did not train as well as the baseline, by the margin of what is lost; empty if it did."""
    training = study.training[arm.name]
    margin = training_margin(study.margin, fmean(lost.values()))
    if training.num_failed or not training.difference:
        return f"training of {arm.name}: {training}"
    if not is_equivalent(array_of(training.difference), margin):
        return f"training of {arm.name} differs by {study.described(training.difference)}{study.unit}"
    return ""


def _not_asked(large: Arm, reason: str, facts: str = "") -> tuple[Verdict, str]:
    return Verdict("not asked", 1.0, reason), f"{facts or large.name}: not asked ({reason})."


def _trial(study: JudgedStudy, large: Arm) -> _Trial | str:
    """The interventions at the baseline's batch and at that of `large`, or what is missing."""
    at_small = [each for each in study.roles.interventions if each.natural.name == study.base.name]
    at_large = [each for each in study.roles.interventions if each.natural.name == large.name]
    if not at_large:
        return "no arm changes its rank"
    lowered = next((each for each in at_small if each.kind == "lower"), None)
    if lowered is None:
        return f"no arm lowers the rank of {study.base.name}"
    lowered_placebo = _placebo(at_small, lowered)
    if lowered_placebo is None:
        return f"{lowered.arm.name} has no placebo with the same layers and images"
    routes = []
    for raised in (each for each in at_large if each.kind == "raise"):
        small = next((each for each in at_small if _is_partner(each, raised)), None)
        if small is None:
            return f"no arm of {study.base.name} has the penalty of {raised.arm.name}, with its strength and images"
        placebos = _placebo(at_large, raised), _placebo(at_small, raised)
        if placebos[0] is None or placebos[1] is None:
            return f"{raised.arm.name} needs a placebo with the same layers and images at both batches"
        routes.append((raised, small, *placebos))
    if not routes:
        return f"no arm raises the rank of {large.name}"
    if any(each[0].machinery != lowered.machinery for each in routes):
        return f"{lowered.arm.name} and {routes[0][0].arm.name} have other layers or images"
    return _Trial(large, lowered, lowered_placebo, routes)


def _is_partner(one: Intervention, other: Intervention) -> bool:
    same = (one.kind, one.measure, one.machinery) == (other.kind, other.measure, other.machinery)
    return same and one.strength == other.strength


def _placebo(among: Sequence[Intervention], of: Intervention) -> Intervention | None:
    """The placebo of a penalty; else the one of the largest strength, whose layers and images must be the same."""
    placebos = [each for each in among if each.kind == "placebo" and each.machinery == of.machinery]
    own = [each for each in placebos if (each.measure, each.strength) == (of.measure, of.strength)]
    return own[0] if own else max(placebos, key=lambda each: each.strength, default=None)


def _arms(study: JudgedStudy, trial: _Trial, seeds: Sequence[int], of: Callable[[Arm], Mapping[int, float]]) -> Arms:
    def column(each: Arm | Intervention) -> np.ndarray:
        values = of(each if isinstance(each, Arm) else each.arm)
        return np.array([values[seed] for seed in seeds])

    return Arms(
        column(study.base),
        column(trial.large),
        column(trial.lowered),
        column(trial.lowered_placebo),
        [Route(route[0].arm.name, *map(column, route)) for route in trial.routes],
    )


def _numbers(study: JudgedStudy, scores: Arms, ranks: Arms, seeds: Sequence[int]) -> str:
    """Gain of each route with the share of the loss that goes through the rank, and the cost of lowering it."""
    look, lost, growth = study.look, scores.small - scores.large, ranks.large - ranks.small
    out = []
    for at, route in enumerate(scores.routes):
        gain, _ = gain_of(scores, ranks, at)
        fall = _fall(ranks.routes[at])
        through = _share_text(gain, lost, float(fall.mean() / growth.mean()), look)
        out.append(
            f"{route.name} lowers near-rank loss by {share(_by(seeds, fall), look)} and gives back "
            f"{study.described(_by(seeds, gain))}{through}"
        )
    cost = scores.small_placebo - scores.small_lowered
    rise = ranks.small_lowered - ranks.small_placebo
    out.append(
        f"lowering the rank of {study.base.name} by {share(_by(seeds, rise), look)} costs "
        f"{study.described(_by(seeds, cost))}"
    )
    return "; ".join(out) + "."


def _share_text(gain: np.ndarray, lost: np.ndarray, k: float, look: Look) -> str:
    if k <= 0:
        return ""
    intervals = share_interval(gain, lost, k, look.critical(len(gain)))
    if not intervals:
        return ""
    ((low, high),) = intervals
    return f", a share of {fmean(gain) / (k * fmean(lost)):.0%} [{low:.0%}, {high:.0%}] of the loss"


def _by(seeds: Sequence[int], values: np.ndarray) -> dict[int, float]:
    return dict(zip(seeds, map(float, values), strict=True))
