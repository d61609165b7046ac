"""Simulates studies whose truth is known, and counts what the rules say of them.

    python benchmarks/verdicts.py [--studies 500] [--only WORLD ...] [--before CHECKOUT] [--out FILE]
    make simulate


Each world is a truth, such as "only the number of updates differs". Its runs have learning curves, training and test
scores, near-rank losses, and where it matters the correctness of each test image, all with the noise that was seen in
real runs: standard deviation of a run .20 points of test accuracy (.38 where the rank is lowered), .15 points of
training accuracy, .02 of near-rank loss. `before` judges the same studies by the rules of another checkout, of before
docs/adr/0110. python benchmarks/page.py writes the table into docs/statistics.md.
"""

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from gengap_dist.analysis.claims import judge
from gengap_dist.analysis.results import Curve, Run
from gengap_dist.analysis.rules.look import Look
from gengap_dist.distributed.cores import available_cores

POINT = 0.01
RUN, LOWERED, TRAINING, RANK = 0.20, 0.38, 0.15, 0.02  # standard deviations; the first three in points
LOST, GROWTH, RANK_OF_BASE = 1.72, 0.512, 0.07
ACCURACY, TRAINED = 82.5, 99.9
MEASUREMENTS = 40  # of a curve, besides those at losses: after each AT_LOSSES updates the loss is 0.62 of what it was
AT_LOSSES = 72
OUTCOMES = ("supported", "contradicted", "undecided")
UNSURE = 0.1  # share of the test images that a run gets right or wrong by chance

BASE: dict[str, object] = {
    "batch.global_size": 32,
    "optim.lr": 0.02,
    "optim.schedule": "cosine",
    "train.epochs": 25.0,
    "algorithm.rank_penalty": None,
}
LARGE = BASE | {"batch.global_size": 2048}


class Ending(NamedTuple):
    """What a simulated run has at its end; accuracies in points."""

    test: float
    train: float = TRAINED
    loss: float = 0.002
    near_rank_loss: float = RANK_OF_BASE
    updates: int = 800
    deviation: float = RUN
    status: str = "finished"
    curve: Curve | None = None
    test_correct: np.ndarray | None = None


def simulated_run(rng: np.random.Generator, arm: str, seed: int, settings: dict[str, object], end: Ending) -> Run:
    """A run with noise around `end`."""
    train = min(100.0, end.train + rng.normal(0, TRAINING)) if end.train < 100 else end.train
    score = POINT * (end.test + rng.normal(0, end.deviation)) if end.test_correct is None else end.test_correct.mean()
    near_rank_loss = float(np.clip(end.near_rank_loss + rng.normal(0, RANK), 0, 1))
    finished = end.status == "finished"
    measures = {"near_rank_loss/fc/rel_1e-2": near_rank_loss, "near_rank_loss/fc/abs_1e-2": near_rank_loss}
    return Run(
        arm=arm,
        seed=seed,
        status=end.status,
        global_size=int(str(settings["batch.global_size"])),
        num_updates=end.updates,
        num_epochs=float(str(settings["train.epochs"])),
        settings=settings,
        score=float(score) if finished else None,
        measures=measures if finished else {},
        own_batch={},
        own_batch_untrained={},
        num_probe_samples=1024,
        target=None,
        updates_to_target=None,
        train_score=POINT * train if finished else None,
        train_loss=float(end.loss * np.exp(rng.normal(0, 0.1))) if finished else None,
        chance=0.1,
        near_rank_loss=near_rank_loss if finished else None,
        near_rank_loss_untrained=0.3,
        curve=end.curve,
        test_correct=end.test_correct,
    )


Study = Callable[[np.random.Generator, int], list[Run]]
"""Runs of a study with a number of seeds."""


# -- worlds with learning curves -------------------------------------------------------------------------------------


