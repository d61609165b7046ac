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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm, Intervention
from gengap_dist.analysis.results import Claim, Outcome
from gengap_dist.analysis.rules.gap import new_images
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN, JudgedStudy, Outcomes, share
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.analysis.rules.training import training_margin
from gengap_dist.statistics.equivalence import is_equivalent
from gengap_dist.statistics.paired import are_equal, holm
from gengap_dist.statistics.share import share as share_of_loss
from gengap_dist.statistics.share import share_interval
from gengap_dist.statistics.two_way import two_way

SAME_RANK = 0.15  # of the growth: routes that reach the same near-rank loss
QUARTER, HALF = 0.25, 0.5
MIN_ROUTES = 2

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
    measure: str
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

    @property
    def rise(self) -> np.ndarray:
        """What the large batch has more than the small one, without penalties: growth of R, minus the loss of A."""
        return self.large - self.small


class Verdict(NamedTuple):
    """What an intervention at one large batch found."""

    finding: Finding
    p: float
    """Two-sided p of the tests that decided, the largest of them; 1 if nothing did."""
    reason: str
    """The condition that failed; empty if none did."""
    loses: bool = True
    """Whether the large batch surely loses."""


def judge_arms(scores: Arms, near_rank_losses: Arms, look: Look) -> Verdict:
    """The verdict from arms that all trained as well as the baseline.

    Args:
        scores: A, test scores.
        near_rank_losses: R of the same arms and seeds.
        look: how sure differences must be.
    """
    lost, growth = -scores.rise, near_rank_losses.rise
    if are_equal(lost) or not look.is_above(lost):
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
    lost, growth = -scores.rise, near_rank_losses.rise
    gain = route.large_raised - route.large_placebo - (route.small_raised - route.small_placebo)
    return gain, gain - _fall(ranks).mean() / growth.mean() * lost / 2


def cost_of(scores: Arms, near_rank_losses: Arms) -> tuple[np.ndarray, np.ndarray]:
    """Of lowering the rank: cost [n], and lowering [n]."""
    lost, growth = -scores.rise, near_rank_losses.rise
    cost = scores.small_placebo - scores.small_lowered
    rise = near_rank_losses.small_lowered - near_rank_losses.small_placebo
    return cost, cost - rise.mean() / growth.mean() * lost / 2


def _fall(route: Route) -> np.ndarray:
    return route.large_placebo - route.large_raised - (route.small_placebo - route.small_raised)


def _failed_condition(scores: Arms, near_rank_losses: Arms, look: Look) -> str:
    """The first condition that is not surely true; empty if all are."""
    lost, growth = -scores.rise, near_rank_losses.rise
    rise = near_rank_losses.small_lowered - near_rank_losses.small_placebo
    if not look.is_above(growth, NEAR_RANK_MARGIN):
        return f"near-rank loss does not surely grow by more than {NEAR_RANK_MARGIN}"
    if len({route.measure for route in scores.routes}) < MIN_ROUTES:
        return "only one way to raise the rank was tried: a second one, spread or trace beside logdet, is needed"
    for score, ranks in zip(scores.routes, near_rank_losses.routes, strict=True):
        if not look.is_above(_fall(ranks) - HALF * growth):
            return f"{score.name} does not surely take back half of the growth"
        moved = ranks.large_placebo - near_rank_losses.large, ranks.small_placebo - near_rank_losses.small
        if not all(look.is_within(each, QUARTER * growth) for each in moved):
            return f"the placebo of {score.name} may move near-rank loss by a quarter of the growth"
        if not look.is_within(score.small_raised - score.small_placebo, HALF * lost):
            return f"at the small batch {score.name} and its placebo may differ by half of the loss"
        if not look.is_within(score.small_placebo - scores.small_placebo, HALF * lost):
            return f"the placebos of {score.name} and of lowering the rank may differ by half of the loss"
    if not look.is_within(near_rank_losses.small_placebo - near_rank_losses.small, QUARTER * growth):
        return "the placebo of lowering the rank may move near-rank loss by a quarter of the growth"
    if not look.is_above(rise - HALF * growth):
        return "lowering the rank does not surely reach half of the growth"
    return ""


