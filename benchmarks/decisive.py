"""Writes the tables and figures of docs/results/decisive.md from the slim folders in docs/results/decisive.

    python benchmarks/decisive.py

Nothing is trained. The text of the page is written by hand; the parts between `<!-- STUDY TABLE -->` and
`<!-- /STUDY TABLE -->` are generated, STUDY being the name of a folder. tests/test_decisive.py says that the page is
what the folders give.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tables import fill, table

from gengap_dist.analysis.report.plotting import ACCENT, COLOURS, INK, PAPER, QUIET, STYLE, WARM, label_points
from gengap_dist.analysis.report.tables import Table, intervention_tables
from gengap_dist.analysis.results import Estimate, InterventionResult
from gengap_dist.analysis.rules.gap import new_images
from gengap_dist.analysis.rules.intervention import QUARTER, SAME_RANK
from gengap_dist.analysis.rules.look import Look
from gengap_dist.analysis.study_data import RunData, StudyData, pooled_near_rank_loss, read_study
from gengap_dist.statistics.paired import critical_t
from gengap_dist.statistics.sequential import look_level
from gengap_dist.statistics.two_way import two_way

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGE, FOLDER = "decisive.md", "decisive"


class Network(NamedTuple):
    """What the tables show of a network."""

    layers: tuple[str, ...]
    """Penalised layers, as they are measured, the last hidden one last."""
    weights: tuple[str, ...]
    """Layers whose norms of weights are shown."""
    step: int = 215
    """A measurement of every arm, after the warm-up, whose update is shown."""


NETWORKS = {
    "mlp": Network(("fc1", "fc2"), ("fc1.affine", "fc2.affine", "head")),
    "lenet5": Network(("fc1", "fc2"), ("fc1.affine", "fc2.affine", "fc3")),
    "resnet20": Network(
        tuple(f"stage3.{block}.act/pool" for block in range(3)),
        ("stage3.2.conv1.affine", "stage3.2.conv2.affine", "head"),
        step=100,
    ),
}


def studies(results: Path = RESULTS) -> dict[str, StudyData]:
    """The studies whose slim folders are there, by the name of the folder."""
    return {path.parent.name: read_study(path.parent) for path in sorted(results.glob(f"{FOLDER}/*/study.json"))}


def write(results: Path = RESULTS) -> None:
    """Fill the page, and draw its figures."""
    page = results / PAGE
    text = page.read_text()
    for name, study in studies(results).items():
        for title, body in bodies(study).items():
            text = fill(text, f"{name} {title}", body)
        if is_judged(study):
            draw(study, results / f"{FOLDER}_{name}.svg")
    page.write_text(text)


def bodies(study: StudyData) -> dict[str, str]:
    """The generated parts of the page that are about one study."""
    comparison = study.comparison
    if not is_judged(study):
        return {"arms": arms(study), "differences": differences(study)}
    out = {
        "summary": f"{comparison.answer}\n\n{study.registration}{''.join(f' {text}' for text in comparison.caveats)}",
        "arms": arms(study),
        "claims": claims(study),
        "scale": scale(study),
    }
    if {"sb-raise", "lb-raise"} <= {*study.arms}:
        out["measures"] = measures(study)
    if "sb-lower" not in study.arms:
        out["differences"] = differences(study)
    if {"lb-trace", "lb-raise"} <= {*study.arms} and not is_at_floor(study):
        out["same rank"] = same_rank(study)
    if comparison.interventions and len(study.info["seeds"]) < max(looks(study), default=0):
        out["second look"] = second_look(study, comparison.interventions[0])
    for found in intervention_tables(comparison):
        out["contrasts" if found.name.startswith("Intervention") else "conditions"] = markdown(found)
    return out


def is_judged(study: StudyData) -> bool:
    """Whether it has the seeds of its first look."""
    return len(study.info["seeds"]) >= min(looks(study), default=0)


def markdown(found: Table) -> str:
    """A table of the report in Markdown."""
    return table(found.heads, [[cell.text for cell in row] for row in found.rows])


# -- tables -----------------------------------------------------------------------------------------------------------


def arms(study: StudyData) -> str:
    """What each arm reached."""
    comparison, layer = study.comparison, layers(study)[-1]
    head = ["arm", "batch", "updates", "seeds", "test accuracy, %", "on training images, %", "loss ratio"]
    head += ["near-rank loss", "raw", "abs < .01"]
    rows = []
    for arm in study.arms:
        runs = study.finished_runs(arm)
        if not runs:
            continue
        near_rank_losses = [f"near_rank_loss/{layer}{view}" for view in ("/centred/rel_1e-2", "/rel_1e-2", "/abs_1e-2")]
        trained = comparison.training.get(arm)
        rows.append(
            [
                arm,
                f"{runs[0].global_size:,}",
                f"{runs[0].info['num_steps']:,}",
                str(len(runs)),
                spread([100 * run.info["result"]["test/accuracy"] for run in runs]),
                spread([100 * run.info["result"]["train_full/accuracy"] for run in runs]),
                "" if not trained or trained.loss_ratio is None else f"{trained.loss_ratio:.2f}",
                *(f"{np.mean([last(run, name) for run in runs]):.3f}" for name in near_rank_losses),
            ]
        )
    return table(head, rows)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.2f}" + (f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else "")


def claims(study: StudyData) -> str:
    """Outcome and evidence of every claim."""
    return "\n".join(
        f"- **{claim.outcome}{f' ({claim.finding})' if claim.finding else ''}**: {claim.claim} {claim.evidence}"
        for claim in study.comparison.claims
    )


def same_rank(study: StudyData) -> str:
    """The registered contrast of two arms with the same near-rank loss: lb-trace minus lb-raise."""
    look = study.look
    whole, found = contrast(study, "sb", "lb"), contrast(study, "lb-trace", "lb-raise")
    growth, lost = -whole.near_rank_loss, whole.score
    is_same = look.is_within(found.near_rank_loss, SAME_RANK * growth)
    is_better = look.is_above(found.score - QUARTER * lost)
    rows = [
        [
            "near-rank loss",
            number(found.near_rank_loss, look),
            "",
            f"within ±{SAME_RANK * growth.mean():.3f}",
            yes(is_same),
        ],
        ["test accuracy, points", *found.points(look), f"above {100 * QUARTER * lost.mean():.2f}", yes(is_better)],
    ]
    return table(["lb-trace minus lb-raise", "these images", "new images", "must be", "surely"], rows)


class Contrast(NamedTuple):
    """One arm minus another, seed by seed."""

    score: np.ndarray
    """Test accuracy: [n]."""
    by_image: np.ndarray
    """Right (1) or wrong (0), of every test image: [n, M]."""
    near_rank_loss: np.ndarray
    """Of the last hidden layer, centred, or, where that is 0 everywhere, what `lost_rank` says: [n]."""

    def points(self, look: Look) -> tuple[str, str]:
        """Points of test accuracy with the interval on these images, and that on new images."""
        num_seeds, num_images = self.by_image.shape
        new, _ = new_images(two_way(self.by_image), look, num_seeds, num_images, 0.0)
        on_new = "-" if new is None or not np.isfinite(new).all() else f"[{100 * new[0]:+.2f}, {100 * new[1]:+.2f}]"
        return number(100 * self.score, look, "{:+.2f}".format), on_new


def contrast(study: StudyData, arm: str, other: str) -> Contrast:
    """`arm` minus `other`."""

    def difference(measure: Callable[[RunData], Any]) -> np.ndarray:
        of = values(study, measure, (arm, other))
        return of[arm].astype(float) - of[other]

    return Contrast(
        difference(lambda run: run.info["result"]["test/accuracy"]),
        difference(lambda run: run.test_correct()),
        difference(rank_measure(study)),
    )


def rank_measure(study: StudyData) -> Callable[[RunData], float]:
    """Near-rank loss of the claims; where it is 0 everywhere, `lost_rank`."""
    layer = layers(study)[-1]
    if is_at_floor(study):
        return partial(lost_rank, layer=layer)
    return partial(last, name=primary(layer))


def rank_label(study: StudyData) -> str:
    """What `rank_measure` is."""
    return "1 - effective rank / units" if is_at_floor(study) else "near-rank loss"


def differences(study: StudyData) -> str:
    """Each arm minus the one that it changes, minus its placebo or the weakest dose, or minus the small batch."""
    rows = []
    for arm, other in pairs(study.arms):
        found = contrast(study, arm, other)
        rows.append([f"{arm} minus {other}", *found.points(study.look), number(found.near_rank_loss, study.look)])
    return table(["arms", "test accuracy, points", "on new images", rank_label(study)], rows)


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of arms that `differences` compares.

    >>> pairs(["sb", "lb", "lb-raise", "lb-placebo"])
    [('lb', 'sb'), ('lb-raise', 'lb'), ('lb-raise', 'lb-placebo'), ('lb-placebo', 'lb')]
    >>> pairs(["sb", "sb-half", "lb-half", "lb-trace-0.1", "lb-trace-1"])
    [('sb-half', 'sb'), ('lb-half', 'sb-half'), ('lb-trace-1', 'lb-trace-0.1')]
    """
    out = []
    weakest: dict[str, str] = {}  # dose of each kind
    for arm in arms:
        others = [changed_arm(arm, arms)]
        others += [arm.replace("lb", "sb", 1)] if arm.startswith("lb") else []
        kind, _, dose = arm.rpartition("-")
        others += [f"{kind}-placebo"] if dose in ("raise", "spread", "lower") else []
        others += [weakest.setdefault(kind, arm)] if dose[:1].isdigit() and kind not in arms else []
        out += [(arm, other) for other in others if other in arms and other != arm]
    return out


