"""The answer to a study's question, in one or two sentences for the top of its report."""

from collections.abc import Sequence
from statistics import fmean

from gengap_dist.analysis.results import Claim
from gengap_dist.analysis.rules.gap import Difference
from gengap_dist.analysis.rules.judged import JudgedStudy, described

NO_LOSS = ("below the margin", "there, but below the margin")


def answer(study: JudgedStudy, gaps: Sequence[Difference], growths: Sequence[Difference], explanation: Claim) -> str:
    """What the study says of the gap, and of near-rank loss as its cause if that was asked."""
    base = study.base
    if study.training[base.name].num_failed and not study.training[base.name].trained:
        return f"Nothing can be said: the baseline ({base.name}) did not train."
    clauses = [clause for clause in (_no_loss(study, gaps), *(_clause(study, each) for each in gaps)) if clause]
    if not clauses:
        return ""
    text = "; ".join(clauses)
    text = text[0].upper() + text[1:] + "."
    causes = {
        "explains most": "Near-rank loss explains most of the loss.",
        "explains less than half": "Near-rank loss explains less than half of the loss.",
        "routes disagree": "What gives the loss back is not the rank: two ways to raise it disagree.",
        "contributes": "Near-rank loss contributes to the loss.",
        "does not grow": "Near-rank loss does not grow with the batch, and so is not the cause.",
    }
    return " ".join(filter(None, [text, causes.get(explanation.finding) or _harmless(gaps, growths)]))


def _harmless(gaps: Sequence[Difference], growths: Sequence[Difference]) -> str:
    """That near-rank loss grows where no loss counts, if it does so for every arm; else empty."""
    grown = {each.arm.name: each for each in growths if each.finding == "above the margin"}
    if not gaps or not all(each.finding in NO_LOSS and each.arm.name in grown for each in gaps):
        return ""
    largest = max(gaps, key=lambda each: each.arm.global_size)
    found = grown[largest.arm.name]
    shown = described(found.values, "{:+.3f}".format, found.interval)
    return f"Near-rank loss grows with the batch ({shown}), and no loss that counts goes with it."


def _no_loss(study: JudgedStudy, gaps: Sequence[Difference]) -> str:
    """The largest batch up to which every arm stays below the margin."""
    last: Difference | None = None
    for each in sorted(gaps, key=lambda each: each.arm.global_size):
        if each.finding not in NO_LOSS:
            break
        last = each
    if last is None:
        return ""
    margin = f"{study.show(study.margin, signed=False)}{study.unit}"
    shown = described(last.values, lambda value: study.show(value), last.interval)
    return f"up to batch {last.arm.global_size:,} no loss above {margin} is seen ({shown})"


def _clause(study: JudgedStudy, gap: Difference) -> str:
    arm, base = gap.arm, study.base
    training = study.training[arm.name]
    name = f"batch {arm.global_size:,} ({arm.name})"
    if gap.finding in NO_LOSS:
        return ""
    if gap.finding == "above the margin":
        return f"{name} loses {described(gap.values, study.show, gap.interval)}{study.unit} at equal training"
    if training.num_failed:
        return f"{name} {training}"
    lost = study.lost(arm, base)
    if not lost:
        return f"{name} cannot be compared"
    total = f"{name} loses {study.show(fmean(lost.values()), signed=False)}{study.unit}"
    less = {seed: -value for seed, value in training.difference.items()}
    if training.label == "less" and less:
        part = study.show(fmean(less.values()), signed=False)
        return f"{total}, of which {part} on training samples too: it is trained less, not shown to generalize worse"
    if gap.finding == "cannot be matched":
        return f"{total} at the end, and cannot be matched in training: {gap.reason}"
    return f"{total}, which decides nothing yet"
