"""Strengths of rank penalties: found by bisection on a seed that judges nothing, and said where they are not found."""

import json
import math
import re
from pathlib import Path

import pytest

from gengap_dist.analysis.report.tables import matching_tables
from gengap_dist.config.loading import resolve, validate
from gengap_dist.config.study import MatchSection, StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info
from gengap_dist.runs.schema import RunStatus
from gengap_dist.study import matching, runner
from tests.ranks import forked_ranks
from tests.study import tiny

PENALTY = {"rank_measure": "spread", "rank_images": 128}
ARMS = [
    {"name": "sb", "set": {"batch.global_size": 32}},
    {"name": "lb", "set": {"batch.global_size": 256}},
    {"name": "lb-raise", "set": {"batch.global_size": 256, "algorithm": PENALTY | {"rank_penalty": 0.5}}},
    {"name": "sb-raise", "set": {"batch.global_size": 32, "algorithm": PENALTY | {"rank_penalty": 0.7}}},
    {"name": "sb-lower", "set": {"batch.global_size": 32, "algorithm": PENALTY | {"rank_penalty": -0.5}}},
    {
        "name": "sb-placebo",
        "set": {
            "batch.global_size": 32,
            "algorithm": PENALTY | {"rank_penalty": -1.0, "rank_measure": "placebo", "placebo_of": "spread"},
        },
    },
]
MATCH = {
    "between": ["sb", "lb"],
    "arms": [{"arm": "lb-raise", "to": "sb", "shared": ["sb-raise", "sb-placebo"]}, {"arm": "sb-lower", "to": "lb"}],
    "max_runs": 3,
    "low": 0.001,
    "high": 10,
}


def study(**changes) -> StudyConfig:
    return validate(StudyConfig, {"study": {"arms": ARMS, "match": MATCH | changes}})


def searched(config, near_rank_loss, out=Path("out")):
    """The searches at their ends; `near_rank_loss(arm, strength)`: what a run would have, or why it has none."""
    ran = {}

    def status(planned):
        if planned.folder not in ran:
            return None
        value = ran[planned.folder]
        return RunStatus.FINISHED if isinstance(value, float) else RunStatus(value)

    def read(folder):
        return ran[folder]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "final_near_rank_loss", read)
        for _ in range(50):
            searches, planned = matching.read_searches(config, out, status)
            new = [each for each in planned if each.folder not in ran]
            if not new:
                return searches, list(ran)
            for each in new:
                assert each.config.seed == 1000
                ran[each.folder] = near_rank_loss(each.arm, each.config.algorithm.rank_penalty)
    raise AssertionError("the search does not end")


def world(arm, strength):
    """A world in which each factor of 10 moves near-rank loss by 0.1, from 0.1 at sb and 0.6 at lb."""
    natural = 0.1 if arm.startswith("sb") else 0.6
    return natural if strength is None else natural - math.copysign(0.1 * math.log10(abs(strength) / 1e-3), strength)


def test_strengths_are_found_to_the_tolerance():
    searches, folders = searched(study(low=1e-4, high=1e4, max_runs=12), world)
    for search, end, start in zip(searches, (0.1, 0.6), ("lb-raise", "sb-lower"), strict=True):
        assert search.is_matched
        assert search.target == end
        assert search.tolerance == pytest.approx(0.15 * 0.5)
        assert abs(world(start, search.sign * search.best) - end) <= search.tolerance
        assert search.tries[-1].strength == search.best
    config = study()
    assert searches[0].settings(config) == {
        "lb-raise": {"algorithm.rank_penalty": searches[0].best},
        "sb-raise": {"algorithm.rank_penalty": searches[0].best},
        "sb-placebo": {"algorithm.rank_penalty": -searches[0].best},
    }
    assert searches[1].settings(config) == {"sb-lower": {"algorithm.rank_penalty": -searches[1].best}}
    names = [str(folder.relative_to("out/match")) for folder in folders]
    assert names[:4] == ["sb/natural", "lb/natural", "lb-raise/run000", "sb-lower/run000"]


