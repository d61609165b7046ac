"""Claim 3, near-rank loss causes the loss of large batches: finds the arms of interventions, and says what they show.

The rule itself is in `intervention.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from gengap_dist.analysis.arm_roles import Arm, Intervention
from gengap_dist.analysis.results import Claim, Estimate, InterventionResult, Outcome, Requirement
from gengap_dist.analysis.rules.gap import new_images
from gengap_dist.analysis.rules.intervention import (
    HALF,
    MIN_ROUTES,
    ONE_ROUTE,
    Arms,
    Finding,
    Route,
    Verdict,
    conditions,
    cost_of,
    fall_of,
    gain_of,
    judge_arms,
    lowering_of,
    raising_of,
    rise_of,
    surely_grows,
)
from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN, JudgedStudy, Outcomes, share
from gengap_dist.analysis.rules.look import Look, array_of
from gengap_dist.analysis.rules.training import training_margin
from gengap_dist.statistics.equivalence import equivalence_interval, is_equivalent
from gengap_dist.statistics.paired import Interval, are_equal, holm
from gengap_dist.statistics.share import share as share_of_loss
from gengap_dist.statistics.share import share_interval
from gengap_dist.statistics.two_way import two_way

AS_STRONG = "with the same layers and images, and at least its strength and gradient norm"
OUTCOMES: dict[Finding, Outcome] = {
    "does not grow": "contradicted",
    "explains most": "supported",
    "explains less than half": "contradicted",
}

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


class _Experiment(NamedTuple):
    """A trial and its numbers, over the seeds of which all arms have a result."""

    trial: _Trial
    seeds: list[int]
    scores: Arms
    near_rank_losses: Arms
    images: Arms | None
    """Correctness of each test image, each [n, M]; None if a run has none."""


def judge_explanation(study: JudgedStudy) -> tuple[Claim, list[InterventionResult]]:
    """Claim 3: near-rank loss causes the loss of large batches; and the numbers of each intervention."""
    name = study.metric.name
    harm = f"{name} loss" if study.metric.higher_is_better else f"added {name}"
    claim = f"Near-rank loss causes the {harm} of large batches."
    control = (
        "Arms whose rank is raised and lowered, each against a placebo of the same gradient norm that leaves the rank "
        "as it is, at both batches; and a second way to raise the rank."
    )
    experiments = [_experiment(study, large) for large in study.roles.plain]
    judged = [_at_batch(study, *each) for each in zip(study.roles.plain, experiments, strict=True)]
    verdicts = [verdict for verdict, _ in judged]
    evidence = " ".join(text for _, text in judged) or "No arm differs from the baseline only in its batch."
    corrected = holm([verdict.p for verdict in verdicts])
    findings: list[Finding] = [
        verdict.finding if verdict.p == 1.0 or (p is not None and p < study.look.level) else "undecided"
        for verdict, p in zip(verdicts, corrected, strict=True)
    ]
    decided: set[Finding] = {each for each in findings if each not in ("undecided", "not asked")}
    # a batch that surely loses less than the margin has no cause to find; any other leaves the claim open
    is_open = any(
        each in ("undecided", "not asked") and verdict.may_lose
        for each, verdict in zip(findings, verdicts, strict=True)
    )
    outcomes: set[Outcome] = {OUTCOMES.get(each, "undecided") for each in decided}
    outcome: Outcome = outcomes.pop() if len(outcomes) == 1 and not is_open else "undecided"
    finding = " / ".join(sorted(decided)) or ("not asked" if set(findings) <= {"not asked"} else "")
    results = [
        _result(study, each, finding_of_it, verdict.reason)
        for each, finding_of_it, verdict in zip(experiments, findings, verdicts, strict=True)
        if isinstance(each, _Experiment) and len(each.seeds) > 1
    ]
    return Claim("explains", claim, outcome, evidence, control, "" if decided and is_open else finding), results


def missing_for_explanation(study: JudgedStudy, large: Arm) -> str:
    """What a study lacks to judge the claim at a large batch, by its arms alone; empty if there is nothing."""
    trial = _trial(study, large)
    if isinstance(trial, str):
        return trial
    return "" if len(trial.routes) >= MIN_ROUTES else ONE_ROUTE


def _experiment(study: JudgedStudy, large: Arm) -> _Experiment | str:
    """The intervention at a large batch, or what it lacks."""
    trial = _trial(study, large)
    if isinstance(trial, str):
        return trial
    every = (study.base, *trial.arms)
    seeds = sorted(set.intersection(*({*study.scores(arm)} & {*study.near_rank_losses(arm)} for arm in every)))
    scores, ranks = (_arms(trial, seeds, study.base, of) for of in (study.scores, study.near_rank_losses))
    return _Experiment(trial, seeds, scores, ranks, _correctness(study, trial, seeds))


def _at_batch(study: JudgedStudy, large: Arm, experiment: _Experiment | str) -> tuple[Verdict, str]:
    base, look = study.base, study.look
    lost, growth = study.lost(large, base), study.growth(large, base)
    if len(lost) < 2:
        return _not_asked(large, f"fewer than two pairs trained: {study.training[large.name]}")
    loses = not are_equal(array_of(lost)) and look.is_above(array_of(lost))
    mean = fmean(lost.values())
    facts = f"{large.name} {study.loses(mean)} {study.described(lost, turned=mean < 0)}{study.unit}"
    if growth:
        facts += f", its near-rank loss grows by {share(growth, look)}"
    may_lose = not look.is_below(array_of(lost), study.margin)
    if reason := _trained_otherwise(study, large, lost):
        return _not_asked(large, reason, facts, may_lose=may_lose)
    if not loses:
        return _not_asked(large, "it does not surely lose", facts, may_lose=may_lose)
    if study.missing((large, base), (lost,)) or study.missing((large, base), (growth,)):
        return _not_asked(large, "not all pairs have a result and near-rank loss of the last hidden layer", facts)
    penalized = [each.arm for each in study.roles.interventions if each.natural.name in (base.name, large.name)]
    if not any(loss for arm in (large, base, *penalized) for loss in study.near_rank_losses(arm).values()):
        return _not_asked(large, "near-rank loss is 0 in all runs of both batches: its measure counts nothing", facts)
    if look.is_below(array_of(growth), NEAR_RANK_MARGIN):
        p = max(look.p(array_of(lost)), look.p(array_of(growth), NEAR_RANK_MARGIN))
        return Verdict("does not grow", p, ""), f"{facts}: that does not grow, and so is not the cause."
    if isinstance(experiment, str):
        return _not_asked(large, experiment, facts)
    for arm in experiment.trial.arms:
        if reason := _trained_otherwise(study, arm, lost):
            return _not_asked(large, reason, facts)
    every = (base, *experiment.trial.arms)
    if study.missing(every, [of(arm) for arm in every for of in (study.scores, study.near_rank_losses)]):
        return _not_asked(large, "not all of its arms have all seeds", facts)
    verdict = judge_arms(experiment.scores, experiment.near_rank_losses, look)
    text = f"{facts}. {_numbers(study, experiment)} {large.name}: {verdict.finding}"
    return verdict, text + (f" ({verdict.reason})." if verdict.reason else ".")


def _trained_otherwise(study: JudgedStudy, arm: Arm, lost: Outcomes) -> str:
    """Why an arm did not train as well as the baseline, by the margin of what is lost; empty if it did."""
    training = study.training[arm.name]
    if training.num_failed or training.num_unknown or not training.difference:
        return f"training of {arm.name}: {training}"
    if not is_equivalent(array_of(training.difference), _training_margin(study, lost)):
        return f"training of {arm.name} differs by {study.described(training.difference)}{study.unit}"
    return ""


def _training_margin(study: JudgedStudy, lost: Outcomes) -> float:
    """Largest difference of training scores that is "as well", where this is lost on test samples."""
    return training_margin(study.margin, fmean(lost.values()), is_share=study.metric.unit == "share")


def _not_asked(large: Arm, reason: str, facts: str = "", *, may_lose: bool = True) -> tuple[Verdict, str]:
    return Verdict("not asked", 1.0, reason, may_lose), f"{facts or large.name}: not asked ({reason})."


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
        return f"{lowered.arm.name} has no placebo {AS_STRONG}"
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
        if partner and _is_as_strong(partner, small):
            return raised, small, placebo, partner
    return f"{raised.arm.name} has no placebo {AS_STRONG}, at both batches"


def _distance(study: JudgedStudy, raised: Intervention) -> float:
    """Distance of an arm's near-rank loss from that of the baseline; infinity if it is not known."""
    values = study.growth(raised.arm, study.base).values()
    return abs(fmean(values)) if values else math.inf