def changed_arm(arm: str, arms: Sequence[str]) -> str:
    """The longest name of another arm that this one continues by - or +; empty if there is none.

    >>> changed_arm("lb+lr-raise", ["lb", "lb+lr", "lb+lr-raise"]), changed_arm("lb", ["lb", "l"])
    ('lb+lr', '')
    """
    return max((other for other in arms if arm.startswith((f"{other}-", f"{other}+"))), key=len, default="")


def second_look(study: StudyData, result: InterventionResult) -> str:
    """The mean that the seeds of the second look would need, for raising and lowering to be no longer sure."""
    first, second = looks(study)
    rows = []
    for each in result.estimates:
        if each.quantity.startswith(("raising", "lowering")) and each.interval:
            is_sure = each.interval[0] > 0 or each.interval[1] < 0
            shown = f"{100 * each.mean:+.2f}"
            needed = f"{100 * turning_mean(study.look, each, first, second):+.2f}" if is_sure else "not sure now"
            rows.append([each.quantity, shown, needed])
    head = ["quantity", f"mean of the first {first} seeds", f"mean of {second - first} further seeds, to be unsure"]
    return table(head, rows)


def turning_mean(look: Look, estimate: Estimate, first: int, second: int) -> float:
    """The mean of further seeds at which the interval of all, at the second look's level, ends at 0.

    With the deviation of the first seeds among the further ones.

    >>> first = Estimate("raising", -1.0, Look(0.01).interval([-1.2, -1.0, -0.8, -1.0]), None, is_score=True)
    >>> round(turning_mean(Look(0.01), first, 4, 8), 2)
    0.01
    """
    assert estimate.interval is not None
    half_width = (estimate.interval[1] - estimate.interval[0]) / 2
    deviation = half_width / look.critical(first) * first**0.5
    further, critical = second - first, critical_t(look_level((first, second), second), second - 1)

    def is_sure(mean: float) -> bool:
        squares = (second - 2) * deviation**2 + first * further / second * (estimate.mean - mean) ** 2
        total = (first * estimate.mean + further * mean) / second
        return abs(total) > critical * (squares / (second - 1) / second) ** 0.5 and total * estimate.mean > 0

    sure, unsure = estimate.mean, -estimate.mean
    for _ in range(60):
        middle = (sure + unsure) / 2
        sure, unsure = (middle, unsure) if is_sure(middle) else (sure, middle)
    return sure


