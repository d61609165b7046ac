"""What the numbers make of the paper's claims (Oyedotun et al. 2022): supported, contradicted or undecided.

A claim is supported only by the control that can tell it from its confound: near-rank loss counts on the fixed probe
set, where all arms show the same images, never on a run's own batch; and that it explains the gap is decided by arms
that lower it and change nothing else, never by correlation. All tests are two-sided paired t tests at 5%, corrected for
the arms of a claim (Holm). The same numbers give the same verdict; every sentence holds the numbers behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from gengap_dist.analysis.arm_roles import Arm, Roles, arms_of, roles, without_length, without_rate
from gengap_dist.analysis.results import Claim, Correlation, Outcome, Run
from gengap_dist.statistics.paired import CONFIDENCE, differences, holm, p_value, t_interval

ALPHA = 1 - CONFIDENCE
NEGLIGIBLE_GAP = 0.005  # half a percentage point of accuracy
NEGLIGIBLE_LOSS = 0.01  # one singular value in a hundred
CLOSED = 0.25  # a remedy that leaves less than this share of the gap, if anything, resolves it
HALF = 0.5  # what a penalty has to undo of the growth, and what has to come back for it
LOSS = "near_rank_loss/"
RELATIVE, ABSOLUTE = "/rel_1e-2", "/abs_1e-2"

NEEDS_GAP = "Asked of a gap only, and here none is told apart from chance."

Measures = Callable[[Run], Mapping[str, float]]
Difference = Callable[[Arm, Arm], Mapping[int, float]]
"""Seed to a quantity of the first arm minus that of the second."""


class Contrast(NamedTuple):
    """One quantity of an arm minus that of another, paired by seed."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    """95% t interval; None where one pair, or equal differences, give no spread to judge by."""
    p: float | None
    values: Mapping[int, float]
    """Seed to difference."""

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity without one."""
        return self.interval[1] if self.interval else float("inf")

    def is_significant(self, sign: int) -> bool:
        """Whether it is above (1) or below (-1) zero by more than chance, p corrected."""
        return self.p is not None and self.p < ALPHA and sign * self.mean > 0


def contrast(name: str, values: Mapping[int, float]) -> Contrast | None:
    """Differences by seed as a contrast; None if there are none."""
    if not values:
        return None
    found = [*values.values()]
    p = p_value(found)
    return Contrast(name, fmean(found), None if p is None else t_interval(found), p, values)


def contrasts(pairs: Sequence[tuple[Arm, Arm]], difference: Difference) -> list[Contrast]:
    """First minus second of each pair that shares a seed; p not corrected."""
    found = (contrast(arm.name, difference(arm, other)) for arm, other in pairs)
    return [each for each in found if each]


def corrected(*families: Sequence[Contrast]) -> list[list[Contrast]]:
    """The same with p corrected for all of them together."""
    ps = iter(holm([each.p for family in families for each in family]))
    return [[each._replace(p=next(ps)) for each in family] for family in families]


def accuracy_lost(arm: Arm, other: Arm) -> dict[int, float]:
    """Seed to what an arm loses of the other's accuracy."""
    return differences(other.accuracies(), arm.accuracies())


def loss_grown(threshold: str, of: Measures, layers: Sequence[str] = ()) -> Difference:
    """Seed to how much more near-rank loss an arm has, mean over the layers that both runs have measured.

    Args:
        threshold: end of the metrics' names.
        of: which of a run's measures.
        layers: names that a layer's must be or begin with; none for all.
    """

    def difference(arm: Arm, other: Arm) -> dict[int, float]:
        out: dict[int, float] = {}
        for seed in sorted(arm.runs.keys() & other.runs.keys()):
            one, two = arm.runs[seed], other.runs[seed]
            names = [name for name in of(one) if name in of(two) and name.startswith(LOSS) and name.endswith(threshold)]
            names = [name for name in names if not layers or _within(name, layers)]
            same_size = of is not _trained or one.num_probe_samples == two.num_probe_samples
            if names and same_size:
                out[seed] = fmean(of(one)[name] - of(two)[name] for name in names)
        return out

    return difference