def _is_partner(one: Intervention, other: Intervention) -> bool:
    same = (one.kind, one.measure, one.machinery) == (other.kind, other.measure, other.machinery)
    return same and one.strength == other.strength


def _placebos(among: Sequence[Intervention], of: Intervention) -> Iterator[Intervention]:
    """The placebo of a penalty first; then those of others, if they are as strong, the strongest first."""
    same = [each for each in among if each.kind == "placebo" and each.machinery == of.machinery]
    own = [each for each in same if _is_own(each, of)]
    yield from own
    others = [each for each in same if each not in own and _is_as_strong(each, of)]
    yield from sorted(others, key=lambda each: -each.strength)


def _is_own(placebo: Intervention, of: Intervention) -> bool:
    return (placebo.measure, placebo.strength) == (of.measure, of.strength)


def _is_as_strong(placebo: Intervention, of: Intervention) -> bool:
    """Whether a placebo adds gradients at least as long; by strengths alone, if the lengths were not recorded."""
    norms = [_penalty_norm(each) for each in (placebo, of)]
    if _is_own(placebo, of) or None in norms:
        return placebo.strength >= of.strength
    return float(norms[0] or 0.0) >= float(norms[1] or 0.0)


def _penalty_norm(each: Intervention) -> float | None:
    """Mean norm of the gradient that an intervention adds; None if a run has not recorded it."""
    norms = [run.penalty_norm for run in each.arm.runs.values()]
    return fmean(norm or 0.0 for norm in norms) if norms and None not in norms else None