def looks(study: StudyData) -> Sequence[int]:
    """Declared numbers of seeds."""
    return study.info["config"]["study"]["looks"]


def yes(answer: bool) -> str:
    """The answer as a word."""
    return "yes" if answer else "no"


def measures(study: StudyData) -> str:
    """Growth of near-rank loss, and what each way to raise the rank takes back of it, under other measures."""
    layer, look = layers(study)[-1], study.look

    def own_batch(run: RunData) -> float:
        untrained, trained = run.untrained_and_trained(f"near_rank_loss/{layer}/own_batch/rel_1e-2")
        return trained - untrained

    known: dict[str, Callable[[RunData], float | None]] = {
        "centred, < .01 s1 (primary)": lambda run: last(run, primary(layer)),
        "raw, < .01 s1": lambda run: last(run, f"near_rank_loss/{layer}/rel_1e-2"),
        "centred, < .001 s1": lambda run: last(run, f"near_rank_loss/{layer}/centred/rel_1e-3"),
        "all layers pooled": lambda run: pooled_near_rank_loss(run.first_and_last_probe()[1], run.num_units),
        "absolute, raw, < .01": lambda run: last(run, f"near_rank_loss/{layer}/abs_1e-2"),
        "own batch, raw, change since untrained": own_batch,
    }
    if is_at_floor(study):
        known |= {
            "centred, < .1 s1": lambda run: last(run, f"near_rank_loss/{layer}/centred/rel_1e-1"),
            "1 - effective rank / units, centred": partial(lost_rank, layer=layer),
        }
    routes, lowering = route_names(study), [arm for arm in ("sb-lower",) if arm in study.arms]
    rows = []
    for name, measure in known.items():
        arms = ["sb", "lb", *lowering]
        arms += [f"{batch}-{each}" for batch in ("sb", "lb") for each in ("placebo", *routes)]
        of = values(study, measure, arms)
        growth = of["lb"] - of["sb"]
        row = [name, number(growth, look)]
        changes = [of["lb-placebo"] - of[f"lb-{each}"] - of["sb-placebo"] + of[f"sb-{each}"] for each in routes]
        changes += [of[arm] - of["sb-placebo"] for arm in lowering]
        for change in changes:
            passes = look.is_above(growth) and look.is_above(change - growth / 2)
            row.append(number(change, look) + (" \u2713" if passes else ""))
        rows.append(row)
    return table(
        ["measure", "growth", *(f"fall by {route}" for route in routes), *["rise by lower"] * len(lowering)], rows
    )


