"""Tests the paper's claims (Oyedotun et al. 2022) on a study: each is supported, contradicted or undecided.

A claim is supported only by a control that excludes its confound. Near-rank loss is compared on the fixed probe set,
which has the same samples for all arms, never on a run's own batch. Whether near-rank loss explains the gap is decided
by arms that lower it and change nothing else, never by correlation. All tests are two-sided paired t tests at 5%,
corrected for the arms of a claim (Holm). The result is deterministic, and the evidence text contains the numbers used.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from gengap_dist.analysis.arm_roles import Arm, Roles, group_by_arm, roles, shorter_counterpart, unscaled_counterpart
from gengap_dist.analysis.results import Claim, Correlation, Outcome, Run
from gengap_dist.config.metric_key import MetricKey
from gengap_dist.runs.metric import ACCURACY, MetricDescription
from gengap_dist.statistics.paired import CONFIDENCE, differences, holm, p_value, t_interval

ALPHA = 1 - CONFIDENCE
NEGLIGIBLE_GAP = 0.005  # half a percentage point of a share; of other metrics this part of the baseline's mean
NEGLIGIBLE_LOSS = 0.01  # one singular value in a hundred
CLOSED = 0.25  # a remedy that leaves less than this share of the gap, if any, resolves it
HALF = 0.5  # share of the growth that a penalty must remove, and share of the score that must return
RELATIVE, ABSOLUTE = "rel_1e-2", "abs_1e-2"

NO_GAP = "Tested only where there is a gap, and here no gap is significant."

Measures = Callable[[Run], Mapping[str, float]]
Difference = Callable[[Arm, Arm], Mapping[int, float]]
"""Seed to a quantity of the first arm minus that of the second."""


class Contrast(NamedTuple):
    """One quantity of an arm minus that of another, paired by seed."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    """95% t interval; None for a single pair, or if all differences are equal."""
    p: float | None
    values: Mapping[int, float]
    """Seed to difference."""

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity without one."""
        return self.interval[1] if self.interval else float("inf")

    def is_significant(self, sign: int) -> bool:
        """Whether it is significantly above (1) or below (-1) zero, by the p of this contrast."""
        return self.p is not None and self.p < ALPHA and sign * self.mean > 0


def contrast(name: str, values: Mapping[int, float]) -> Contrast | None:
    """Differences by seed as a contrast; None if there are none."""
    if not values:
        return None
    by_seed = [*values.values()]
    p = p_value(by_seed)
    return Contrast(name, fmean(by_seed), None if p is None else t_interval(by_seed), p, values)


def contrasts(pairs: Sequence[tuple[Arm, Arm]], difference: Difference) -> list[Contrast]:
    """First minus second of each pair of arms that share a seed; p is not corrected."""
    candidates = (contrast(arm.name, difference(arm, other)) for arm, other in pairs)
    return [each for each in candidates if each]


def corrected(*families: Sequence[Contrast]) -> list[list[Contrast]]:
    """The same contrasts, p corrected for all of them together (Holm)."""
    ps = iter(holm([each.p for family in families for each in family]))
    return [[each._replace(p=next(ps)) for each in family] for family in families]


def score_lost(arm: Arm, other: Arm) -> dict[int, float]:
    """Seed to the score of `other` minus that of `arm`."""
    return differences(other.scores(), arm.scores())


def near_rank_loss_increase(threshold: str, measures_of: Measures, layers: Sequence[str] = ()) -> Difference:
    """Seed to the near-rank loss of the first arm minus that of the second, mean over the layers measured in both runs.

    Args:
        threshold: of near-rank loss.
        measures_of: selects a set of measures of a run.
        layers: names of the layers to include, in all views; empty for all.
    """

    def difference(arm: Arm, other: Arm) -> dict[int, float]:
        out: dict[int, float] = {}
        for seed in sorted(arm.runs.keys() & other.runs.keys()):
            first, second = arm.runs[seed], other.runs[seed]
            shared = {name: MetricKey.parse(name) for name in measures_of(first) if name in measures_of(second)}
            names = [
                name
                for name, key in shared.items()
                if (key.measure, key.threshold) == ("near_rank_loss", threshold) and (not layers or key.layer in layers)
            ]
            same_size = measures_of is not _trained or first.num_probe_samples == second.num_probe_samples
            if names and same_size:
                out[seed] = fmean(measures_of(first)[name] - measures_of(second)[name] for name in names)
        return out

    return difference


def _trained(run: Run) -> Mapping[str, float]:
    return run.measures


def _own(run: Run) -> Mapping[str, float]:
    return run.own_batch


