"""What the numbers make of the paper's claims (Oyedotun et al. 2022): supported, contradicted or undecided.

A claim is supported only by the control that can tell it from its confound: near-rank loss counts on the fixed probe
set, where all arms show the same images, never on a run's own batch; and that it explains the gap is decided by arms
that lower it and change nothing else, never by correlation. All tests are two-sided paired t tests at 5%, corrected for
the arms of a claim (Holm). The same numbers give the same verdict; every sentence holds the numbers behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from gengap_dist.comparison import Claim, Correlation, Outcome, Run
from gengap_dist.comparison.pairing import CONFIDENCE, differences, holm, p_value, t_interval
from gengap_dist.comparison.roles import Arm, Roles, arms_of, roles

ALPHA = 1 - CONFIDENCE
NEGLIGIBLE_GAP = 0.005  # half a percentage point of accuracy
NEGLIGIBLE_LOSS = 0.01  # one singular value in a hundred
CLOSED = 0.25  # a remedy that leaves less than this share of the gap, if anything, resolves it
LOSS = "near_rank_loss/"
RELATIVE, ABSOLUTE = "/rel_1e-2", "/abs_1e-2"

NEEDS_GAP = "Asked of a gap only, and here none is told apart from chance."


class Contrast(NamedTuple):
    """One quantity of an arm minus that of another, paired by seed."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    num_pairs: int

    @property
    def low(self) -> float:
        """Lower end of the interval; minus infinity without one."""
        return self.interval[0] if self.interval else float("-inf")

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity without one."""
        return self.interval[1] if self.interval else float("inf")

    def told_apart(self, sign: int) -> bool:
        """Whether it is above (1) or below (-1) zero by more than chance, p corrected."""
        return self.p is not None and self.p < ALPHA and sign * self.mean > 0


def contrasts(pairs: Sequence[tuple[Arm, Arm]], value: Callable[[Arm], Mapping[int, float]]) -> list[Contrast]:
    """First minus second of each pair that shares a seed; p not corrected."""
    out: list[Contrast] = []
    for arm, other in pairs:
        found = [*differences(value(arm), value(other)).values()]
        if found:
            out.append(Contrast(arm.name, fmean(found), t_interval(found), p_value(found), len(found)))
    return out


def corrected(*families: Sequence[Contrast]) -> list[list[Contrast]]:
    """The same with p corrected for all of them together."""
    ps = iter(holm([contrast.p for family in families for contrast in family]))
    return [[contrast._replace(p=next(ps)) for contrast in family] for family in families]


def _accuracy_lost(arm: Arm) -> dict[int, float]:
    """Seed to minus the accuracy: what an arm has more of than another is what it loses."""
    return {seed: -accuracy for seed, accuracy in arm.accuracies().items()}


def mean_loss(
    run: Run, threshold: str, layers: Sequence[str] = (), *, of: Callable[[Run], Mapping[str, float]]
) -> float | None:
    """Near-rank loss of a run, mean over its layers (or those that begin with one of `layers`); None without any."""
    found = [
        value
        for name, value in of(run).items()
        if name.startswith(LOSS) and name.endswith(threshold) and (not layers or _within(name, layers))
    ]
    return fmean(found) if found else None


def _within(name: str, layers: Sequence[str]) -> bool:
    key = name.removeprefix(LOSS)
    return any(key == layer or key.startswith(f"{layer}/") for layer in layers)


def claims(runs: Sequence[Run], baseline: str, correlations: Sequence[Correlation] = ()) -> list[Claim]:
    """The paper's claims, in its order; none where the baseline has no finished run."""
    arms = arms_of(runs)
    if baseline not in arms or not arms[baseline].runs:
        return []
    base, found = arms[baseline], roles(arms, baseline)
    plain = [(arm, base) for arm in found.plain]
    lost, grown = corrected(contrasts(plain, _accuracy_lost), contrasts(plain, lambda arm: _losses(arm, RELATIVE)))
    gap = _gap(lost, base)
    grows = _grows(grown, found, base)
    return [
        gap,
        grows,
        _explains(found, base, gap, grows, correlations),
        _remedy("scaling", "Scaling the learning rate does not resolve the gap.", found.scaled, found, base, gap),
        _remedy("longer_training", "Longer training does not resolve the gap.", found.longer, found, base, gap),
    ]