def primary(layer: str) -> str:
    """The measure of the claims in a layer."""
    return f"near_rank_loss/{layer}/centred/rel_1e-2"


def is_at_floor(study: StudyData) -> bool:
    """Whether the measure of the claims is 0 in every trained network."""
    name = primary(layers(study)[-1])
    return not any(last(run, name) for arm in study.arms for run in study.finished_runs(arm))


def lost_rank(run: RunData, layer: str) -> float:
    """1 - effective rank / units of the centred activations of a layer: 0 if all directions are alike, at most 1."""
    return 1 - last(run, f"effective_rank/{layer}/centred") / run.num_units[layer.partition("/")[0]]


def scale(study: StudyData) -> str:
    """Scale of activations and of weights, divided by that of the untrained network, and the size of updates."""
    names, weights, step = NETWORKS[model_name(study)]
    head = ["arm", *(f"tr C, {name}" for name in names), *(f"weights, {name}" for name in weights)]
    head += ["distance from init", f"update of step {step}", "penalty's gradient", "test accuracy, %"]
    rows = []
    for arm in study.arms:
        runs = study.finished_runs(arm)
        if runs:
            rows.append(
                [
                    arm,
                    *(f"{ratio(runs, lambda line, name=name: squared(line, f'{name}/centred')):.2f}" for name in names),
                    *(
                        f"{ratio(runs, lambda line, name=name: squared(line, f'{name}/weight') ** 0.5):.2f}"
                        for name in weights
                    ),
                    f"{np.mean([last(run, 'distance_from_init') for run in runs]):.2f}",
                    f"{1000 * np.mean([update_at(run, step) for run in runs]):.2f}e-3",
                    penalty_norm(runs),
                    spread([100 * run.info["result"]["test/accuracy"] for run in runs]),
                ]
            )
    return table(head, rows)