def _arms(trial: _Trial, seeds: Sequence[int], base: Arm, of: Callable[[Arm], Mapping[int, Any]]) -> Arms:
    def column(each: Arm | Intervention) -> np.ndarray:
        values = of(each if isinstance(each, Arm) else each.arm)
        return np.array([values[seed] for seed in seeds])

    return Arms(
        column(base),
        column(trial.large),
        column(trial.lowered),
        column(trial.lowered_placebo),
        [
            Route(large.arm.name, large.measure, *map(column, route), others=(others[0], others[1], others[2]))
            for route in trial.routes
            for large, others in [(route[0], [each.arm.name for each in route[1:]])]
        ],
    )


def _result(study: JudgedStudy, experiment: _Experiment, finding: Finding, reason: str) -> InterventionResult:
    """The numbers of the intervention at a large batch, which has at least two complete seeds."""
    trial, seeds, scores, ranks, images = experiment

    def of_scores(quantity: str, quantity_of: Callable[[Arms], np.ndarray]) -> Estimate:
        new = _new_images(study, quantity_of(images)) if images else None
        return _estimate(quantity, quantity_of(scores), study.look, new_images=new, is_score=True)

    def of_ranks(quantity: str, values: np.ndarray) -> Estimate:
        return _estimate(quantity, values, study.look)

    grows = surely_grows(ranks.rise, study.look)
    estimates = [of_scores("lost", lambda each: -each.rise), of_ranks("growth", ranks.rise)]
    for at, route in enumerate(scores.routes):
        estimates += [
            of_ranks(f"fall by {route.name}", fall_of(ranks.routes[at])),
            of_scores(f"gain by {route.name}", lambda each, at=at: gain_of(each, at)),
            *(
                [of_scores(f"raising by {route.name}", lambda each, at=at: raising_of(each, ranks, at))]
                if grows
                else []
            ),
        ]
    lowered = trial.lowered.arm.name
    estimates += [
        of_ranks(f"rise by {lowered}", rise_of(ranks)),
        of_scores(f"cost of {lowered}", cost_of),
        *([of_scores(f"lowering by {lowered}", lambda each: lowering_of(each, ranks))] if grows else []),
    ]
    for first, second in combinations(range(len(scores.routes)), 2):
        names = f"{scores.routes[second].name} minus {scores.routes[first].name}"

        def apart(each: Arms, first: int = first, second: int = second) -> np.ndarray:
            return each.routes[second].large_raised - each.routes[first].large_raised

        estimates += [of_scores(names, apart), of_ranks(f"near-rank loss, {names}", apart(ranks))]
    trained = [_trained_requirement(study, arm, study.lost(trial.large, study.base)) for arm in trial.arms]
    return InterventionResult(
        trial.large.name,
        len(seeds),
        finding,
        reason,
        study.look.level,
        estimates,
        [
            *(each for each in trained if each is not None),
            Requirement(estimates[0], 0.0, is_within=False, holds=study.look.is_above(-scores.rise)),
            *(
                Requirement(
                    _estimate(each.quantity, each.values, study.look, is_score=each.is_score),
                    float(np.mean(each.limit)),
                    each.is_within,
                    each.holds(study.look),
                )
                for each in conditions(scores, ranks)
                if np.any(each.values)  # else an arm is compared with itself
            ),
        ],
    )


