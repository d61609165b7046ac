"""The tables of a report: cells are what people read, each with the number it is sorted by."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gengap_dist.analysis.report.plotting import Row
from gengap_dist.analysis.report.text import interval, last_layer, percent, points
from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.study_data import RunData, StudyData, metric
from gengap_dist.statistics.paired import Interval, spread


class Cell(NamedTuple):
    """One cell."""

    text: str
    number: float | None = None
    """What it is sorted by; None for words."""


class Table(NamedTuple):
    """Heads, and rows of as many cells; the first cell of a row is its name."""

    name: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


MISSING = Cell("-", float("nan"))


def number(value: Any, style: str = ",.4g", text: str | None = None) -> Cell:
    """A number as a cell; a dash, sorted last, for one that is missing.

    >>> number(1234, ","), number(None).text, number("nan").text
    (Cell(text='1,234', number=1234.0), '-', '-')
    """
    if value is None or (known := float(value)) != known:
        return MISSING
    return Cell(format(value, style) if text is None else text, known)


def _interval(pair: Interval | None) -> Cell:
    return MISSING if pair is None else Cell(interval(pair), sum(pair) / 2)


def arm_table(study: StudyData, said: Comparison) -> Table:
    """One row per arm: accuracy, gap, what could have been seen, and what was lost."""
    last = last_layer(study)
    heads = ["arm", "batch", "updates", "seeds", "test acc. (sd)", "gap", "95% t", "95% bootstrap", "Holm p"]
    heads += ["unseen below", "found from", "matched"]
    heads += [f"near-rank loss {last}", f"eff. rank {last}"] if last else []
    rows = []
    for arm in study.arms:
        if not (runs := study.of(arm)):
            if lost := study.not_finished(arm):
                row = [Cell(arm), MISSING, MISSING, Cell(f"0, {lost}", 0)]
                rows.append([*row, *[MISSING] * (len(heads) - len(row))])
            continue
        accuracies, found = list(study.results(arm, "test/accuracy").values()), said.gaps.get(arm)
        mean, deviation = spread(accuracies) if accuracies else (None, float("nan"))
        row = [
            Cell(arm),
            number(runs[0].global_size, ","),
            number(runs[0].info.get("num_steps"), ","),
            Cell(str(len(accuracies)) + (f" + {lost}" if (lost := study.not_finished(arm)) else ""), len(accuracies)),
            number(mean, text=percent(mean) + (f" ({100 * deviation:.2f})" if deviation == deviation else "")),
        ]
        if arm == said.baseline:
            row += [Cell("baseline", 0.0), *[MISSING] * 5, Cell("")]
        elif found is None:
            row += [*[MISSING] * 6, Cell("no pair")]
        else:
            row += [
                number(found.paired.mean, text=points(found.paired.mean)),
                _interval(found.paired.student),
                _interval(found.paired.bootstrap),
                number(found.holm, ".2g"),
                *(
                    number(v, text="" if v is None else f"{100 * v:.2f}")
                    for v in (found.ci_half_width, found.minimum_detectable_effect)
                ),
                Cell(found.matched or "nothing"),
            ]
        for name, threshold in (("near_rank_loss", "rel_1e-2"), ("effective_rank", "")) if last else ():
            ends = [run.untrained_and_trained(metric(name, last or "", threshold))[1] for run in study.finished(arm)]
            row.append(number(spread(ends)[0] if ends else None, ".3g"))
        rows.append(row)
    return Table(
        "Arms",
        f"Gap: test accuracy of {said.baseline} minus the arm's, in percentage points, paired by seed; p by the paired "
        't test, corrected for all arms (Holm). With this spread and these seeds a difference below "unseen below" is '
        'not told from none, and a true one of "found from" is found four times in five. Matched: what the arm has in '
        "common with the baseline.",
        heads,
        rows,
    )


def run_table(study: StudyData) -> Table:
    """One row per run, whatever became of it."""
    heads = ["arm", "seed", "status", "updates", "test, last", "test, best by validation", "train", "train_test_gap"]
    heads += ["images/s", "seconds"]
    rows = []
    for run in (run for arm in study.arms for run in study.of(arm)):
        result = run.info.get("result") or {}
        shares = [result.get(f"{name}/accuracy") for name in ("test", "test_at_best_val", "train_full")]
        shares = [None if share is None else float(share) for share in shares]
        gap = result.get("train_test_gap")
        rows.append(
            [
                Cell(run.arm),
                number(run.seed, ""),
                Cell(run.info["status"]),
                number(result.get("num_steps", run.info.get("num_steps")), ","),
                *(number(share, text=percent(share)) for share in shares),
                number(gap, text="" if gap is None else points(float(gap))),
                number(result.get("images_per_second"), ",.0f"),
                number(run.info.get("seconds"), ",.1f"),
            ]
        )
    return Table("Runs", "Every run, also those that came to no result.", heads, rows)


def tuning_tables(tuned: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], Table]]:
    """For each tuned arm: its best setting in words, its edge flags, and all its trials."""
    out = []
    for arm, found in tuned.items():
        trials = [dict(trial) for trial in found.get("trials") or []]
        settings = [trial.pop("setting", None) or {} for trial in trials]
        flat = [setting | trial for setting, trial in zip(settings, trials, strict=True)]
        best = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in (found.get("best") or {}).items())  # fmt: skip
        table = data_table(f"Trials of {arm}", [{"trial": at, **trial} for at, trial in enumerate(flat)])
        out.append((f"{arm}: {best or 'no trial came to a result'}", list(found.get("edge") or []), table))
    return out


def data_table(name: str, rows: Sequence[Row]) -> Table:
    """Rows of a picture as a table."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return Table(name, "", heads, [[_any(row.get(head)) for head in heads] for row in rows])


def _any(value: object) -> Cell:
    if isinstance(value, bool | str):
        return Cell(str(value))
    return number(value, ",.4g" if isinstance(value, float) else "") if isinstance(value, int | float) else MISSING


def first_to_show(study: StudyData) -> RunData | None:
    """The run whose facts stand for all: the first finished one, else the first."""
    done = [run for arm in study.arms for run in study.finished(arm)]
    return next(iter([*done, *study.runs]), None)