# -- numbers ----------------------------------------------------------------------------------------------------------


def layers(study: StudyData) -> tuple[str, ...]:
    """The penalised layers of a study."""
    return NETWORKS[model_name(study)].layers


def model_name(study: StudyData) -> str:
    """The network of all arms."""
    return study.info["config"]["model"]["name"]


def last(run: RunData, name: str) -> float:
    """A metric at the last measurement."""
    return run.untrained_and_trained(name)[1]


def squared(line: Any, key: str) -> float:
    """Squared Frobenius norm of a matrix: its stable rank times its largest singular value squared."""
    return line[f"stable_rank/{key}"] * line[f"sigma_max/{key}"] ** 2


def ratio(runs: Sequence[RunData], quantity: Callable[[Any], float]) -> float:
    """Geometric mean over runs of a quantity at the last measurement divided by that at the first."""
    ends = [run.first_and_last_probe() for run in runs]
    return float(np.exp(np.mean([np.log(quantity(trained) / quantity(untrained)) for untrained, trained in ends])))


def penalty_norm(runs: Sequence[RunData]) -> str:
    """Norm of the gradient that a penalty adds, mean over recorded steps and seeds."""
    norms = [run.penalty_norm for run in runs if run.penalty_norm is not None]
    return f"{np.mean(norms):.3f}" if norms else ""


def update_at(run: RunData, step: int) -> float:
    """Norm of the update of a step divided by that of the weights; nan if it was not recorded."""
    line = {name: dict(zip(*run.history().series(name), strict=True)) for name in ("train/update_norm", "weight_norm")}
    return float(line["train/update_norm"].get(step, np.nan) / line["weight_norm"].get(step, np.nan))


def values(study: StudyData, measure: Callable[[RunData], Any], arms: Sequence[str]) -> dict[str, np.ndarray]:
    """A measure by arm, over the seeds of which all these arms have a result: [n, ...] each."""
    found = {arm: {run.seed: measure(run) for run in study.finished_runs(arm)} for arm in arms}
    seeds = sorted(set.intersection(*({*each} for each in found.values())))
    return {arm: np.array([each[seed] for seed in seeds]) for arm, each in found.items()}


def number(values: np.ndarray, look: Look, show: Callable[[float], str] = "{:+.3f}".format) -> str:
    """Mean and interval of differences by seed, of near-rank loss if nothing else is said."""
    interval = look.interval(values) if len(values) else None
    if interval is None:
        return "-"
    if not np.isfinite(interval).all():  # of fewer seeds than those of the first look
        return show(float(values.mean()))
    return f"{show(float(values.mean()))} [{show(interval[0])}, {show(interval[1])}]"