def _own_untrained(run: Run) -> Mapping[str, float]:
    return run.own_batch_untrained


# -- the claims --------------------------------------------------------------------------------------------------------


class _Metric(NamedTuple):
    """The study's metric, and the smallest difference that counts."""

    description: MetricDescription
    negligible: float

    def difference(self, c: Contrast) -> str:
        """A contrast of scores, with its interval, in the unit that is shown."""
        show = self.description.format_difference
        return show(c.mean) + _bounds(c, show)


def claims(
    runs: Sequence[Run],
    baseline: str,
    correlations: Sequence[Correlation] = (),
    metric: MetricDescription = ACCURACY,
) -> list[Claim]:
    """The paper's claims, in the paper's order; empty if the baseline has no finished run."""
    arms = group_by_arm(runs)
    if baseline not in arms or not arms[baseline].runs:
        return []
    base, arm_roles = arms[baseline], roles(arms, baseline)
    level = 1.0 if metric.unit == "share" else abs(fmean(base.scores().values() or [0.0]))
    shown = _Metric(metric, NEGLIGIBLE_GAP * level)
    plain = [(arm, base) for arm in arm_roles.plain]
    lost, grown = corrected(contrasts(plain, score_lost), contrasts(plain, near_rank_loss_increase(RELATIVE, _trained)))
    gap = _gap(lost, arm_roles, base, shown)
    grows = _grows(grown, arm_roles, base)
    others = [arm for arm in arms.values() if arm.runs]
    scaled = [(arm, unscaled_counterpart(arm, others, base)) for arm in arm_roles.scaled]
    longer = [(arm, shorter_counterpart(arm, others)) for arm in arm_roles.longer]
    return [
        gap,
        grows,
        _explains(arm_roles, base, gap, grows, correlations, shown),
        _remedy("scaling", "Scaling the learning rate does not resolve the gap.", scaled, base, gap, shown),
        _remedy("longer_training", "Longer training does not resolve the gap.", longer, base, gap, shown),
    ]


def _gap(lost: Sequence[Contrast], arm_roles: Roles, base: Arm, metric: _Metric) -> Claim:
    claim = "Networks trained with large batches generalize worse than with small ones."
    control = "The same seeds, initial weights, epochs and settings; only the batch differs."
    if not lost:
        return Claim("gap", claim, "undecided", _no_contrast_reason(arm_roles, base), control)
    evidence = f"Test {metric.description.harm}: {_listed(lost, metric.difference)}."
    return Claim("gap", claim, _outcome(lost, metric.negligible), evidence, control)


def _no_contrast_reason(arm_roles: Roles, base: Arm) -> str:
    if arm_roles.plain:
        names = ", ".join(arm.name for arm in arm_roles.plain)
        return f"No seed has a result in both {base.name} and an arm that differs only in its batch ({names})."
    return f"No arm with the same number of epochs differs from {base.name} only in its batch."


def _outcome(tested: Sequence[Contrast], negligible: float) -> Outcome:
    """Supported: some are significantly above zero, none below. Contradicted: the reverse, or all are negligible."""
    above, below = any(c.is_significant(1) for c in tested), any(c.is_significant(-1) for c in tested)
    if above and not below:
        return "supported"
    if (below and not above) or all(c.high < negligible for c in tested):
        return "contradicted"
    return "undecided"


def _grows(relative: Sequence[Contrast], arm_roles: Roles, base: Arm) -> Claim:
    claim = "A larger batch increases near-rank loss of the units' activations."
    control = (
        "All arms are probed on the same fixed set of samples. On a run's own batch, near-rank loss changes with the "
        "batch size even in an untrained network."
    )
    pairs = [(arm, base) for arm in arm_roles.plain]

    def grown(threshold: str, measures_of: Measures) -> list[Contrast]:
        return corrected(contrasts(pairs, near_rank_loss_increase(threshold, measures_of)))[0]

    own, absolute = grown(RELATIVE, _own), grown(ABSOLUTE, _trained)
    if not relative:
        measured_on = (
            "only on each run's own batch, which decides nothing" if own else "on no probe set that two arms share"
        )
        evidence = (
            f"Near-rank loss was measured {measured_on}." if arm_roles.plain else _no_contrast_reason(arm_roles, base)
        )
        return Claim("near_rank_loss_grows", claim, "undecided", evidence, control)
    outcome, absolute_outcome = (
        _outcome(relative, NEGLIGIBLE_LOSS),
        _outcome(absolute, NEGLIGIBLE_LOSS) if absolute else None,
    )
    evidence = f"Change of the share of singular values below 0.01 s1, mean over layers: {_listed(relative, _share)}."
    if absolute:
        evidence += f" Below 0.01: {_listed(absolute, _share)}."
    if {outcome, absolute_outcome} == {"supported", "contradicted"}:
        outcome = "undecided"
        evidence += " The two thresholds give opposite results."
    if own:
        evidence += f" On each run's own batch the change is: {_listed(own, _share)}"
        before = grown(RELATIVE, _own_untrained)
        evidence += (f", and in the untrained networks {_listed(before, _share)}" if before else "") + "."
    return Claim("near_rank_loss_grows", claim, outcome, evidence, control)