def test_what_cannot_be_matched_is_told_and_the_nearest_strength_kept():
    searches, _ = searched(study(high=0.02), world)
    assert [search.is_matched for search in searches] == [False, False]
    assert [len(search.tries) for search in searches] == [3, 3]
    assert searches[0].problem.startswith("cannot be matched: the nearest of 3 runs is 0.3")
    assert searches[0].best == max(each.strength for each in searches[0].tries)
    (text, _, table), _ = matching_tables({search.match.arm: search.summary() for search in searches})
    assert text.startswith("lb-raise: algorithm.rank_penalty 0.01")
    assert "cannot be matched" in text
    assert len(table.rows) == 3


def test_a_run_that_diverges_was_too_strong():
    def diverging(arm, strength):
        return "diverged" if strength is not None and abs(strength) > 1 else world(arm, strength)

    searches, _ = searched(study(low=1e-2, high=1e4, max_runs=4), diverging)
    strengths = [each.strength for each in searches[0].tries]
    assert strengths[:2] == [10, 0.3162]
    assert all(each.near_rank_loss is None for each in searches[0].tries if each.strength > 1)
    assert searches[0].best < 1


@pytest.mark.parametrize(
    ("near_rank_loss", "says"),
    [
        (
            lambda arm, strength: 0.6 if arm == "sb" else 0.1,
            r"near-rank loss does not grow from sb \(0.6\) to lb \(0.1\)",
        ),
        (lambda arm, strength: "diverged" if arm == "lb" else 0.1, "sb or lb has no near-rank loss on seed 1000"),
    ],
)
def test_without_growth_there_is_nothing_to_match(near_rank_loss, says):
    searches, folders = searched(study(), near_rank_loss)
    for search in searches:
        assert re.search(says, search.problem)
        assert search.settings(study()) == {}
        assert matching_tables({"a": search.summary()})[0][0].startswith("a: no strength found")
    assert len(folders) == 4  # the first strength is tried beside the natural arms


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, r"study.match.seed \(1\) is one of study.seeds"),
        ({"arms": [{"arm": "lb-rais", "to": "sb"}]}, r"names lb-rais, which is not an arm.*did you mean lb-raise"),
        ({"arms": [{"arm": "lb", "to": "sb"}]}, r"names lb, which has no algorithm.rank_penalty to find"),
        ({"arms": [{"arm": "sb-placebo", "to": "lb"}]}, r"\(sb-placebo\) has algorithm.rank_measure=placebo"),
        ({"arms": [{"arm": "lb-raise", "to": "sb-raise"}]}, r"matched to sb-raise: choose one of study.match.between"),
        (
            {"between": ["sb", "lb-raise"], "arms": MATCH["arms"][:1]},
            r"study.match.between \(lb-raise\) has an algorithm.rank_penalty",
        ),
        ({"arms": [{"arm": "lb-raise", "to": "sb", "shared": ["lb-raise"]}]}, r"names lb-raise more than once"),
        ({"low": 2, "high": 1}, r"low \(2\) to high \(1\) is not a range"),
        ({"arms": []}, r"study.match.arms"),
        ({"max_runs": 1}, r"study.match.max_runs \(1\)"),
        ({"tolerance": 0}, r"study.match.tolerance \(0\)"),
    ],
)
def test_a_bad_match_block_gets_one_sentence(change, says):
    with pytest.raises(UsageError, match=says):
        study(**change)


def test_matching_needs_probes_and_no_tuning():
    tree = {"study": {"arms": ARMS, "match": MATCH}, "probe": {"enabled": False}}
    with pytest.raises(UsageError, match=r"study.match needs near-rank loss, and probe.enabled is false"):
        validate(StudyConfig, tree)
    tree["study"] |= {"tune": {"space": {"optim.lr": {"low": 0.1, "high": 1.0}}}}
    with pytest.raises(UsageError, match=r"study.match and study.tune both set what an arm runs with: choose one"):
        validate(StudyConfig, tree)
    assert MatchSection.model_validate(MATCH).tolerance == 0.15