def route_names(study: StudyData) -> list[str]:
    """Ways to raise the rank that both batches have, as the arms are called without their batch."""
    return [name for name in ("raise", "spread", "trace") if {f"lb-{name}", f"sb-{name}"} <= {*study.arms}]


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(study: StudyData, path: Path) -> None:
    """Near-rank loss against test accuracy by arm; beside it the contrasts that decide, or the scale of activations."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        by_rank, second = figure.subplots(1, 2, width_ratios=(1.25, 1))
        layer = layers(study)[-1]
        labels = [(by_rank, *_draw_arms(study, by_rank, rank_measure(study)))]
        by_rank.set_xlabel(f"{rank_label(study)} of {layer}, centred")
        by_rank.set_ylabel("test accuracy, %")
        by_rank.set_title(
            f"Arms: means and two standard errors; blue: batch {small_batch(study)}", fontsize=9, loc="left"
        )
        if study.comparison.interventions:
            _draw_contrasts(study.comparison.interventions[0], second)
        else:
            scale_of = partial(squared, key=f"{layer}/centred")
            labels.append((second, *_draw_arms(study, second, lambda run: np.log10(ratio([run], scale_of)))))
            left, right = second.get_xlim()
            second.set_xlim(right=right + 0.25 * (right - left))  # for the labels
            second.set_xlabel(f"scale of {layer}: log10 of tr C, trained over untrained")
            second.set_title("The same arms by their scale", fontsize=9, loc="left")
        for axes, points, drawn in labels:
            label_points(axes, points, drawn, fontsize=7.5)
        figure.savefig(path, metadata={"Date": None})


def _draw_arms(study: StudyData, axes: Any, measure: Callable[[RunData], float]) -> tuple[list[Any], list[Any]]:
    """Draw; returns the arguments of `label_points`: the means with the names of the arms, and what else is drawn."""
    points, drawn = [], []
    for arm in study.arms:
        runs = study.finished_runs(arm)
        if len(runs) < 2:
            continue
        x = np.array([measure(run) for run in runs])
        y = np.array([100 * run.info["result"]["test/accuracy"] for run in runs])
        color = WARM if runs[0].global_size > small_batch(study) else ACCENT
        bar = {"color": color, "markersize": 6, "linewidth": 1, "alpha": 0.9, "fmt": marker_of(arm)}
        bar |= {"mfc": PAPER, "mew": 1.4} if bar["fmt"] == "o" and "placebo" in arm else {}
        n = len(runs) ** 0.5
        width, height = 2 * x.std(ddof=1) / n, 2 * y.std(ddof=1) / n
        axes.errorbar(x.mean(), y.mean(), height, width, **bar)
        points.append((float(x.mean()), float(y.mean()), arm, INK))
        along = np.linspace(-1, 1, 21)
        drawn += [(float(x.mean()), float(y.mean() + at * height)) for at in along]
        drawn += [(float(x.mean() + at * width), float(y.mean())) for at in along]
    axes.margins(0.1)
    return points, drawn


def small_batch(study: StudyData) -> int:
    """Global batch of `sb`."""
    return study.finished_runs("sb")[0].global_size


def marker_of(arm: str) -> str:
    """A marker for each kind of intervention; that of a placebo is drawn open."""
    kinds = {"placebo": "o", "raise": "^", "spread": ">", "lower": "v", "trace": "s"}
    return next((marker for kind, marker in kinds.items() if kind in arm), "D")


def _draw_contrasts(result: InterventionResult, axes: Any) -> None:
    shown = [each for each in result.estimates if each.is_score]
    for at, each in enumerate(reversed(shown)):
        for interval, width, color in ((each.new_images, 1.2, QUIET), (each.interval, 3.0, COLOURS[0])):
            if interval:
                axes.plot([100 * end for end in interval], [at, at], color=color, linewidth=width)
        axes.plot(100 * each.mean, at, "o", color=INK, markersize=4)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [each.quantity for each in reversed(shown)], fontsize=8)
    axes.set_xlabel("points of test accuracy")
    confidence = Look(result.level).confidence
    axes.set_title(f"Contrasts ({confidence}); thick: these images, thin: new images", fontsize=9, loc="left")


def main() -> None:
    """Write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()


if __name__ == "__main__":
    main()
