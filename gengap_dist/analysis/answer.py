"""The answer to a study's question, in one or two sentences for the top of its report."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from gengap_dist.analysis.arm_roles import Arm
from gengap_dist.analysis.results import Claim
from gengap_dist.analysis.rules.gap import NO_LOSS, Difference, detectable
from gengap_dist.analysis.rules.judged import JudgedStudy, described
from gengap_dist.analysis.rules.look import array_of
from gengap_dist.analysis.rules.training import Training

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
    if not study.training[base.name].trained:
        return f"Nothing can be said: the baseline ({base.name}) did not train."
    if not gaps:
        return ""
    ordered = sorted(gaps, key=lambda each: each.arm.global_size)
    none_up_to, shown = _no_loss(study, ordered)
    others = [each for each in ordered if each not in shown]
    told = _most_harmful(others)
    decided = [none_up_to, *(_decided(study, each) for each in told if _is_decided(each))]
    failed = [each for each in told if not _is_decided(each) and _lacks_runs(study.training[each.arm.name])]
    open_ones = [_undecided(study, each) for each in told if not _is_decided(each) and each not in failed]
    cause = CAUSES.get(explanation.finding, "")
    if cause and not all(each.match.how for each in gaps):
        cause += ", by the arms that train as well; the losses are not equal in training"
    num_rest = len(others) - len(told)
    sentences = [
        "; ".join(filter(None, decided)),
        f"Not decided: {'; '.join(open_ones)}" if open_ones else "",
        study.look.sentence.removesuffix(".") if open_ones and not study.look.level else "",
        *_failures(study, failed),
        f"{num_rest} other arms: see their table" if num_rest else "",
        cause or _harmless(study, gaps, growths),
    ]
    return " ".join(text[0].upper() + text[1:] + "." for text in sentences if text)


def _is_decided(gap: Difference) -> bool:
    return gap.finding == "above the margin" or gap.finding in NO_LOSS


def _lacks_runs(training: Training) -> bool:
    return bool(training.num_failed or training.num_unknown)


def _certainty(study: JudgedStudy, where: str) -> str:
    """The level of an interval, and what it is for: "99%, new images"."""
    return ", ".join(filter(None, [study.look.confidence, where.removeprefix("on ")]))


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
    certainty = _certainty(study, last.where)
    return f"up to batch {last.arm.global_size:,} {harm} above {margin} is seen ({values}, {certainty})", shown


def _mean(each: Difference) -> float:
    return fmean(each.values.values())


def _name(arm: Arm) -> str:
    return f"batch {arm.global_size:,} ({arm.name})"


def _decided(study: JudgedStudy, gap: Difference) -> str:
    values, certainty = study.described(gap.values, gap.interval), _certainty(study, gap.where)
    if gap.finding == "above the margin":
        return f"{_name(gap.arm)} {study.loses(1.0)} {values}{study.unit} ({certainty}) at equal training"
    margin = f"{study.show(study.margin, signed=False)}{study.unit}"
    return f"{_name(gap.arm)} {study.loses(1.0)} no more than {margin} ({values}, {certainty})"


def _undecided(study: JudgedStudy, gap: Difference) -> str:
    """What an arm loses by all that is known, and why that does not decide."""
    name, training = _name(gap.arm), study.training[gap.arm.name]
    if gap.values and gap.interval and math.isfinite(gap.interval[0]):
        mean = _mean(gap)
        values = study.described(gap.values, gap.interval, turned=mean < 0)
        text = f"{name} {study.loses(mean)} {values}{study.unit} ({_certainty(study, gap.where)}) at equal training"
        if gap.reason != gap.match.reason:
            return f"{text}, but {gap.reason}"
        least = detectable(study, gap)
        harm = "a loss" if study.metric.higher_is_better else f"an added {study.metric.name}"
        found = f"; {harm} of {study.show(least, signed=False)} would be found four times in five" if least else ""
        return text + found
    lost = study.lost(gap.arm, study.base)
    if not lost:
        return f"{name} cannot be compared"
    mean = fmean(lost.values())
    shown, certainty = f"{study.show(abs(mean), signed=False)}{study.unit}", ""
    interval = study.look.interval(array_of(lost))
    if interval and math.isfinite(interval[0]):
        shown = f"{study.described(lost, turned=mean < 0)}{study.unit}"
        certainty = f" ({_certainty(study, 'on these test samples')})"
    total = f"{name} {study.loses(mean)} {shown}{certainty} at the end"
    in_training = -fmean(training.difference.values()) if training.difference else 0.0
    if training.label == "less" and 0 < in_training <= mean:
        part = study.show(in_training, signed=False)
        return f"{total}, of which {part} on training samples too: it is trained less, not shown to generalize worse"
    if training.label == "less":
        return f"{total}, and it is trained less: it is not shown to generalize worse"
    if gap.finding == "cannot be matched":
        return f"{total}, and cannot be matched in training: {gap.reason}"
    return total if not study.look.level else f"{total}, from {len(lost)} pair{'s' * (len(lost) > 1)} of seeds"


def _failures(study: JudgedStudy, failed: Sequence[Difference]) -> list[str]:
    """Sentences without their full stop: which arms have runs that did not train, or no result, and what to do."""
    base = study.base
    named = [(_name(each.arm), each.arm) for each in failed]
    if len(study.training[base.name].trained) < len(study.training[base.name].seeds):
        named.append((f"the baseline {base.name}", base))
    of = [(name, study.training[arm.name]) for name, arm in named]
    clauses = [
        _counted("did not train", [(name, each.num_failed, len(each.seeds)) for name, each in of]),
        _counted("has no result", [(name, each.num_unknown, len(each.seeds)) for name, each in of]),
    ]
    text = "; ".join(filter(None, clauses))
    num_diverged = sum(run.status == "diverged" for _, arm in named for run in arm.unfinished.values())
    num_failed = sum(each.num_failed for _, each in of)
    remedy = "lower the learning rate" if num_diverged else ""
    if num_failed > num_diverged:
        remedy = f"train longer{', and lower the learning rate where runs diverged' * bool(num_diverged)}"
    return [f"Not answered: {text}" if failed else text, remedy]


def _counted(what: str, counts: Sequence[tuple[str, int, int]]) -> str:
    """What was so in some runs of each arm; empty if it was so in none.

    Args:
        what: the verb.
        counts: name of an arm, runs of which it holds, all its runs.

    >>> _counted("did not train", [("b8", 2, 2), ("b16", 0, 2), ("b32", 1, 2), ("b64", 1, 4)])
    'b8 did not train in 2 of 2 runs, b32 in 1 of 2 and b64 in 1 of 4'
    """
    some = [(name, count, total) for name, count, total in counts if count]
    texts = [
        f"{name} in {count} of {total}" if at else f"{name} {what} in {count} of {total} runs"
        for at, (name, count, total) in enumerate(some)
    ]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _harmless(study: JudgedStudy, gaps: Sequence[Difference], growths: Sequence[Difference]) -> str:
    """That near-rank loss grows where no loss counts, if it does so for every arm; else empty."""
    grown = {each.arm.name: each for each in growths if each.finding == "above the margin"}
    if not gaps or not all(each.finding in NO_LOSS and each.arm.name in grown for each in gaps):
        return ""
    found = grown[max(gaps, key=lambda each: each.arm.global_size).arm.name]
    shown = described(found.values, "{:+.3f}".format, found.interval)
    shown = f"{shown}, {study.look.confidence}"
    return f"near-rank loss grows with the batch ({shown}), and no loss above the margin goes with it"