def _disagree(scores: Arms, near_rank_losses: Arms, look: Look) -> float:
    """P of two routes that reach the same near-rank loss and surely other scores; 0 if there are none."""
    lost, growth = -scores.rise, near_rank_losses.rise
    pairs = [*combinations(zip(scores.routes, near_rank_losses.routes, strict=True), 2)]
    ps = []
    for (first, ranks), (second, other) in pairs:
        apart = first.large_raised - second.large_raised
        same = abs(float((ranks.large_raised - other.large_raised).mean())) <= SAME_RANK * growth.mean()
        ps += [
            len(pairs) * look.p(sign * apart - QUARTER * lost)  # Bonferroni over the pairs
            for sign in (1, -1)
            if same and look.is_above(sign * apart - QUARTER * lost)
        ]
    return min((p for p in ps if p < look.level), default=0.0)


# -- the claim --------------------------------------------------------------------------------------------------------


_Pairs = tuple[Intervention, Intervention, Intervention, Intervention]
"""Large raised, small raised, and the placebos of both."""


class _Trial(NamedTuple):
    """The arms of an intervention at one large batch."""

    large: Arm
    lowered: Intervention
    lowered_placebo: Intervention
    routes: list[_Pairs]
    lowered_large: Intervention | None
    """The arm that lowers the rank of the large batch, if there is one."""

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
    judged = [_at_batch(study, large) for large in study.roles.plain]
    verdicts = [verdict for verdict, _ in judged]
    evidence = " ".join(text for _, text in judged) or "No arm differs from the baseline only in its batch."
    corrected = holm([verdict.p for verdict in verdicts])
    findings: list[Finding] = [
        verdict.finding if verdict.p == 1.0 or (p is not None and p < study.look.level) else "undecided"
        for verdict, p in zip(verdicts, corrected, strict=True)
    ]
    decided: set[Finding] = {each for each in findings if each not in ("undecided", "not asked")}
    # a batch that surely loses nothing has no cause to find; any other one that is not decided leaves the claim open
    is_open = any(
        each in ("undecided", "not asked") and verdict.loses for each, verdict in zip(findings, verdicts, strict=True)
    )
    outcomes: set[Outcome] = {OUTCOMES.get(each, "undecided") for each in decided}
    outcome: Outcome = outcomes.pop() if len(outcomes) == 1 and not is_open else "undecided"
    finding = " / ".join(sorted(decided)) or ("not asked" if set(findings) <= {"not asked"} else "")
    return Claim("explains", claim, outcome, evidence, control, "" if decided and is_open else finding)


def _at_batch(study: JudgedStudy, large: Arm) -> tuple[Verdict, str]:
    base, look = study.base, study.look
    lost, growth = study.lost(large, base), study.growth(large, base)
    if len(lost) < 2:
        return _not_asked(large, f"fewer than two pairs trained: {study.training[large.name]}")
    loses = not are_equal(array_of(lost)) and look.is_above(array_of(lost))
    mean = fmean(lost.values())
    facts = f"{large.name} {study.loses(mean)} {study.described(lost, turned=mean < 0)}{study.unit}"
    if growth:
        facts += f", its near-rank loss grows by {share(growth, look)}"
    if reason := _trained_otherwise(study, large, lost):
        return _not_asked(large, reason, facts, loses=loses)
    if not loses:
        return _not_asked(large, "it does not surely lose", facts)
    if study.missing((large, base), (lost,)) or study.missing((large, base), (growth,)):
        return _not_asked(
            large, "not all pairs have a result and near-rank loss of the last hidden layer", facts, loses=True
        )
    if look.is_below(array_of(growth), NEAR_RANK_MARGIN):
        p = max(look.p(array_of(lost)), look.p(array_of(growth), NEAR_RANK_MARGIN))
        return Verdict("does not grow", p, "", loses=True), f"{facts}: that does not grow, and so is not the cause."
    trial = _trial(study, large)
    if isinstance(trial, str):
        return _not_asked(large, trial, facts, loses=True)
    for arm in trial.arms:
        if reason := _trained_otherwise(study, arm, lost):
            return _not_asked(large, reason, facts, loses=True)
    groups = [of(arm) for arm in (base, *trial.arms) for of in (study.scores, study.near_rank_losses)]
    if study.missing((base, *trial.arms), groups):
        return _not_asked(large, "not all of its arms have all seeds", facts, loses=True)
    seeds = sorted(lost)
    scores, ranks = (_arms(trial, seeds, base, of) for of in (study.scores, study.near_rank_losses))
    verdict = judge_arms(scores, ranks, look)._replace(loses=True)
    text = f"{facts}. {_numbers(study, trial, scores, ranks, seeds)} {large.name}: {verdict.finding}"
    return verdict, text + (f" ({verdict.reason})." if verdict.reason else ".")