def _within(name: str, layers: Sequence[str]) -> bool:
    key = name.removeprefix(LOSS)
    return any(key == layer or key.startswith(f"{layer}/") for layer in layers)


def _trained(run: Run) -> Mapping[str, float]:
    return run.measures


def _own(run: Run) -> Mapping[str, float]:
    return run.own_batch


def _own_untrained(run: Run) -> Mapping[str, float]:
    return run.own_batch_untrained


# -- the claims --------------------------------------------------------------------------------------------------------


def claims(runs: Sequence[Run], baseline: str, correlations: Sequence[Correlation] = ()) -> list[Claim]:
    """The paper's claims, in its order; none where the baseline has no finished run."""
    arms = arms_of(runs)
    if baseline not in arms or not arms[baseline].runs:
        return []
    base, found = arms[baseline], roles(arms, baseline)
    plain = [(arm, base) for arm in found.plain]
    lost, grown = corrected(contrasts(plain, accuracy_lost), contrasts(plain, loss_grown(RELATIVE, _trained)))
    gap = _gap(lost, found, base)
    grows = _grows(grown, found, base)
    others = [arm for arm in arms.values() if arm.runs]
    scaled = [(arm, without_rate(arm, others, base)) for arm in found.scaled]
    longer = [(arm, without_length(arm, others)) for arm in found.longer]
    return [
        gap,
        grows,
        _explains(found, base, gap, grows, correlations),
        _remedy("scaling", "Scaling the learning rate does not resolve the gap.", scaled, base, gap),
        _remedy("longer_training", "Longer training does not resolve the gap.", longer, base, gap),
    ]


def _gap(lost: Sequence[Contrast], found: Roles, base: Arm) -> Claim:
    claim = "Networks trained with large batches generalize worse than with small ones."
    control = "The same seeds, initial weights, epochs and settings; only the batch differs."
    if not lost:
        return Claim("gap", claim, "undecided", _nobody(found, base), control)
    return Claim(
        "gap", claim, _outcome(lost, NEGLIGIBLE_GAP), f"Test accuracy lost: {_listed(lost, _points)}.", control
    )


def _nobody(found: Roles, base: Arm) -> str:
    if found.plain:
        names = ", ".join(arm.name for arm in found.plain)
        return f"No seed came to a result in both {base.name} and an arm that differs in its batch only ({names})."
    return f"No arm of as many epochs differs from {base.name} in its batch only."


def _outcome(found: Sequence[Contrast], negligible: float) -> Outcome:
    """Supported: some are above zero, none below. Contradicted: some are below, none above; or all are negligible."""
    above, below = any(c.is_significant(1) for c in found), any(c.is_significant(-1) for c in found)
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

    def grown(threshold: str, of: Measures) -> list[Contrast]:
        return corrected(contrasts(pairs, loss_grown(threshold, of)))[0]

    own, absolute = grown(RELATIVE, _own), grown(ABSOLUTE, _trained)
    if not relative:
        what = "only on each run's own batch, which cannot tell" if own else "on no probe set that two arms share"
        because = f"Near-rank loss was measured {what}." if found.plain else _nobody(found, base)
        return Claim("near_rank_loss_grows", claim, "undecided", because, control)
    outcome, other = _outcome(relative, NEGLIGIBLE_LOSS), _outcome(absolute, NEGLIGIBLE_LOSS) if absolute else None
    because = f"Change of the share of singular values below 0.01 s1, mean over layers: {_listed(relative, _share)}."
    if absolute:
        because += f" Below 0.01: {_listed(absolute, _share)}."
    if {outcome, other} == {"supported", "contradicted"}:
        outcome = "undecided"
        because += " The two thresholds say opposite things."
    if own:
        because += f" On each run's own batch it would have seemed to be: {_listed(own, _share)}"
        before = grown(RELATIVE, _own_untrained)
        because += (f", of which the untrained networks have {_listed(before, _share)}" if before else "") + "."
    return Claim("near_rank_loss_grows", claim, outcome, because, control)


