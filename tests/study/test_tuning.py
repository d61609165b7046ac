"""Tuning: the same trials for every arm, chosen by validation, told with its edges."""

import json
import math

import pytest

from gengap_dist.analysis.group_runs import gather
from gengap_dist.analysis.study_data import read_study, tuned_settings
from gengap_dist.config.loading import resolve, validate
from gengap_dist.config.study import StudyConfig, TuneSection
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_metrics, write_info
from gengap_dist.study import runner, tuning
from gengap_dist.tracking.mlflow.importer import SourceNames
from tests.ranks import forked_ranks
from tests.study import tiny

SPACE = {"optim.lr": {"low": 0.005, "high": 0.5, "log": True}, "optim.momentum": {"low": 0.5, "high": 0.98}}


def section(**settings) -> TuneSection:
    return TuneSection.model_validate({"space": SPACE} | settings)


def test_points_are_fixed_by_the_section_and_fill_the_space():
    found = tuning.points(section(trials=8))
    assert found == tuning.points(section(trials=8))
    assert tuning.points(section(trials=16))[:8] == found
    assert tuning.points(section(trials=8, seed=1)) != found
    eighths = [int(8 * math.log(point["optim.lr"] / 0.005) / math.log(100)) for point in found]
    assert sorted(eighths) == [*range(8)]  # what a Sobol sequence promises
    assert sorted(int(8 * (point["optim.momentum"] - 0.5) / 0.48) for point in found) == [*range(8)]


def test_points_are_those_of_studies_that_were_tuned_before():
    """The printed numbers are what Optuna 5.0 drew for these settings; an interrupted study has some of its trials."""
    found = tuning.points(section(trials=6, space=SPACE | {"algorithm.sam_rho": {"values": [None, 0.05, 0.1]}}))
    assert [tuple(point.values()) for point in found] == [
        (0.1319, 0.8099, 0.1),
        (0.007807, 0.59, None),
        (0.02939, 0.9431, 0.1),
        (0.2084, 0.727, 0.05),
        (0.3375, 0.8945, None),
        (0.01795, 0.6334, 0.1),
    ]