@pytest.mark.processes
def test_the_strength_found_is_what_the_seeds_run_with_and_nothing_is_run_twice(tmp_path):
    raised = {"batch.global_size": 1024, "algorithm": {"rank_penalty": 1.0, "rank_images": 128}}
    arms = [
        {"name": "sb", "set": {"batch.global_size": 32}},
        {"name": "lb", "set": {"batch.global_size": 1024}},
        {"name": "lb-raise", "set": raised},
    ]
    match = {"between": ["sb", "lb"], "arms": [{"arm": "lb-raise", "to": "sb"}], "low": 0.001, "high": 0.1}
    path = tiny.write(
        tmp_path / "s.yaml",
        {"seeds": [0], "arms": arms, "match": match | {"max_runs": 3}, "concurrent": 1},
        model={"name": "mlp", "widths": [64, 48], "norm": "none"},
        optim={"lr": 0.1},
        train={"steps": 40, "num_evals": 1},
        probe=tiny.SETTINGS["probe"] | {"num_samples": 512},
    )
    config, out = resolve(StudyConfig, [path], {}), tmp_path / "out"
    out.mkdir()
    told, warned = [], []

    class Told(runner.StudyCallback):
        def on_run_end(self, planned_run, note):
            told.append((planned_run.title, note))

    def go():
        told.clear()
        runner.prepare(config, out, warned.append)
        with forked_ranks():
            assert runner.run_study(config, out, Told(), driver=True, warn=warned.append) == 0
        return json.loads((out / "study.json").read_text())["matched"]

    found = go()
    search = found["lb-raise"]
    assert search["matched"]
    assert not warned
    last = search["trials"][-1]
    assert search["best"] == last["setting"]
    reached = matching.final_near_rank_loss(out / f"match/lb-raise/run{len(search['trials']) - 1:03d}")
    assert last["near_rank_loss"] == reached
    assert search["target"] == matching.final_near_rank_loss(out / "match/sb/natural")
    assert abs(reached - search["target"]) <= search["tolerance"]
    assert {read_info(path.parent).seed for path in out.glob("match/*/*/run.json")} == {1000}
    own = read_info(out / "runs/lb-raise/seed0").config["algorithm"]["rank_penalty"]
    assert own == search["best"]["algorithm.rank_penalty"] != 1.0
    assert {note for _, note in told} == {"finished"}
    assert len(told) == 2 + len(search["trials"]) + 3
    assert go() == found
    assert {note for _, note in told} == {"already there"}
    for change, says in (
        ({"low": 0.01}, "rank_penalty .* was 0.01 when lb-raise/run000"),
        ({"max_runs": 5}, "has changed"),
    ):
        others = resolve(StudyConfig, [path], {"study": {"match": change}})
        with pytest.raises(UsageError, match=says):
            runner.prepare(others, out, warned.append)


def test_arms_of_two_searches_are_two_arms_although_they_begin_at_one_strength():
    lower = PENALTY | {"rank_penalty": -0.5}
    placebo = PENALTY | {"rank_penalty": 0.5, "rank_measure": "placebo", "placebo_of": "spread"}
    axes = {
        "batch": {"sb": {"batch.global_size": 32}, "lb": {"batch.global_size": 256}},
        "penalty": {
            "": {},
            "raise": {"algorithm": PENALTY | {"rank_penalty": 0.5}},
            "lower": {"algorithm": lower},
            "raise-placebo": {"algorithm": placebo},
            "lower-placebo": {"algorithm": placebo},
            "again": {"algorithm": placebo},
        },
    }
    searches = [
        {"arm": "lb-raise", "to": "sb", "shared": ["sb-raise", "sb-raise-placebo", "lb-raise-placebo", "sb-again"]},
        {"arm": "sb-lower", "to": "lb", "shared": ["lb-lower", "sb-lower-placebo", "lb-lower-placebo"]},
    ]
    config = validate(StudyConfig, {"study": {"axes": axes, "match": MATCH | {"arms": searches}}})
    assert config.duplicates == {"sb-again": "sb-raise-placebo"}