def _explains(found: Roles, base: Arm, gap: Claim, grows: Claim, correlations: Sequence[Correlation]) -> Claim:
    key, claim = "explains", "Near-rank loss is what costs large batches their accuracy."
    control = (
        "An arm whose loss penalises near-rank loss, against the same arm without the penalty, less what the penalty "
        "does for the baseline."
    )
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NEEDS_GAP, control)
    pairs = [
        (arm, twin)
        for arm, twin in found.penalised
        if twin.global_size > base.global_size and accuracy_lost(twin, base) and _mean(accuracy_lost(twin, base)) > 0
    ]
    # what the penalty does where the batch is small: a remedy for everything explains nothing
    small = next((pair for pair in found.penalised if pair[0].global_size == base.global_size), None)
    small_gain = {seed: -lost for seed, lost in accuracy_lost(*small).items()} if small else {}
    lowered, gains = [], []
    for arm, twin in pairs:
        gain = {seed: -lost for seed, lost in accuracy_lost(arm, twin).items()}
        gain = {
            seed: value - small_gain.get(seed, 0.0) for seed, value in gain.items() if not small or seed in small_gain
        }
        fall = contrast(arm.name, loss_grown(RELATIVE, _trained, _penalised_layers(arm))(arm, twin))
        if fall and (back := contrast(arm.name, gain)):
            lowered.append(fall)
            gains.append(back)
    (lowered,), (gains,) = corrected(lowered), corrected(gains)
    verdicts: list[Outcome] = []
    words: list[str] = []
    for less, gain in zip(lowered, gains, strict=True):
        arm, twin = next(pair for pair in pairs if pair[0].name == less.name)
        growth = loss_grown(RELATIVE, _trained, _penalised_layers(arm))(twin, base)
        verdict, told = _of_penalty(less, gain, _mean(growth) if growth else 0.0, _mean(accuracy_lost(twin, base)))
        if verdict == "supported" and not small:
            verdict, told = "undecided", "accuracy comes back, but no arm says what the penalty does for the baseline"
        verdicts.append(verdict)
        words.append(
            f"{arm.name} changes near-rank loss by {_share(less)}, accuracy by {_points(gain)} of "
            f"{100 * _mean(accuracy_lost(twin, base)):.2f} lost: {told}"
        )
    because = "; ".join(words) or "No arm lowers near-rank loss directly"
    beside = _beside(correlations)
    decided: list[Outcome] = [verdict for verdict in verdicts if verdict != "undecided"]
    if not decided and grows.outcome == "contradicted":
        because = f"The gap is there, and near-rank loss does not grow with the batch. {because}"
        return Claim(key, claim, "contradicted", f"{because}. {beside}".strip(), grows.control)
    outcome: Outcome = decided[0] if len(set(decided)) == 1 else "undecided"
    return Claim(key, claim, outcome, f"{because}. {beside}".strip(), control)


def _of_penalty(less: Contrast, gain: Contrast, growth: float, lost: float) -> tuple[Outcome, str]:
    """What one penalised arm says, and why, from what it lowers and gains, and what grew and was lost without it."""
    if not less.is_significant(-1) or -less.mean < HALF * growth:
        return "undecided", "it does not lower near-rank loss by half of what it grew, and so decides nothing"
    if gain.is_significant(-1) and gain.mean < -NEGLIGIBLE_GAP:
        return "undecided", "the penalty costs accuracy by itself, and so decides nothing"
    if gain.high < HALF * lost:
        return "contradicted", "near-rank loss falls, and less than half of the accuracy comes back"
    if gain.is_significant(1) and gain.mean >= HALF * lost:
        return "supported", "near-rank loss falls, and accuracy comes back"
    return "undecided", "too uncertain to tell"


