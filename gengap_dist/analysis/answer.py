"""The answer to a study's question, in one or two sentences for the top of its report."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from gengap_dist.analysis.results import Claim
from gengap_dist.analysis.rules.gap import NO_LOSS, Difference
from gengap_dist.analysis.rules.judged import JudgedStudy, described

MAX_CLAUSES = 8  # arms in the answer

CAUSES = {
    "explains most": "near-rank loss explains most of the loss of large batches",
    "explains less than half": "near-rank loss explains less than half of the loss of large batches",
    "routes disagree": "what gives the loss of large batches back is not the rank: two ways to raise it disagree",
    "contributes": "near-rank loss contributes to the loss of large batches",
    "does not grow": "near-rank loss does not grow with large batches, and so is not the cause of the loss",
}


def answer(study: JudgedStudy, gaps: Sequence[Difference], growths: Sequence[Difference], explanation: Claim) -> str:
    """What the study says of the gap, and of near-rank loss as its cause if that was asked."""
    base = study.base
    of_base = study.training[base.name]
    if not of_base.trained:
        return f"Nothing can be said: the baseline ({base.name}) did not train."
    ordered = sorted(gaps, key=lambda each: each.arm.global_size)
    none_up_to, shown = _no_loss(study, ordered)
    others = [each for each in ordered if each not in shown]
    told = _most_harmful(others)
    clauses = [*([none_up_to] if none_up_to else []), *(_clause(study, each) for each in told)]
    if len(told) < len(others):
        clauses.append(f"{len(others) - len(told)} other arms: see their table")
    if len(of_base.trained) < len(of_base.seeds):
        clauses.append(f"of the baseline {base.name}, {of_base}")
    if not gaps:
        return ""
    cause = CAUSES.get(explanation.finding, "")
    if cause and not all(each.match.how for each in gaps):
        cause += ", by the arms that train as well; the losses are not equal in training"
    sentences = ["; ".join(clauses), cause or _harmless(gaps, growths)]
    return " ".join(text[0].upper() + text[1:] + "." for text in sentences if text)


def _most_harmful(gaps: Sequence[Difference]) -> list[Difference]:
    """Of too many for a sentence those with the largest loss above the margin, in the same order."""
    by_loss = sorted(gaps, key=lambda each: -_mean(each) if each.finding == "above the margin" else 0.0)
    kept = {each.arm.name for each in by_loss[:MAX_CLAUSES]}
    return [each for each in gaps if each.arm.name in kept]


def _no_loss(study: JudgedStudy, gaps: Sequence[Difference]) -> tuple[str, list[Difference]]:
    """The largest batch up to which every arm stays below the margin, and the arms that this says."""
    shown: list[Difference] = []
    for _, of_size in groupby(gaps, key=lambda each: each.arm.global_size):
        arms = [*of_size]
        if not all(each.finding in NO_LOSS for each in arms):
            break
        shown += arms
    if not shown:
        return "", []
    last = max((each for each in shown if each.arm.global_size == shown[-1].arm.global_size), key=_mean)
    margin = f"{study.show(study.margin, signed=False)}{study.unit}"
    values = study.described(last.values, last.interval)
    harm = "no loss" if study.metric.higher_is_better else f"no added {study.metric.name}"
    return f"up to batch {last.arm.global_size:,} {harm} above {margin} is seen ({values}, {last.where})", shown


def _mean(each: Difference) -> float:
    return fmean(each.values.values())


def _clause(study: JudgedStudy, gap: Difference) -> str:
    arm, training = gap.arm, study.training[gap.arm.name]
    name = f"batch {arm.global_size:,} ({arm.name})"
    if gap.finding == "above the margin":
        values = study.described(gap.values, gap.interval)
        return f"{name} {study.loses(1.0)} {values}{study.unit} at equal training, {gap.where}"
    if gap.finding in NO_LOSS:
        return f"{name} {study.loses(1.0)} no more ({study.described(gap.values, gap.interval)})"
    if training.num_failed or training.num_unknown:
        return f"{name} {training}" if training.num_failed else f"{name}: {training}"
    lost = study.lost(arm, study.base)
    if not lost:
        return f"{name} cannot be compared"
    mean = fmean(lost.values())
    total = f"{name} {study.loses(mean)} {study.show(abs(mean), signed=False)}{study.unit} at the end"
    in_training = -fmean(training.difference.values()) if training.difference else 0.0
    if training.label == "less" and 0 < in_training <= mean:
        part = study.show(in_training, signed=False)
        return f"{total}, of which {part} on training samples too: it is trained less, not shown to generalize worse"
    if training.label == "less":
        return f"{total}, and it is trained less: it is not shown to generalize worse"
    if gap.finding == "cannot be matched":
        return f"{total}, and cannot be matched in training: {gap.reason}"
    return f"{total}, which decides nothing ({gap.reason})"


def _harmless(gaps: Sequence[Difference], growths: Sequence[Difference]) -> str:
    """That near-rank loss grows where no loss counts, if it does so for every arm; else empty."""
    grown = {each.arm.name: each for each in growths if each.finding == "above the margin"}
    if not gaps or not all(each.finding in NO_LOSS and each.arm.name in grown for each in gaps):
        return ""
    found = grown[max(gaps, key=lambda each: each.arm.global_size).arm.name]
    shown = described(found.values, "{:+.3f}".format, found.interval)
    return f"near-rank loss grows with the batch ({shown}), and no loss above the margin goes with it"