def learning_curve(
    rng: np.random.Generator, updates: int, score_at: Callable[[np.ndarray, np.ndarray], np.ndarray], *, cosine: bool
) -> Curve:
    """A curve whose loss depends on updates only: 2.3 exp(-t / 150), with noise.

    Args:
        rng: of the noise.
        updates: of the run.
        score_at: accuracy in points, of loss and of the learning rate's share of its peak.
        cosine: whether the rate falls to 0, else it is constant.
    """
    at_losses = np.arange(AT_LOSSES, updates, AT_LOSSES)
    steps = np.unique(np.round(np.concatenate([np.geomspace(1, updates, MEASUREMENTS), at_losses])))
    losses = 2.3 * np.exp(-steps / 150) * np.exp(rng.normal(0, 0.03, len(steps)))
    shares = (1 + np.cos(np.pi * steps / updates)) / 2 if cosine else np.ones(len(steps))
    scores = POINT * (score_at(losses, shares) + rng.normal(0, RUN, len(steps)))
    return Curve(steps, losses, scores, np.full(len(steps), RANK_OF_BASE) + rng.normal(0, RANK, len(steps)), shares)


def accuracy_of_loss(losses: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Accuracy, in points, that depends on the loss only."""
    return ACCURACY - 12 * np.clip(np.log(losses / 0.003), 0, None)


def only_updates(rng: np.random.Generator, num_seeds: int) -> list[Run]:
    """The demo of before: equal epochs, and the batch acts through the number of updates only."""
    constant = BASE | {"optim.schedule": "constant", "train.epochs": 30.0}
    arms = {"sb": (32, 30, 1230), "lb256": (256, 30, 180), "lb1294": (1294, 30, 30), "lb1294-long": (1294, 180, 180)}
    runs = []
    for arm, (size, epochs, updates) in arms.items():
        settings = constant | {"batch.global_size": size, "train.epochs": float(epochs)}
        for seed in range(num_seeds):
            curve = learning_curve(rng, updates, accuracy_of_loss, cosine=False)
            loss = float(2.3 * np.exp(-updates / 150))
            test = float(accuracy_of_loss(np.array([loss]), np.ones(1))[0])
            train = 100 - min(90.0, 40 * loss)
            near_rank_loss = 0.3 - 0.25 * (1 - loss / 2.3)  # it falls while the network trains
            end = Ending(max(10.0, test), train, loss, near_rank_loss, updates, curve=curve)
            runs.append(simulated_run(rng, arm, seed, settings, end))
    return runs


def rate_phase(rng: np.random.Generator, num_seeds: int) -> list[Run]:
    """No effect of the batch: the longer run reaches the other's final loss while its rate, which costs up to 1.5
    points, is still high.
    """

    def score_at(losses: np.ndarray, shares: np.ndarray) -> np.ndarray:
        return accuracy_of_loss(losses, shares) - 1.5 * shares

    runs = []
    for arm, size, updates in (("sb", 32, 1600), ("lb", 64, 700)):
        settings = BASE | {"batch.global_size": size}
        for seed in range(num_seeds):
            curve = learning_curve(rng, updates, score_at, cosine=True)
            end = Ending(ACCURACY, 99.2, float(2.3 * np.exp(-updates / 150)), updates=updates, curve=curve)
            runs.append(simulated_run(rng, arm, seed, settings, end))
    return runs


# -- worlds of two batches -------------------------------------------------------------------------------------------


def two_batches(
    rng: np.random.Generator,
    num_seeds: int,
    *,
    lost: float = 1.0,
    growth: float = 0.0,
    diverged: bool = False,
    updates: tuple[int, int] = (1600, 800),
    images: int = 0,
) -> list[Run]:
    """Both batches trained to the same loss; `images`: with the correctness of so many test images."""
    runs = []
    unsure = rng.random(images) < UNSURE
    easy = rng.random(images) < (ACCURACY / 100 - UNSURE / 2) / (1 - UNSURE)
    for seed in range(num_seeds):
        for arm, settings, less, more, num in (
            ("sb", BASE, 0.0, 0.0, updates[0]),
            ("lb", LARGE, lost, growth, updates[1]),
        ):
            correct = None
            if images:
                by_images = 100 * (UNSURE / 4 / images) ** 0.5  # the standard deviation that they alone give a run
                of_run = rng.normal(0, max(0.0, RUN**2 - by_images**2) ** 0.5)
                chance = 0.5 - POINT * (less + of_run) / UNSURE
                correct = np.where(unsure, rng.random(images) < chance, easy)
            status = "diverged" if diverged and arm == "lb" and seed % 2 else "finished"
            end = Ending(
                ACCURACY - less, near_rank_loss=RANK_OF_BASE + more, updates=num, status=status, test_correct=correct
            )
            runs.append(simulated_run(rng, arm, seed, settings, end))
    return runs


# -- interventions ---------------------------------------------------------------------------------------------------


def intervention(
    rng: np.random.Generator,
    num_seeds: int,
    *,
    share: float = 0.0,
    lost: float = LOST,
    growth: float = GROWTH,
    machinery: float = 0.0,
    placebo_small: float = 0.0,
    hidden_gain: Sequence[float] = (0.0, 0.0),
    hidden_cost: float = 0.0,
    raised_large_costs: float = 0.0,
    raised_small_rank: float | None = None,
    small_rank: float = RANK_OF_BASE,
    training_gain: float = 0.0,
    routes: int = 2,
) -> list[Run]:
    """A study of rank penalties at two batches, in which `share` of the loss goes through the rank.

    Args:
        rng: of the noise.
        num_seeds: n.
        share: of the loss; the rank acts on accuracy as -share lost (R - R of the baseline) / growth.
        lost: points that the large batch loses.
        growth: of near-rank loss with the batch.
        machinery: points that every penalised arm gains, the placebos, too.
        placebo_small: points that the placebo gains at the small batch.
        hidden_gain: points that each route gives to the large batch by other means.
        hidden_cost: points that lowering the rank costs by other means.
        raised_large_costs: points that raising the rank costs the large batch otherwise.
        raised_small_rank: near-rank loss of the small batch with the rank raised; None: as without.
        small_rank: near-rank loss of the baseline.
        training_gain: points of training accuracy that the large batch lacks and raising the rank gives back.
        routes: number of ways to raise the rank.
    """
    large_rank = small_rank + growth
    raised_small = small_rank if raised_small_rank is None else raised_small_rank

    def through_rank(near_rank_loss: float) -> float:
        return -share * lost * (near_rank_loss - small_rank) / growth if growth else 0.0

    other = (1 - share) * lost if growth else lost  # what the large batch loses by other means

    def penalised(strength: float, measure: str) -> dict[str, object]:
        return {"algorithm.rank_penalty": strength, "algorithm.rank_measure": measure}

    arms: dict[str, tuple[dict[str, object], float, float, float]] = {  # settings, points, near-rank loss, deviation
        "sb": (BASE, 0.0, small_rank, RUN),
        "lb": (LARGE, -other, large_rank, RUN),
        "sb-lower": (BASE | penalised(-0.01, "logdet"), machinery - hidden_cost, large_rank, LOWERED),
        "sb-placebo": (BASE | penalised(0.01, "placebo"), machinery + placebo_small, small_rank, RUN),
        "lb-placebo": (LARGE | penalised(0.01, "placebo"), machinery - other, large_rank, RUN),
    }
    for measure, hidden in [*zip(("logdet", "spread"), hidden_gain, strict=True)][:routes]:
        arms[f"sb-{measure}"] = BASE | penalised(0.01, measure), machinery, raised_small, RUN
        points = machinery - other + hidden - raised_large_costs
        arms[f"lb-{measure}"] = LARGE | penalised(0.01, measure), points, raised_small, RUN
    runs = []
    for seed in range(num_seeds):
        for arm, (settings, points, near_rank_loss, deviation) in arms.items():
            test = ACCURACY + points + through_rank(near_rank_loss)
            lacks = training_gain if settings["batch.global_size"] == 2048 and near_rank_loss == large_rank else 0.0
            end = Ending(test, TRAINED - lacks, near_rank_loss=near_rank_loss, deviation=deviation)
            runs.append(simulated_run(rng, arm, seed, settings, end))
    return runs


# -- the table --------------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """A truth, and what the rules should say of it."""

    truth: str
    study: Study
    num_seeds: Sequence[int]
    counted: Sequence[str]
    """CLAIM OUTCOME, or CLAIM FINDING; a claim is named by its key."""
    specified: str
    """What should be counted, in percent of the studies."""


WORLDS: dict[str, World] = {
    "updates": World(
        "only the number of updates differs",
        only_updates,
        (3, 10),
        ("gap supported", "near_rank_loss_grows supported", "longer_training supported"),
        "at most 5",
    ),
    "phase": World(
        "only the phase of the learning rate differs",
        rate_phase,
        (5, 10),
        ("gap supported", "gap cannot be matched"),
        "0; 100",
    ),
    "gap": World("a gap of 1.0, equal final losses", two_batches, (5, 10), ("gap supported",), "84, 100"),
    "gap_images": World(
        "the same, on 10,000 new test images",
        partial(two_batches, images=10_000),
        (5, 10),
        ("gap supported",),
        "75 to 93, 99 to 100",
    ),
    "gap_only": World(
        "a gap of 1.72 at equal updates, the rank unchanged",
        partial(two_batches, lost=LOST, updates=(1600, 1600)),
        (5,),
        ("gap supported", "near_rank_loss_grows supported", "near_rank_loss_grows contradicted"),
        "100; 2; -",
    ),
    "diverged": World(
        "half of the large batch diverges, the others lose nothing",
        partial(two_batches, lost=0.0, diverged=True),
        (10,),
        ("gap supported", "gap contradicted"),
        "0; 0",
    ),
    "share_0": World(
        "share 0", intervention, (5, 10), ("explains supported", "explains contradicted"), "0; 74 to 77, 100"
    ),
    "share_0_one_route": World(
        "share 0, one route only", partial(intervention, routes=1), (10,), ("explains not asked",), "100"
    ),
    "share_half": World(
        "share .5",
        partial(intervention, share=0.5),
        (5, 10),
        ("explains supported", "explains contradicted"),
        "at most 1; at most 1",
    ),
    "share_60": World(
        "share .6, raising the rank costs the large batch .8 otherwise",
        partial(intervention, share=0.6, raised_large_costs=0.8),
        (5, 10),
        ("explains supported", "explains contradicted"),
        "at most 1; at most 1",
    ),
    "both_fall": World(
        "share .5, near-rank loss of the baseline .30, raising the rank lowers both by .3",
        partial(intervention, share=0.5, small_rank=0.30, raised_small_rank=0.0),
        (5, 10),
        ("explains supported", "explains contradicted"),
        "at most 1; at most 1",
    ),
    "share_1": World("share 1", partial(intervention, share=1.0), (5, 10), ("explains supported",), "75, 100"),
    "share_1_machinery": World(
        "share 1, all penalised arms 1.0 better by the machinery",
        partial(intervention, share=1.0, machinery=1.0),
        (5, 10),
        ("explains supported",),
        "75, 100",
    ),
    "better": World(
        "the large batch is better by .5", partial(intervention, lost=-0.5), (10,), ("explains supported",), "0"
    ),
    "no_growth": World(
        "near-rank loss does not grow",
        partial(intervention, growth=0.0),
        (10,),
        ("explains supported", "explains contradicted"),
        "0; 51",
    ),
    "speed": World(
        "the rank only changes the speed of training",
        partial(intervention, share=0.0, training_gain=1.7),
        (10,),
        ("explains not asked",),
        "100",
    ),
    "hidden": World(
        "share 0; hidden gain of 1.5 in one of two routes, hidden cost of 1.2",
        partial(intervention, hidden_gain=(1.5, 0.0), hidden_cost=1.2),
        (5, 10),
        ("explains supported", "explains routes disagree"),
        "0; -",
    ),
    "placebo": World(
        "share 0, the placebo lifts the small batch by 1.5",
        partial(intervention, placebo_small=1.5),
        (10,),
        ("explains not asked",),
        "100",
    ),
}


def says(runs: Sequence[Run], counted: Sequence[str], look: Look | None = None) -> list[bool]:
    """Whether the rules say each of `counted` of a study."""
    found = {claim.key: claim for claim in judge(runs, "sb", look=look).claims}
    words = [entry.split(" ", 1) for entry in counted]
    return [word in (found[key].outcome, found[key].finding) for key, word in words]


def counts(name: str, num_seeds: int, num_studies: int) -> list[int]:
    """How many of the studies of a world the rules say each of its `counted` of."""
    world, rng = WORLDS[name], np.random.default_rng(0)
    out = np.zeros(len(world.counted), dtype=int)
    for _ in range(num_studies):
        out += says(world.study(rng, num_seeds), world.counted)
    return out.tolist()


OLD_RULES = """
import json, pickle, sys
sys.path.insert(0, sys.argv[1])
from gengap_dist.analysis.claims import claims
from gengap_dist.analysis.results import Run
studies, counted = pickle.load(sys.stdin.buffer)
numbers = [0] * len(counted)
for study in studies:
    found = {claim.key: claim.outcome for claim in claims([Run(**fields) for fields in study], "sb")}
    numbers = [number + (found[key] == word) for number, (key, word) in zip(numbers, counted)]
print(json.dumps(numbers))
"""
OLD_FIELDS = Run._fields[: Run._fields.index("train_score")]  # what a run had for the rules of before


def counts_before(checkout: Path, name: str, num_seeds: int, num_studies: int) -> list[int]:
    """As `counts`, of the same studies by the rules of another checkout, which know no findings but outcomes."""
    world, rng = WORLDS[name], np.random.default_rng(0)
    studies = [
        [{field: getattr(run, field) for field in OLD_FIELDS} for run in world.study(rng, num_seeds)]
        for _ in range(num_studies)
    ]
    counted = [entry.split(" ", 1) for entry in world.counted]
    command = [sys.executable, "-c", OLD_RULES, str(checkout.resolve())]
    done = subprocess.run(command, input=pickle.dumps((studies, counted)), capture_output=True, check=True)
    return json.loads(done.stdout)


def rows_of(name: str, num_seeds: int, num_studies: int, before: Path | None) -> list[dict[str, Any]]:
    """The rows of the table for one world and number of seeds; percentages of the studies."""
    world, numbers = WORLDS[name], counts(name, num_seeds, num_studies)
    old = counts_before(before, name, num_seeds, num_studies) if before else [None] * len(numbers)
    return [
        {
            "truth": world.truth,
            "n": num_seeds,
            "called": entry,
            "percent": 100 * number / num_studies,
            "before": None if of_old is None or entry.split(" ", 1)[1] not in OUTCOMES else 100 * of_old / num_studies,
            "specified": world.specified,
        }
        for entry, number, of_old in zip(world.counted, numbers, old, strict=True)
    ]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=500, help="simulated for each row")
    parser.add_argument("--only", nargs="+", choices=[*WORLDS], help="some worlds")
    parser.add_argument("--before", type=Path, help="another checkout, whose rules judge the same studies")
    parser.add_argument("--out", type=Path, help="write the table to this JSON file")
    options = parser.parse_args()
    asked = [(name, n) for name in options.only or WORLDS for n in WORLDS[name].num_seeds]
    with ProcessPoolExecutor(available_cores().whole) as pool:
        futures = [pool.submit(rows_of, name, n, options.studies, options.before) for name, n in asked]
        rows = [row for future in futures for row in future.result()]
    table = Table("truth", "n", "called", "%", "before, %", "specified, %")
    for row in rows:
        before = "-" if row["before"] is None else f"{row['before']:.1f}"
        table.add_row(row["truth"], str(row["n"]), row["called"], f"{row['percent']:.1f}", before, row["specified"])
    Console(width=150).print(table)
    if options.out:
        old_rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        known = {(row["truth"], row["n"], row["called"]): row["before"] for row in old_rows}
        for row in rows:  # a table that was made without `--before` keeps what was found with it
            if row["before"] is None:
                row["before"] = known.get((row["truth"], row["n"], row["called"]))
        options.out.write_text(json.dumps({"studies": options.studies, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