def _explains(
    arm_roles: Roles, base: Arm, gap: Claim, grows: Claim, correlations: Sequence[Correlation], metric: _Metric
) -> Claim:
    name = metric.description.name
    harm = f"{name} loss" if metric.description.higher_is_better else f"added {name}"
    key, claim = "explains", f"Near-rank loss causes the {harm} of large batches."
    control = (
        "An arm with a penalty on near-rank loss, against the same arm without the penalty, minus the effect of the "
        "penalty on the baseline."
    )
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NO_GAP, control)
    pairs = [
        (arm, control_arm)
        for arm, control_arm in arm_roles.penalised
        if control_arm.global_size > base.global_size
        and score_lost(control_arm, base)
        and _mean(score_lost(control_arm, base)) > 0
    ]
    # the effect of the penalty at the small batch: if it helps there as much, it does not explain the gap
    small = next((pair for pair in arm_roles.penalised if pair[0].global_size == base.global_size), None)
    small_gain = {seed: -lost for seed, lost in score_lost(*small).items()} if small else {}
    lowered, gains = [], []
    for arm, control_arm in pairs:
        gain = {seed: -lost for seed, lost in score_lost(arm, control_arm).items()}
        gain = {
            seed: value - small_gain.get(seed, 0.0) for seed, value in gain.items() if not small or seed in small_gain
        }
        change = contrast(
            arm.name, near_rank_loss_increase(RELATIVE, _trained, _penalised_layers(arm))(arm, control_arm)
        )
        if change and (gained := contrast(arm.name, gain)):
            lowered.append(change)
            gains.append(gained)
    (lowered,), (gains,) = corrected(lowered), corrected(gains)
    verdicts: list[Outcome] = []
    words: list[str] = []
    for change_of_arm, gain in zip(lowered, gains, strict=True):
        arm, control_arm = next(pair for pair in pairs if pair[0].name == change_of_arm.name)
        growth = near_rank_loss_increase(RELATIVE, _trained, _penalised_layers(arm))(control_arm, base)
        verdict, reason = _penalty_outcome(
            change_of_arm, gain, _mean(growth) if growth else 0.0, _mean(score_lost(control_arm, base)), metric
        )
        if verdict == "supported" and not small:
            verdict, reason = "undecided", f"{name} returns, but no arm has the penalty at the baseline's batch"
        verdicts.append(verdict)
        words.append(
            f"{arm.name} changes near-rank loss by {_share(change_of_arm)}, {name} by {metric.difference(gain)} of "
            f"{metric.description.format_difference(_mean(score_lost(control_arm, base)), signed=False)} lost: {reason}"
        )
    evidence = "; ".join(words) or "No arm has a penalty on near-rank loss"
    note = _correlation_note(correlations, metric)
    decided: list[Outcome] = [verdict for verdict in verdicts if verdict != "undecided"]
    if not decided and grows.outcome == "contradicted":
        evidence = f"There is a gap, and near-rank loss does not grow with the batch. {evidence}"
        return Claim(key, claim, "contradicted", f"{evidence}. {note}".strip(), grows.control)
    outcome: Outcome = decided[0] if len(set(decided)) == 1 else "undecided"
    return Claim(key, claim, outcome, f"{evidence}. {note}".strip(), control)


def _penalty_outcome(
    change: Contrast, gain: Contrast, growth: float, lost: float, metric: _Metric
) -> tuple[Outcome, str]:
    """Outcome for one penalised arm, and the reason.

    Args:
        change: near-rank loss with the penalty minus that without it.
        gain: score with the penalty minus that without it.
        growth: near-rank loss without the penalty minus that of the baseline.
        lost: score lost without the penalty.
        metric: of the scores.
    """
    if not change.is_significant(-1) or -change.mean < HALF * growth:
        return "undecided", "near-rank loss falls by less than half of its growth, so this arm decides nothing"
    if gain.is_significant(-1) and gain.mean < -metric.negligible:
        return "undecided", f"the penalty itself worsens {metric.description.name}, so this arm decides nothing"
    if gain.high < HALF * lost:
        return "contradicted", f"near-rank loss falls, and less than half of the {metric.description.name} returns"
    if gain.is_significant(1) and gain.mean >= HALF * lost:
        return "supported", f"near-rank loss falls, and {metric.description.name} returns"
    return "undecided", "the interval is too wide to decide"


