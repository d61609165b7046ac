"""benchmarks/studies.py: the rivals measure what a run of ours measures, and every process of a command is counted."""

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gengap_dist import models, probes
from gengap_dist.config.loading import merge, validate
from gengap_dist.config.study import StudyConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.cadence import evenly, log_spaced
from gengap_dist.runs.run_folder import prepare_folder, read_metrics
from gengap_dist.training import trainer
from tests.conftest import ROOT, config, thinned

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "rivals")]
import page
import plain_run
import process_tree
import studies


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.npz"
    studies.save_images(config().data, path)
    return path


def arms(name: str) -> dict[str, list[str]]:
    study = validate(StudyConfig, studies.study_tree(name, None, quick=False))
    return {arm.name: studies.plain_words(study.run_config(arm, seed=0), Path("images.npz")) for arm in study.arms}


def options(words: list[str], images: Path):
    return plain_run.parser.parse_args([*words, "--data", str(images), "--out", "run.json"])


def test_examples_hold():
    found = doctest.testmod(studies)
    assert found.attempted
    assert not found.failed


def test_the_options_of_the_plain_script_are_those_of_the_arms():
    runs = {name: plain_run.parser.parse_args([*words, "--out", "x"]) for name, words in arms("lenet5").items()}
    found = {name: (run.global_size, run.num_steps, round(run.lr, 4), run.warmup_steps) for name, run in runs.items()}
    assert found == {
        "sb32": (32, 1230, 0.02, 0),
        "lb256": (256, 180, 0.02, 0),
        "lb256-sqrt": (256, 180, 0.0566, 12),
        "lb1294": (1294, 30, 0.02, 0),
        "lb1294-long": (1294, 180, 0.02, 0),
    }
    assert arms("mlp")["lb1024"][3:8] == ["mlp", "--widths", "256", "256", "--global_size"]


@pytest.mark.parametrize("study", ["lenet5", "mlp"])
def test_the_plain_script_measures_what_the_probe_measures(study, images):
    run = validate(StudyConfig, studies.study_tree(study, None, quick=False))
    plan = plain_run.Plan(options(next(iter(arms(study).values())), images))
    splits = datasets.load(run.data)
    for name, samples in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        theirs, labels = plan.data[name]
        ours = Preprocess(splits.pixels, torch.device("cpu"), torch.float32)(samples.inputs)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert torch.equal(labels, samples.targets)
    chosen = seeded_rng(0, 2).permutation(len(splits.train))[:1024]
    assert torch.equal(plan.probe_set[1], splits.train.targets[torch.from_numpy(chosen).sort().values])
    model = models.from_config(run, splits.spec, World())
    model.load_state_dict(dict(zip(model.state_dict(), plan.model.state_dict().values(), strict=True)))
    spectra = probes.measure(
        model, [plan.probe_set[0]], layers=("auto",), views=("channel", "token", "pool"), world=World()
    )
    ours = probes.metrics(spectra)
    theirs = plain_run.near_rank_loss(plan.model, *plan.probe_set)
    assert {f"near_rank_loss/{name}" for name in theirs} == {
        name for name in ours if name.startswith("near_rank_loss/")
    }
    for name, value in theirs.items():
        assert value == pytest.approx(ours[f"near_rank_loss/{name}"], abs=0.02), name  # one value beside a threshold


@pytest.mark.parametrize("arm", ["sb32", "lb1294"])
def test_the_plain_script_measures_as_often(arm, images):
    plan = plain_run.Plan(options(arms("lenet5")[arm], images))
    num_steps = plan.options.num_steps
    due, spaced = evenly(20, num_steps), log_spaced(3)
    assert plan.eval_steps == {0} | {step for step in range(num_steps + 1) if due(step)}
    assert plan.probe_steps == {num_steps} | {step for step in range(num_steps) if spaced(step)}


