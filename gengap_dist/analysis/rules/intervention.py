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

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.analysis.rules.judged import NEAR_RANK_MARGIN
from gengap_dist.analysis.rules.look import Look
from gengap_dist.statistics.paired import are_equal

SAME_RANK = 0.15  # of the growth: routes that reach the same near-rank loss
QUARTER, HALF = 0.25, 0.5
MIN_ROUTES = 2
ONE_ROUTE = "only one way to raise the rank was tried: a second one, spread or trace beside logdet, is needed"

Finding = Literal[
    "does not grow",
    "not asked",
    "explains most",
    "explains less than half",
    "routes disagree",
    "contributes",
    "undecided",
]


class Route(NamedTuple):
    """Scores and near-rank losses of the arms that raise the rank in one way, and of their placebo: all [n]."""

    name: str
    """Of the arm at the large batch."""
    measure: str
    large_raised: np.ndarray
    small_raised: np.ndarray
    large_placebo: np.ndarray
    small_placebo: np.ndarray
    others: tuple[str, str, str] = ("", "", "")
    """Names of the other three arms, in this order."""


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
    may_lose: bool = True
    """Whether the large batch may lose the margin or more, so that there is a cause to find."""


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
    routes = range(len(scores.routes))
    gains, raisings = (
        [gain_of(scores, at) for at in routes],
        [raising_of(scores, near_rank_losses, at) for at in routes],
    )
    cost, lowering = cost_of(scores), lowering_of(scores, near_rank_losses)
    tests: list[tuple[Finding, list[np.ndarray]]] = [
        ("explains most", [*raisings, lowering]),
        ("explains less than half", [-each for each in (*raisings, lowering)]),
    ]
    for finding, values in tests:
        if all(look.is_above(each) for each in values):
            return Verdict(finding, max(look.p(each) for each in values), "")
    if (p := _disagree(scores, near_rank_losses, look)) is not None:
        return Verdict("routes disagree", p, "")
    if all(look.is_above(each) for each in (*gains, cost)):
        return Verdict("contributes", max(look.p(each) for each in (*gains, cost)), "")
    return Verdict("undecided", 1.0, "the intervals are too wide to decide")


def gain_of(scores: Arms, at: int) -> np.ndarray:
    """Of route number `at`: gain [n]."""
    route = scores.routes[at]
    return route.large_raised - route.large_placebo - (route.small_raised - route.small_placebo)


def raising_of(scores: Arms, near_rank_losses: Arms, at: int) -> np.ndarray:
    """Of route number `at`, where near-rank loss grows: raising [n]."""
    k = fall_of(near_rank_losses.routes[at]).mean() / near_rank_losses.rise.mean()
    return gain_of(scores, at) - k * -scores.rise / 2


def cost_of(scores: Arms) -> np.ndarray:
    """Of lowering the rank: cost [n]."""
    return scores.small_placebo - scores.small_lowered


def lowering_of(scores: Arms, near_rank_losses: Arms) -> np.ndarray:
    """Of lowering the rank, where near-rank loss grows: lowering [n]."""
    k = rise_of(near_rank_losses).mean() / near_rank_losses.rise.mean()
    return cost_of(scores) - k * -scores.rise / 2


def surely_grows(growth: np.ndarray, look: Look) -> bool:
    """Whether near-rank loss [n] surely grows by more than the margin: else nothing is a share of its growth."""
    return look.is_above(growth, NEAR_RANK_MARGIN)


def rise_of(near_rank_losses: Arms) -> np.ndarray:
    """What lowering the rank adds to near-rank loss at the small batch: [n]."""
    return near_rank_losses.small_lowered - near_rank_losses.small_placebo


def fall_of(route: Route) -> np.ndarray:
    """What raising the rank takes back of near-rank loss at the large batch, minus the same at the small one: [n]."""
    return route.large_placebo - route.large_raised - (route.small_placebo - route.small_raised)


class Condition(NamedTuple):
    """What must surely hold before a verdict is given."""

    quantity: str
    values: np.ndarray
    """[n]."""
    limit: float | np.ndarray
    """A number, or one for each pair."""
    is_within: bool
    """Whether the size of the mean must be below the limit; else the mean must be above it."""
    is_score: bool
    """Whether it is a difference of scores; else it is one of near-rank loss."""
    reason: str
    """What is said if it does not hold."""

    def holds(self, look: Look) -> bool:
        """Whether it surely does."""
        if self.is_within:
            return look.is_within(self.values, self.limit)
        return look.is_above(self.values - self.limit)


def conditions(scores: Arms, near_rank_losses: Arms) -> list[Condition]:
    """All conditions on the numbers of an intervention in which all arms trained as well as the baseline, in order."""
    lost, growth = -scores.rise, near_rank_losses.rise
    half_growth, quarter_growth, half_lost = HALF * growth, QUARTER * growth, HALF * lost
    moved = near_rank_losses.small_placebo - near_rank_losses.small
    out = [
        Condition("growth", growth, NEAR_RANK_MARGIN, False, False,
                  f"near-rank loss does not surely grow by more than {NEAR_RANK_MARGIN}"),
    ]  # fmt: skip
    for score, ranks in zip(scores.routes, near_rank_losses.routes, strict=True):
        name, (at_small, large_placebo, small_placebo) = score.name, score.others
        moved_large = ranks.large_placebo - near_rank_losses.large
        moved_small = ranks.small_placebo - near_rank_losses.small
        of_placebo = f"the placebo of {name} may move near-rank loss by a quarter of the growth"
        out += [
            Condition(f"fall by {name}", fall_of(ranks), half_growth, False, False,
                      f"{name} does not surely take back half of the growth"),
            Condition(f"near-rank loss moved by {large_placebo}", moved_large, quarter_growth, True, False, of_placebo),
            Condition(f"near-rank loss moved by {small_placebo}", moved_small, quarter_growth, True, False, of_placebo),
            Condition(f"{at_small} against {small_placebo}", score.small_raised - score.small_placebo,
                      half_lost, True, True,
                      f"at the small batch {name} and its placebo may differ by half of the loss"),
            Condition(f"{small_placebo} against the placebo of lowering", score.small_placebo - scores.small_placebo,
                      half_lost, True, True,
                      f"the placebos of {name} and of lowering the rank may differ by half of the loss"),
        ]  # fmt: skip
    out += [
        Condition("near-rank loss moved by the placebo of lowering", moved, quarter_growth, True, False,
                  "the placebo of lowering the rank may move near-rank loss by a quarter of the growth"),
        Condition("rise", rise_of(near_rank_losses), half_growth, False, False,
                  "lowering the rank does not surely reach half of the growth"),
    ]  # fmt: skip
    return out


def _failed_condition(scores: Arms, near_rank_losses: Arms, look: Look) -> str:
    """The first condition that is not surely true; empty if all are."""
    growth, *others = conditions(scores, near_rank_losses)
    if not growth.holds(look):
        return growth.reason
    if len({route.measure for route in scores.routes}) < MIN_ROUTES:
        return ONE_ROUTE
    return next((each.reason for each in others if not each.holds(look)), "")


def _disagree(scores: Arms, near_rank_losses: Arms, look: Look) -> float | None:
    """P of two routes that reach the same near-rank loss and surely other scores; None if there are none."""
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
    return min((p for p in ps if p < look.level), default=None)