def _penalised_layers(arm: Arm) -> Sequence[str]:
    """Layers to which an arm's penalty applies; empty for all."""
    layers = arm.settings.get("algorithm.rank_layers")
    named = [str(layer) for layer in layers] if isinstance(layers, list | tuple) else []
    return [] if any(layer == "auto" or "*" in layer for layer in named) else named


def _mean(values: Mapping[int, float]) -> float:
    return fmean(values.values())


def _correlation_note(correlations: Sequence[Correlation], metric: _Metric) -> str:
    """The strongest correlations as a sentence; they decide no claim."""
    strongest = ", ".join(
        f"{c.measure} {c.r:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
        + ("" if c.partial is None else f" ({c.partial:+.2f} given updates)")
        for c in [c for c in correlations if c.interval][:3]
        if c.interval
    )
    harm = metric.description.harm
    return f"Strongest correlations with {harm} (not evidence of a cause): {strongest}." if strongest else ""


def _remedy(
    key: str, claim: str, pairs: Sequence[tuple[Arm, Arm | None]], base: Arm, gap: Claim, metric: _Metric
) -> Claim:
    """Whether all arms with a remedy leave the gap open (supported), or one of them closes it (contradicted).

    Each arm is compared with its control, the arm with the same batch size without the remedy. If the control is not
    worse, there is no gap to close.
    """
    control = (
        f"The arm with the same batch without the remedy, which must lose {metric.description.name}, and the baseline."
    )
    if gap.outcome != "supported":
        return Claim(key, claim, "undecided", NO_GAP, control)
    both = [
        (arm, control_arm)
        for arm, control_arm in pairs
        if control_arm and score_lost(arm, base) and score_lost(control_arm, base)
    ]
    (left,) = corrected(contrasts([(arm, base) for arm, _ in both], score_lost))
    control_arms = {control_arm.name: control_arm for _, control_arm in both}
    (before,) = corrected(contrasts([(control_arm, base) for control_arm in control_arms.values()], score_lost))
    verdicts: list[Outcome] = []
    sentences: list[str] = []
    for (arm, control_arm), c in zip(both, left, strict=True):
        lost = next(each for each in before if each.name == control_arm.name)
        unit = " points" if metric.description.unit == "share" else ""
        text = f"{arm.name} leaves {metric.difference(c)} of the {metric.difference(lost)}{unit} that "
        text += f"{control_arm.name} loses"
        interval = t_interval([*c.values.values()], 1 - ALPHA / len(both)) if c.interval else None
        high = interval[1] if interval else float("inf")  # corrected, because one of several arms suffices
        if not lost.is_significant(1):
            sentences.append(f"{text}, so there is no gap to close")
            continue
        if high >= metric.negligible and c.is_significant(1):
            verdicts.append("supported")
        elif high < metric.negligible or high < CLOSED * lost.mean:
            verdicts.append("contradicted")
            text += " and so closes the gap"
        else:
            verdicts.append("undecided")
            text += ", the interval is too wide to decide"
        sentences.append(text)
    sentences += [
        f"{arm.name} has no arm without the remedy to compare with" for arm, control_arm in pairs if control_arm is None
    ]
    evidence = "; ".join(sentences) + "." if sentences else "No arm with the remedy shares a seed with the baseline."
    if "contradicted" in verdicts:
        return Claim(key, claim, "contradicted", evidence, control)
    left_open = bool(verdicts) and all(verdict == "supported" for verdict in verdicts)
    return Claim(key, claim, "supported" if left_open else "undecided", evidence, control)


# -- text -------------------------------------------------------------------------------------------------------------


def _listed(tested: Sequence[Contrast], show: Callable[[Contrast], str]) -> str:
    return ", ".join(f"{c.name} {show(c)}" for c in tested)


def _share(c: Contrast) -> str:
    return f"{c.mean:+.3f}" + _bounds(c, "{:+.3f}".format)


def _bounds(c: Contrast, show: Callable[[float], str]) -> str:
    if c.interval is None:
        return " (one pair)" if len(c.values) == 1 else f" (the same in all {len(c.values)} pairs: no interval)"
    return f" [{show(c.interval[0])}, {show(c.interval[1])}]"