def _trained_otherwise(study: JudgedStudy, arm: Arm, lost: Outcomes) -> str:
    """Why an arm did not train as well as the baseline, by the margin of what is lost; empty if it did."""
    training = study.training[arm.name]
    margin = training_margin(study.margin, fmean(lost.values()), is_share=study.metric.unit == "share")
    if training.num_failed or training.num_unknown or not training.difference:
        return f"training of {arm.name}: {training}"
    if not is_equivalent(array_of(training.difference), margin):
        return f"training of {arm.name} differs by {study.described(training.difference)}{study.unit}"
    return ""


def _not_asked(large: Arm, reason: str, facts: str = "", *, loses: bool = False) -> tuple[Verdict, str]:
    return Verdict("not asked", 1.0, reason, loses), f"{facts or large.name}: not asked ({reason})."


def _trial(study: JudgedStudy, large: Arm) -> _Trial | str:
    """The interventions at the baseline's batch and at that of `large`, or what is missing."""
    at_small = [each for each in study.roles.interventions if each.natural.name == study.base.name]
    at_large = [each for each in study.roles.interventions if each.natural.name == large.name]
    if not at_large:
        return "no arm changes its rank"
    lowered = next((each for each in at_small if each.kind == "lower"), None)
    if lowered is None:
        return f"no arm lowers the rank of {study.base.name}"
    lowered_placebo = next(_placebos(at_small, lowered), None)
    if lowered_placebo is None:
        return f"{lowered.arm.name} has no placebo with the same layers and images, and at least its strength"
    raised = [each for each in at_large if each.kind == "raise"]
    if not raised:
        return f"no arm raises the rank of {large.name}"
    routes: dict[str, _Pairs] = {}
    problem = ""
    for each in raised:
        route = _route(study, each, at_small, at_large)
        if isinstance(route, str):
            problem = problem or route
        elif each.machinery != lowered.machinery:
            problem = problem or f"{lowered.arm.name} and {each.arm.name} have other layers or images"
        elif each.measure not in routes or _distance(study, each) < _distance(study, routes[each.measure][0]):
            routes[each.measure] = route  # of several strengths that which comes nearest to the baseline's rank
    if len(routes) < MIN_ROUTES and problem:
        return problem
    lowered_large = next((each for each in at_large if _is_partner(each, lowered)), None)
    return _Trial(large, lowered, lowered_placebo, [*routes.values()], lowered_large)


def _route(
    study: JudgedStudy, raised: Intervention, at_small: Sequence[Intervention], at_large: Sequence[Intervention]
) -> _Pairs | str:
    """An arm that raises the rank, its partner at the baseline's batch, and a placebo of both; or what is missing."""
    small = next((each for each in at_small if _is_partner(each, raised)), None)
    if small is None:
        return f"no arm of {study.base.name} has the penalty of {raised.arm.name}, with its strength and images"
    for placebo in _placebos(at_large, raised):
        partner = next((each for each in at_small if _is_partner(each, placebo)), None)
        if partner:
            return raised, small, placebo, partner
    return (
        f"{raised.arm.name} has no placebo with the same layers and images, and at least its strength, at both batches"
    )


def _distance(study: JudgedStudy, raised: Intervention) -> float:
    """Distance of an arm's near-rank loss from that of the baseline; infinity if it is not known."""
    values = study.growth(raised.arm, study.base).values()
    return abs(fmean(values)) if values else math.inf


def _is_partner(one: Intervention, other: Intervention) -> bool:
    same = (one.kind, one.measure, one.machinery) == (other.kind, other.measure, other.machinery)
    return same and one.strength == other.strength


def _placebos(among: Sequence[Intervention], of: Intervention) -> Iterator[Intervention]:
    """The placebo of a penalty first; then those of others, if they are at least as strong, the strongest first."""
    same = [each for each in among if each.kind == "placebo" and each.machinery == of.machinery]
    yield from (each for each in same if (each.measure, each.strength) == (of.measure, of.strength))
    others = [each for each in same if each.strength >= of.strength]
    yield from sorted(others, key=lambda each: -each.strength)