def _gap(lost: Sequence[Contrast], base: Arm) -> Claim:
    claim = "Networks trained with large batches generalize worse than with small ones."
    control = "The same seeds, initial weights and epochs; only the batch differs."
    if not lost:
        return Claim("gap", claim, "undecided", f"No arm differs from {base.name} in its batch only.", control)
    outcome = _outcome(lost, NEGLIGIBLE_GAP)
    return Claim("gap", claim, outcome, "Test accuracy lost: " + _listed(lost, _points) + ".", control)


def _outcome(found: Sequence[Contrast], negligible: float) -> Outcome:
    """Supported: some are above zero, none below. Contradicted: some are below, none above; or all are negligible."""
    above, below = any(c.told_apart(1) for c in found), any(c.told_apart(-1) for c in found)
    if above and not below:
        return "supported"
    if (below and not above) or all(c.high < negligible for c in found):
        return "contradicted"
    return "undecided"


def _grows(relative: Sequence[Contrast], found: Roles, base: Arm) -> Claim:
    claim = "A larger batch increases near-rank loss of the units' activations."
    control = (
        "Every arm is probed on the same fixed images, as many for each: a matrix of a run's own batch loses singular "
        "values as the batch grows even in an untrained network."
    )
    pairs = [(arm, base) for arm in found.plain]

    def mean_of(threshold: str, of: Callable[[Run], Mapping[str, float]]) -> list[Contrast]:
        return corrected(contrasts(pairs, lambda arm: _losses(arm, threshold, of=of)))[0]

    own, absolute = mean_of(RELATIVE, _own), mean_of(ABSOLUTE, _trained)
    if not relative:
        what = "only on each run's own batch, which cannot tell" if own else "nowhere"
        where = (
            f"Near-rank loss was measured {what}."
            if found.plain
            else f"No arm differs from {base.name} in its batch only."
        )
        return Claim("near_rank_loss_grows", claim, "undecided", where, control)
    outcome, other = _outcome(relative, NEGLIGIBLE_LOSS), _outcome(absolute, NEGLIGIBLE_LOSS) if absolute else None
    because = (
        "Change of the share of singular values below 0.01 s1, mean over layers: " + _listed(relative, _share) + "."
    )
    if absolute:
        because += " Below 0.01: " + _listed(absolute, _share) + "."
    if {outcome, other} == {"supported", "contradicted"}:
        outcome = "undecided"
        because += " The two thresholds say opposite things."
    if own:
        because += " On each run's own batch it would have seemed to be: " + _listed(own, _share)
        before = mean_of(RELATIVE, _own_untrained)
        because += (", of which the untrained networks have " + _listed(before, _share) if before else "") + "."
    return Claim("near_rank_loss_grows", claim, outcome, because, control)


def _trained(run: Run) -> Mapping[str, float]:
    return run.measures


def _own(run: Run) -> Mapping[str, float]:
    return run.own_batch


def _own_untrained(run: Run) -> Mapping[str, float]:
    return run.own_batch_untrained


def _losses(
    arm: Arm, threshold: str, layers: Sequence[str] = (), *, of: Callable[[Run], Mapping[str, float]] = _trained
) -> dict[int, float]:
    found = {seed: mean_loss(run, threshold, layers, of=of) for seed, run in arm.runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _explains(found: Roles, base: Arm, gap: Claim, grows: Claim, correlations: Sequence[Correlation]) -> Claim:
    key, claim = "explains", "Near-rank loss is what costs large batches their accuracy."
    control = "An arm whose loss penalises near-rank loss, against the same arm without the penalty."
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NEEDS_GAP, control)
    beside = _beside(correlations)
    tested = [
        (arm, twin) for arm, twin in found.penalised if twin.global_size > base.global_size and _lost(base, twin) > 0
    ]
    (lowered,) = corrected(contrasts(tested, lambda arm: _losses(arm, RELATIVE, _penalised_layers(arm, tested))))
    (gains,) = corrected(contrasts(tested, Arm.accuracies))
    words: list[str] = []
    verdicts: list[Outcome] = []
    for arm, twin in tested:
        less = next((c for c in lowered if c.name == arm.name), None)
        gain = next((c for c in gains if c.name == arm.name), None)
        if less is None or gain is None:
            words.append(f"{arm.name} has no pair with {twin.name}")
            continue
        lost = _lost(base, twin)
        text = (
            f"{arm.name} changes near-rank loss by {_share(less)}, accuracy by {_points(gain)} of {100 * lost:.2f} lost"
        )
        if not less.told_apart(-1):
            words.append(f"{text}: it does not lower near-rank loss, and so decides nothing")
        elif gain.told_apart(-1) and gain.mean < -NEGLIGIBLE_GAP:
            words.append(f"{text}: the penalty costs accuracy by itself, and so decides nothing")
        elif gain.told_apart(1):
            words.append(f"{text}: accuracy comes back")
            verdicts.append("supported")
        elif gain.high < lost / 2:
            words.append(f"{text}: near-rank loss falls, and less than half of the accuracy comes back")
            verdicts.append("contradicted")
        else:
            words.append(f"{text}: too uncertain to tell")
            verdicts.append("undecided")
    because = "; ".join(words) or "No arm lowers near-rank loss directly"
    decided: list[Outcome] = [verdict for verdict in verdicts if verdict != "undecided"]
    if not decided and grows.outcome == "contradicted":
        because = f"The gap is there, and near-rank loss does not grow with the batch. {because}"
        return Claim(key, claim, "contradicted", f"{because}. {beside}".strip(), grows.control)
    outcome: Outcome = decided[0] if len(set(decided)) == 1 else "undecided"
    return Claim(key, claim, outcome, f"{because}. {beside}".strip(), control)