@pytest.mark.parametrize("seed", [5, 77])
def test_every_box_of_one_sixteenth_of_the_square_has_one_of_16_points(seed):
    """What makes the first two dimensions of a Sobol sequence a (0, 4, 2) net, for boxes of every shape."""
    space = {"optim.lr": {"low": 0.0, "high": 16.0}, "optim.momentum": {"low": 0.0, "high": 16.0}}
    found = [(point["optim.lr"], point["optim.momentum"]) for point in tuning.points(section(seed=seed, space=space))]
    for width in (1, 2, 4, 8, 16):
        assert len({(x // width, y // (16 / width)) for x, y in found}) == 16


def test_values_are_tried_equally_often():
    found = tuning.points(section(trials=8, space={"algorithm.sam_rho": {"values": [None, 0.05]}}))
    assert sorted(str(point["algorithm.sam_rho"]) for point in found) == ["0.05"] * 4 + ["None"] * 4


def test_edges_are_told_for_numbers_with_something_between():
    space = {"optim.lr": {"low": 0.1, "high": 1.0}, "algorithm.sam_rho": {"values": [None, 0.1, 0.2, 0.4]}}
    found = section(space=space)
    points = [
        {"optim.lr": lr, "algorithm.sam_rho": rho} for lr, rho in [(0.2, None), (0.5, 0.1), (0.8, 0.2), (0.6, 0.4)]
    ]
    trials = [tuning.Trial(point, "finished", 0.5) for point in points]
    said = [tuning.edges(found, trials, point) for point in points]
    assert said == [
        ["optim.lr at its low end (0.2, of 0.1 to 1)"],
        ["algorithm.sam_rho at its low end (0.1, of 0.1 to 0.4)"],
        ["optim.lr at its high end (0.8, of 0.1 to 1)"],
        ["algorithm.sam_rho at its high end (0.4, of 0.1 to 0.4)"],
    ]
    assert tuning.edges(found, trials[:2], points[0]) == []  # one of two is always an end


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two arms, one of which diverges at whatever rate."""
    folder = tmp_path_factory.mktemp("tuned")
    wild = {"name": "wild", "set": {"optim.weight_decay": 1e9}}
    block = {"trials": 4, "space": {"optim.lr": {"low": 0.005, "high": 0.5, "log": True}}}
    study = {"seeds": [0, 1], "arms": [{"name": "tame"}, wild], "tune": block}
    config = tiny.write(folder / "s.yaml", study)
    return config, folder / "out", tiny.start(config, folder / "out")


@pytest.mark.processes
def test_the_best_trial_by_validation_is_what_the_seeds_are_run_with(done):
    _, out, process = done
    assert process.returncode == 0, process.stderr
    found = json.loads((out / "study.json").read_text())["tuned"]["tame"]
    folders = sorted((out / "tune/tame").iterdir())
    assert len(folders) == len(found["trials"]) == 4
    last = [[line["val/accuracy"] for line in read_metrics(folder) if "val/accuracy" in line][-1] for folder in folders]
    assert [trial["score"] for trial in found["trials"]] == last
    winner = found["trials"][last.index(max(last))]
    assert found["best"] == winner["setting"]
    for folder, trial in zip(folders, found["trials"], strict=True):
        config = read_info(folder).config
        assert (config["optim"]["lr"], config["seed"]) == (trial["setting"]["optim.lr"], 1000)
        assert not config["probe"]["enabled"]
    for seed in (0, 1):
        config = read_info(out / f"runs/tame/seed{seed}").config
        assert (config["optim"]["lr"], config["seed"]) == (winner["setting"]["optim.lr"], seed)
        assert config["probe"]["enabled"]


@pytest.mark.processes
def test_an_arm_that_cannot_be_tuned_is_told_and_does_not_stop_the_others(done):
    _, out, process = done
    found = json.loads((out / "study.json").read_text())["tuned"]["wild"]
    assert [trial["status"] for trial in found["trials"]] == ["diverged"] * 4
    assert (found["best"], found["edge"]) == (None, [])
    assert "none of the 4 trials of arm wild finished, so it has no runs" in process.stderr
    assert not (out / "runs/wild").exists()
    assert tiny.table(out)[-1][:4] == ["wild", "-", "-", "0, none of 4 trials finished"]
    assert "0, none of 4 trials finished" in (out / "report.html").read_text()


@pytest.mark.processes
def test_a_tuned_study_starts_again_without_doing_anything_twice(done):
    config, out, _ = done
    before, tuned = tiny.ended(out), json.loads((out / "study.json").read_text())["tuned"]
    again = tiny.start(config, out)
    assert again.returncode == 0, again.stderr
    assert tiny.ended(out) == before
    assert json.loads((out / "study.json").read_text())["tuned"] == tuned
    more = tiny.start(config, out, "--study.tune.space", '{"optim.lr": {"low": 0.01, "high": 0.5}}')
    assert more.returncode == 2
    assert "when tame/trial000 was run" in more.stderr
    whole = (out / "study.json").read_text()
    longer = tiny.start(config, out, "--study.tune.trials", 8)
    assert longer.returncode == 2
    assert "study.tune has changed since the runs in" in longer.stderr
    assert (out / "study.json").read_text() == whole
    assert tiny.ended(out) == before


@pytest.mark.processes
def test_comparing_a_tuned_study_again_is_the_study(done, tmp_path):
    """Trials are no seeds, and what was tuned tells no arms apart."""
    found, problems = gather([str(done[1])], tmp_path, SourceNames(), None, "")
    study = read_study(done[1])
    assert problems == []
    assert {run.folder for run in found.runs} == {run.folder for run in study.runs}
    assert found.results("tame", "test/accuracy") == study.results("tame", "test/accuracy")
    assert found.baseline == study.baseline == "tame"
    assert tuned_settings(found.info) == {"optim.lr"}


def test_a_failed_trial_is_tried_again_only_until_its_arm_has_runs(tmp_path):
    class Counted(runner.StudyCallback):
        def __init__(self):
            self.told = []

        def on_run_end(self, planned_run, note):
            self.told.append((planned_run.label, note))

    block = {"trials": 2, "space": {"optim.lr": {"low": 0.01, "high": 0.1}}}
    path = tiny.write(tmp_path / "s.yaml", {"seeds": [0], "arms": [{"name": "a"}], "tune": block})
    config, out = resolve(StudyConfig, [path], {}), tmp_path / "out"
    out.mkdir()

    def go(num_failed=0):
        runner.prepare(config, out, lambda text: None)
        watch = Counted()
        with forked_ranks():
            assert runner.run_study(config, out, watch, driver=True) == num_failed
        return watch.told

    *trials, last = go()
    assert sorted(trials) == [("trial 0", "finished"), ("trial 1", "finished")]  # side by side: either ends first
    assert last == ("seed 0", "finished")
    tuned = json.loads((out / "study.json").read_text())["tuned"]["a"]
    worse = [trial["setting"] for trial in tuned["trials"]].index(tuned["best"]) ^ 1
    lost = out / f"tune/a/trial00{worse}"
    write_info(lost, read_info(lost).with_fields(status="failed"))
    assert go() == [(f"trial {worse ^ 1}", "already there"), ("seed 0", "already there")]


def test_the_fewest_updates_to_a_target_win_where_that_is_the_question():
    ends = [(0.9, None), (0.8, 40), (0.8, 30)]
    trials = [tuning.Trial({"x": n}, "finished", *end) for n, end in enumerate(ends)]
    assert tuning.best(trials, to_target=True) is trials[2]
    assert tuning.best(trials, to_target=False) is trials[0]
    assert tuning.best(trials[:1], to_target=True) is trials[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"space": {}}, r"study.tune.space"),
        ({"space": {"optim.lrr": {"low": 1, "high": 2}}}, r"study.tune.space \(optim.lrr\).*did you mean optim.lr"),
        (
            {"space": {"train.epochs": {"values": [1, 2]}}},
            r"study.tune.space \(train.epochs\) is not a setting of optim or",
        ),
        ({"space": {"optim.lr": {"low": 1}}}, "needs either low and high"),
        ({"space": {"optim.lr": {"low": 1, "high": 2, "values": [1]}}}, "needs either low and high"),
        ({"space": {"optim.lr": {"low": 2, "high": 1}}}, r"low \(2\) to high \(1\) is not a range: choose high"),
        ({"space": {"optim.lr": {"low": 0, "high": 1, "log": True}}}, "low above 0 for log"),
        ({"space": {"optim.lr": {"low": 0.1, "high": float("inf")}}}, "finite number"),
        ({"space": {"optim.nesterov": {"values": [True]}}}, "leave no choice"),
        ({"seed": 1}, r"study.tune.seed \(1\) is one of study.seeds"),
        ({"trials": 1}, r"study.tune.trials \(1\)"),
    ],
)
def test_a_bad_tune_block_gets_one_sentence(change, says):
    block = {"space": {"optim.lr": {"low": 0.1, "high": 1.0}}} | change
    with pytest.raises(UsageError, match=says):
        validate(StudyConfig, {"study": {"arms": [{"name": "a"}], "tune": block}})


def test_tuning_needs_validation_images_and_settings_that_no_arm_has():
    block = {"space": {"optim.lr": {"low": 0.1, "high": 1.0}}}
    config = validate(StudyConfig, {"data": {"val_fraction": 0}, "study": {"arms": [{"name": "a"}], "tune": block}})
    with pytest.raises(UsageError, match=r"data.val_fraction is 0: set it above 0"):
        config.run_config(config.arms[0], seed=0)
    with pytest.raises(UsageError, match=r"study arm a sets optim.lr, which study.tune.space tunes: leave one out"):
        validate(StudyConfig, {"study": {"arms": [{"name": "a", "set": {"optim.lr": 1}}], "tune": block}})