def _estimate(
    quantity: str,
    values: np.ndarray,
    look: Look,
    *,
    new_images: Interval | None = None,
    is_score: bool = False,
) -> Estimate:
    return Estimate(quantity, float(values.mean()), look.interval(values), new_images, is_score)


def _trained_requirement(study: JudgedStudy, arm: Arm, lost: Outcomes) -> Requirement | None:
    """Whether an arm trained as well as the baseline; None without scores on training samples."""
    values = study.training[arm.name].difference
    if not values:
        return None
    quantity = f"{arm.name} against {study.base.name} on training samples"
    estimate = Estimate(quantity, fmean(values.values()), equivalence_interval(array_of(values)), None, is_score=True)
    holds = not _trained_otherwise(study, arm, lost)
    return Requirement(estimate, _training_margin(study, lost), is_within=True, holds=holds)


def _new_images(study: JudgedStudy, images: np.ndarray) -> Interval | None:
    """The interval of the mean of differences [n, M] on new test images."""
    return new_images(two_way(images), study.look, len(images), images.shape[1], 0.0)[0]


def _numbers(study: JudgedStudy, experiment: _Experiment) -> str:
    """What each route gives back, what lowering the rank costs, and the quantities that decide, as sentences."""
    trial, seeds, scores, ranks, images = experiment
    look, lost, growth = study.look, -scores.rise, ranks.rise

    def both(quantity_of: Callable[[Arms], np.ndarray]) -> str:
        return _on_new_images(study, seeds, quantity_of(scores), quantity_of(images) if images else None)

    out, grows = [], surely_grows(growth, look)
    for at, (route, arms) in enumerate(zip(scores.routes, trial.routes, strict=True)):
        gain, fall = gain_of(scores, at), fall_of(ranks.routes[at])
        reached = float(ranks.routes[at].large_raised.mean())
        out.append(
            f"Raised by {route.name} ({route.measure}, placebo {arms[2].arm.name}): near-rank loss falls by "
            f"{share(_by(seeds, fall), look)}, to {reached:.3f} (baseline: {ranks.small.mean():.3f}), and "
            f"{study.described(_by(seeds, gain))} is given back{_share_text(gain, lost, fall, growth, look)}"
            f"{f'; raising {both(partial(raising_of, near_rank_losses=ranks, at=at))}' if grows else ''}."
        )
    cost, rise = cost_of(scores), rise_of(ranks)
    out.append(
        f"Lowered by {trial.lowered.arm.name} (placebo {trial.lowered_placebo.arm.name}): near-rank loss rises by "
        f"{share(_by(seeds, rise), look)}, which costs {study.described(_by(seeds, cost))}"
        f"{f'; lowering {both(partial(lowering_of, near_rank_losses=ranks))}' if grows else ''}."
    )
    if trial.lowered_large and (change := study.lost(trial.lowered_large.arm, trial.large)):
        out.append(f"As a check of the sign, {trial.lowered_large.arm.name} costs {study.described(change)}.")
    return " ".join(out)


def _on_new_images(study: JudgedStudy, seeds: Sequence[int], values: np.ndarray, images: np.ndarray | None) -> str:
    """A quantity with its interval over seeds, and that for new images [n, M] beside it."""
    text = study.described(_by(seeds, values))
    if images is None:
        return text
    interval = _new_images(study, images)
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
    if not (surely_grows(growth, look) and look.is_above(fall - HALF * growth)):
        return ""
    k = float(fall.mean() / growth.mean())
    intervals = share_interval(gain, lost, k, look.critical(len(gain)))
    if not intervals:
        return ""
    ((low, high),) = intervals
    return f", a share of {share_of_loss(gain, lost, k):.0%} [{low:.0%}, {high:.0%}] of the loss"


def _by(seeds: Sequence[int], values: np.ndarray) -> dict[int, float]:
    return dict(zip(seeds, map(float, values), strict=True))