@pytest.mark.parametrize("study", ["lenet5", "mlp"])
def test_the_plain_script_trains_the_same_network(study, images, tmp_path):
    alone = {"mlflow": {"enabled": False}, "launch": {"num_processes": 1}}
    config = validate(StudyConfig, merge(studies.study_tree(study, None, quick=True), alone))
    run = config.run_config(config.arms[-1], seed=3)
    prepare_folder(tmp_path / "ours", "run.json", resume=False)
    ours = trainer.run(run, tmp_path / "ours", resume=False)
    words = studies.plain_words(run, images)
    plain_run.main([*words, "--seed", "3", "--out", str(tmp_path / "theirs.json")])
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    rows = list(read_metrics(tmp_path / "ours"))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert theirs["losses"] == pytest.approx(losses, rel=1e-3)
    assert theirs["test"]["accuracy"] == pytest.approx(ours["test/accuracy"], abs=0.01)
    assert theirs["train"]["loss"] == pytest.approx(ours["train_full/loss"], rel=1e-3)
    assert [int(step) for step in theirs["near_rank_loss"]] == [row["step"] for row in rows if "nc1" in row]
    assert {int(step) for step in theirs["val"]} == {row["step"] for row in rows if "val/loss" in row}


def outcome(seconds: float, loss: float | None) -> studies.Outcome:
    usage = process_tree.Usage(seconds, 3.0, 500.0)
    return studies.Outcome(usage, {"sb": [studies.RunResult(0.9, loss)], "lb": [studies.RunResult(0.8, loss)]})


def test_the_page_says_runs_per_hour_and_why_a_contestant_is_missing(tmp_path):
    rounds = {
        "ours": [outcome(3.6, 0.5)] * 6,
        page.STUDY_REFERENCE: [outcome(7.2, 0.5)] * 6,
        "bare": [outcome(3.6, None)] * 6,
    }
    result = {
        "title": "lenet5",
        "machine": studies.paired_timing.machine(),
        "num_runs": 2,
        "missing": {"Ray Tune": "not installed: ray"},
        "contestants": {name: studies.summary(each) for name, each in rounds.items()},
    }
    (tmp_path / "benchmarks.md").write_text("<!-- studies -->\n<!-- /studies -->\n")
    page.keep(tmp_path, "studies", {"lenet5": json.loads(json.dumps(result))})
    page.write(tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| ours | 2,000 | 2.00 (2.00 to 2.00) | 1.50 | 500 | 85.0% | 0.500 |" in text
    assert "| xargs -P | 1,000 |  | 1.50 | 500 | 85.0% | 0.500 |" in text
    assert "| bare | 2,000 | 2.00 (2.00 to 2.00) | 1.50 | 500 | 85.0% |  |" in text
    assert "| Ray Tune | not installed: ray |" in text


@pytest.mark.processes
def test_time_and_memory_of_a_process_that_outlives_its_command_are_counted(tmp_path):
    busy = "import time\nheld = bytearray(200 * 2**20)\nwhile time.process_time() < 1.5: pass"
    command = ["sh", "-c", f"'{sys.executable}' -c '{busy}' &"]
    code = (
        "import os, pathlib, process_tree\n"
        f"usage = process_tree.measure({command}, pathlib.Path(), os.environ, pathlib.Path('log'))\n"
        "print(*usage)"
    )  # in its own process, because it adopts orphans and waits for all children
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, cpu_seconds, peak_mib = map(float, done.stdout.split())
    assert seconds < 1.5 <= cpu_seconds
    assert peak_mib > 200


@pytest.mark.processes
@pytest.mark.parametrize("contestant", thinned(["xargs", "packed", "shell", "Tune"], lambda name: name == "xargs"))
def test_every_contestant_runs_a_study(contestant, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "studies.py"),
        "--quick",
        "--rounds",
        "1",
        "--only",
        contestant,
    ]
    subprocess.run([*command, "--concurrent", "1", "--out", "found.json"], cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "found.json").read_text())["lenet5"]
    assert len(found["contestants"]) >= 2
    for usage in found["contestants"].values():
        assert {arm: len(values) for arm, values in usage["test_accuracy"].items()} == {"sb32": 2, "lb256": 2}