def _penalised_layers(arm: Arm, tested: Sequence[tuple[Arm, Arm]]) -> Sequence[str]:
    """Layers that the penalty holds for, also for the arm's twin; none for all."""
    settings = next((a.settings for a, twin in tested if arm.name in (a.name, twin.name)), {})
    layers = settings.get("recipe.rank_layers")
    named = [str(layer) for layer in layers] if isinstance(layers, list | tuple) else []
    return [] if any(layer == "auto" or "*" in layer for layer in named) else named


def _lost(base: Arm, arm: Arm) -> float:
    """Accuracy that an arm loses, mean over pairs; nan without one."""
    found = [*differences(base.accuracies(), arm.accuracies()).values()]
    return fmean(found) if found else float("nan")


def _beside(correlations: Sequence[Correlation]) -> str:
    """The strongest correlations, in words; they decide nothing."""
    best = [c for c in correlations if c.interval][:3]
    if not best:
        return ""
    told = ", ".join(
        f"{c.measure} {c.r:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
        + ("" if c.partial is None else f" ({c.partial:+.2f} given updates)")
        for c in best
        if c.interval
    )
    return f"What goes most with the accuracy lost (a correlation, no cause): {told}."


def _remedy(key: str, claim: str, arms: Sequence[Arm], found: Roles, base: Arm, gap: Claim) -> Claim:
    """Whether arms that claim to close the gap leave it open (supported), or one of them closes it (contradicted)."""
    control = "The arm of the same batch without it, and the baseline."
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NEEDS_GAP, control)
    verdicts: list[Outcome] = []
    words: list[str] = []
    (left,) = corrected(contrasts([(arm, base) for arm in arms], _accuracy_lost))
    for c in left:
        arm = next(arm for arm in arms if arm.name == c.name)
        plain = next((twin for twin in found.plain if twin.global_size == arm.global_size), None)
        lost = _lost(base, plain) if plain else float("nan")
        values = [*differences(base.accuracies(), arm.accuracies()).values()]
        interval = t_interval(values, 1 - ALPHA / len(arms))  # the best of several is picked here
        of = f" of {100 * lost:.2f}" if lost == lost else ""
        text = f"{arm.name} leaves {_points(c)}{of} points"
        high = interval[1] if interval else float("inf")
        if high >= NEGLIGIBLE_GAP and c.told_apart(1):
            verdicts.append("supported")
        elif high < NEGLIGIBLE_GAP or high < CLOSED * lost:
            verdicts.append("contradicted")
            text += " and so resolves it"
        else:
            verdicts.append("undecided")
            text += ", too uncertain to tell"
        words.append(text)
    if not verdicts:
        return Claim(key, claim, "undecided", "No such arm has a pair with the baseline.", control)
    resolved, open_ = "contradicted" in verdicts, all(verdict == "supported" for verdict in verdicts)
    outcome: Outcome = "contradicted" if resolved else "supported" if open_ else "undecided"
    return Claim(key, claim, outcome, "; ".join(words) + ".", control)


def _listed(found: Sequence[Contrast], show: Callable[[Contrast], str]) -> str:
    return ", ".join(f"{c.name} {show(c)}" for c in found)


def _points(c: Contrast) -> str:
    """In percentage points, with the interval."""
    return f"{100 * c.mean:+.2f}" + (f" [{100 * c.low:+.2f}, {100 * c.high:+.2f}]" if c.interval else " (one pair)")


def _share(c: Contrast) -> str:
    return f"{c.mean:+.3f}" + (f" [{c.low:+.3f}, {c.high:+.3f}]" if c.interval else " (one pair)")