def _arms(trial: _Trial, seeds: Sequence[int], base: Arm, of: Callable[[Arm], Mapping[int, Any]]) -> Arms:
    def column(each: Arm | Intervention) -> np.ndarray:
        values = of(each if isinstance(each, Arm) else each.arm)
        return np.array([values[seed] for seed in seeds])

    return Arms(
        column(base),
        column(trial.large),
        column(trial.lowered),
        column(trial.lowered_placebo),
        [Route(route[0].arm.name, route[0].measure, *map(column, route)) for route in trial.routes],
    )


def _numbers(study: JudgedStudy, trial: _Trial, scores: Arms, ranks: Arms, seeds: Sequence[int]) -> str:
    """What each route gives back, what lowering the rank costs, and the quantities that decide, as sentences."""
    look, lost, growth = study.look, -scores.rise, ranks.rise
    images = _correctness(study, trial, seeds)
    out = []
    for at, (route, arms) in enumerate(zip(scores.routes, trial.routes, strict=True)):
        gain, raising = gain_of(scores, ranks, at)
        fall = _fall(ranks.routes[at])
        new = gain_of(images, ranks, at)[1] if images else None
        reached = float(ranks.routes[at].large_raised.mean())
        out.append(
            f"Raised by {route.name} ({route.measure}, placebo {arms[2].arm.name}): near-rank loss falls by "
            f"{share(_by(seeds, fall), look)}, to {reached:.3f} (baseline: {ranks.small.mean():.3f}), and "
            f"{study.described(_by(seeds, gain))} is given back{_share_text(gain, lost, fall, growth, look)}; raising "
            f"{_on_new_images(study, seeds, raising, new)}."
        )
    cost, lowering = cost_of(scores, ranks)
    new = cost_of(images, ranks)[1] if images else None
    rise = ranks.small_lowered - ranks.small_placebo
    out.append(
        f"Lowered by {trial.lowered.arm.name} (placebo {trial.lowered_placebo.arm.name}): near-rank loss rises by "
        f"{share(_by(seeds, rise), look)}, which costs {study.described(_by(seeds, cost))}; lowering "
        f"{_on_new_images(study, seeds, lowering, new)}."
    )
    if trial.lowered_large and (change := study.lost(trial.lowered_large.arm, trial.large)):
        out.append(f"As a check of the sign, {trial.lowered_large.arm.name} costs {study.described(change)}.")
    return " ".join(out)


def _on_new_images(study: JudgedStudy, seeds: Sequence[int], values: np.ndarray, images: np.ndarray | None) -> str:
    """A quantity with its interval over seeds, and that for new images [n, M] beside it."""
    text = study.described(_by(seeds, values))
    if images is None:
        return text
    interval, _ = new_images(two_way(images), study.look, len(images), images.shape[1], 0.0)
    if interval is None:
        return text
    return f"{text}, on new images [{study.show(interval[0])}, {study.show(interval[1])}]"


def _correctness(study: JudgedStudy, trial: _Trial, seeds: Sequence[int]) -> Arms | None:
    """The correctness of each test image in all arms, each [n, M]; None if a run has none."""

    def of(arm: Arm) -> dict[int, np.ndarray]:
        runs = study.trained(arm).runs
        return {seed: run.test_correct.astype(float) for seed, run in runs.items() if run.test_correct is not None}

    every = [of(arm) for arm in (study.base, *trial.arms)]
    sizes = {len(values[seed]) if seed in values else 0 for values in every for seed in seeds}
    return _arms(trial, seeds, study.base, of) if len(sizes) == 1 and min(sizes) > 1 else None


def _share_text(gain: np.ndarray, lost: np.ndarray, fall: np.ndarray, growth: np.ndarray, look: Look) -> str:
    """The share of the loss that goes through the rank, where near-rank loss surely grows and falls."""
    if not (look.is_above(growth, NEAR_RANK_MARGIN) and look.is_above(fall - HALF * growth)):
        return ""
    k = float(fall.mean() / growth.mean())
    intervals = share_interval(gain, lost, k, look.critical(len(gain)))
    if not intervals:
        return ""
    ((low, high),) = intervals
    return f", a share of {share_of_loss(gain, lost, k):.0%} [{low:.0%}, {high:.0%}] of the loss"


def _by(seeds: Sequence[int], values: np.ndarray) -> dict[int, float]:
    return dict(zip(seeds, map(float, values), strict=True))