def _penalised_layers(arm: Arm) -> Sequence[str]:
    """Layers that an arm's penalty holds for; none for all."""
    layers = arm.settings.get("algorithm.rank_layers")
    named = [str(layer) for layer in layers] if isinstance(layers, list | tuple) else []
    return [] if any(layer == "auto" or "*" in layer for layer in named) else named


def _mean(values: Mapping[int, float]) -> float:
    return fmean(values.values())


def _beside(correlations: Sequence[Correlation]) -> str:
    """The strongest correlations, in words; they decide nothing."""
    told = ", ".join(
        f"{c.measure} {c.r:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
        + ("" if c.partial is None else f" ({c.partial:+.2f} given updates)")
        for c in [c for c in correlations if c.interval][:3]
        if c.interval
    )
    return f"What goes most with the accuracy lost (a correlation, no cause): {told}." if told else ""


def _remedy(key: str, claim: str, pairs: Sequence[tuple[Arm, Arm | None]], base: Arm, gap: Claim) -> Claim:
    """Whether arms that claim to close the gap leave it open (supported), or one of them closes it (contradicted).

    Each stands beside its twin, the arm of the same batch that is without the remedy: where the twin loses nothing,
    there is nothing to resolve.
    """
    control = "The arm of the same batch that is without it, which must lose accuracy, and the baseline."
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NEEDS_GAP, control)
    both = [(arm, twin) for arm, twin in pairs if twin and accuracy_lost(arm, base) and accuracy_lost(twin, base)]
    (left,) = corrected(contrasts([(arm, base) for arm, _ in both], accuracy_lost))
    twins = {twin.name: twin for _, twin in both}
    (before,) = corrected(contrasts([(twin, base) for twin in twins.values()], accuracy_lost))
    verdicts: list[Outcome] = []
    words: list[str] = []
    for (arm, twin), c in zip(both, left, strict=True):
        lost = next(each for each in before if each.name == twin.name)
        text = f"{arm.name} leaves {_points(c)} of the {_points(lost)} points that {twin.name} loses"
        interval = t_interval([*c.values.values()], 1 - ALPHA / len(both)) if c.interval else None
        high = interval[1] if interval else float("inf")  # the best of several is picked here
        if not lost.is_significant(1):
            words.append(f"{text}, which is nothing to resolve")
            continue
        if high >= NEGLIGIBLE_GAP and c.is_significant(1):
            verdicts.append("supported")
        elif high < NEGLIGIBLE_GAP or high < CLOSED * lost.mean:
            verdicts.append("contradicted")
            text += " and so resolves it"
        else:
            verdicts.append("undecided")
            text += ", too uncertain to tell"
        words.append(text)
    words += [f"{arm.name} has no twin without it" for arm, twin in pairs if twin is None]
    because = "; ".join(words) + "." if words else "No such arm has a pair with the baseline."
    if "contradicted" in verdicts:
        return Claim(key, claim, "contradicted", because, control)
    left_open = bool(verdicts) and all(verdict == "supported" for verdict in verdicts)
    return Claim(key, claim, "supported" if left_open else "undecided", because, control)


# -- in words ----------------------------------------------------------------------------------------------------------


def _listed(found: Sequence[Contrast], show: Callable[[Contrast], str]) -> str:
    return ", ".join(f"{c.name} {show(c)}" for c in found)


def _points(c: Contrast) -> str:
    """In percentage points, with the interval."""
    return f"{100 * c.mean:+.2f}" + _bounds(c, 100, ".2f")


def _share(c: Contrast) -> str:
    return f"{c.mean:+.3f}" + _bounds(c, 1, ".3f")


def _bounds(c: Contrast, scale: float, style: str) -> str:
    if c.interval is None:
        return (
            " (one pair)" if len(c.values) == 1 else f" (the same in all {len(c.values)} pairs: no spread to judge by)"
        )
    low, high = (format(scale * end, f"+{style}") for end in c.interval)
    return f" [{low}, {high}]"
