"""Controls and diagnostics in a run: what is measured when, and what it costs."""

import json
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.errors import UsageError
from gengap_dist.probes.cadence import should_skip
from gengap_dist.runs.run_folder import load_spectra, prepare_folder, read_info, read_metrics
from gengap_dist.training.observer import Observation, ProbeObserver
from gengap_dist.training.trainer import run
from tests.conftest import config, train

SHORT = {"train__steps": 6, "batch__global_size": 40, "probe__num_samples": 100}


def test_controls_are_measured_at_both_ends(tmp_path):
    train(tmp_path / "sweep", **SHORT | {"probe__num_samples": [30, 100, 60], "probe__own_batch": True})
    folder = tmp_path / "sweep" / "spectra"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"n30", "n60", "own_batch", "weights"}
    for name, size in {"n30": 30, "n60": 60, "own_batch": 40, "": 100}.items():
        values, facts = load_spectra(folder / name / "step_00000006.npz")["fc2"]
        assert facts["num_samples"] == size
        lines = list(read_metrics(tmp_path / "sweep"))
        metric = "/".join(filter(None, ("near_rank_loss/fc2", name, "abs_1e-2")))
        assert lines[-1][metric] == (values < 1e-2).mean()
        assert metric in lines[0]
        assert (metric in lines[2]) == (not name)  # in between, only the probe set itself
    assert read_info(tmp_path / "sweep").num_probe_samples == 100


def test_a_smaller_probe_set_is_part_of_the_larger(tmp_path):
    train(tmp_path / "sweep", **SHORT | {"probe__num_samples": [30, 100]})
    train(tmp_path / "alone", **SHORT | {"probe__num_samples": 30})
    sweep = load_spectra(tmp_path / "sweep" / "spectra" / "n30" / "step_00000006.npz")
    alone = load_spectra(tmp_path / "alone" / "spectra" / "step_00000006.npz")
    assert all((sweep[key][0] == alone[key][0]).all() for key in alone)


def test_a_probe_set_smaller_than_asked(tmp_path):
    with pytest.warns(UserWarning, match=r"probe.num_samples \(5,000\) is more than the 1,294 training samples"):
        train(tmp_path / "run", **SHORT | {"probe__num_samples": 5000})
    assert read_info(tmp_path / "run").num_probe_samples == 1294


def all_convolutional(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, num_classes, 1),
        nn.Flatten(),
    )  # fmt: skip


def test_a_rival_that_does_not_fit_the_model_is_left_out_and_training_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="neural_collapse is left out: NC1 needs a network that ends in an nn.Linear"):
        train(tmp_path / "run", **SHORT, model__name="tests.training.test_observer:all_convolutional")
    lines = list(read_metrics(tmp_path / "run"))
    assert not any("nc1" in line for line in lines)
    assert "distance_from_init" in lines[-1]


def test_dear_rivals_when_asked(tmp_path):
    train(tmp_path / "run", **SHORT, probe__diagnostics=["hessian", "keskar"])
    last = list(read_metrics(tmp_path / "run"))[-1]
    assert last["hessian/eigenvalue_1"] >= last["hessian/eigenvalue_2"]
    assert last["keskar_sharpness"] > 0
    assert last["probe_seconds/hessian"] > 0
    assert not {"nc1", "noise_scale", "distance_from_init"} & last.keys()


def test_one_size_of_gradient_gives_no_noise_scale(tmp_path):
    train(tmp_path / "run", **SHORT)  # 40 samples in one micro-batch
    assert read_info(tmp_path / "run").small_size is None
    assert not any(name.startswith("noise_scale") for line in read_metrics(tmp_path / "run") for name in line)


def test_cadences_add_up(tmp_path):
    more = {"train__steps": 40, "probe__every": 15, "probe__at_epochs": [0.5], "probe__per_decade": 1}
    train(tmp_path / "run", **SHORT | more)  # 33 steps an epoch
    probed = [line["step"] for line in read_metrics(tmp_path / "run") if "effective_rank/fc2" in line]
    assert probed == [0, 1, 10, 15, 16, 30, 40]


def test_labels_shuffled():
    plain, shuffled = (datasets.load(DataConfig(shuffle_labels=on)) for on in (False, True))
    same = plain.train.targets == shuffled.train.targets
    assert 0.05 < same.double().mean() < 0.2  # by chance, one in ten
    assert torch.equal(plain.train.targets.bincount(), shuffled.train.targets.bincount())
    assert torch.equal(plain.train.inputs, shuffled.train.inputs)
    assert torch.equal(plain.val.targets, shuffled.val.targets)
    assert torch.equal(plain.test.targets, shuffled.test.targets)
    assert plain.digest() != shuffled.digest()


@pytest.mark.parametrize("cost", [0.01, 0.4, 3.0, 40.0])
@pytest.mark.parametrize("spacing", [1, 7, 100])
def test_a_budget_is_kept(cost, spacing):
    """A simulated run: steps of 1 s, measurements of `cost` seconds every `spacing` steps, a budget of 5%."""
    num_steps, spent, taken, in_a_row = 1000, cost, [0], 0
    due = [step for step in range(1, num_steps) if step % spacing == 0]
    for step in due:
        to_come = sum(1 for other in due if other >= step)
        facts = {"spent_seconds": spent, "seconds_each": cost, "other_seconds": float(num_steps)}
        if should_skip(0.05, **facts, num_remaining=to_come, num_skipped_in_a_row=in_a_row):
            in_a_row += 1
            continue
        in_a_row, spent = 0, spent + cost
        taken.append(step)
    spent += cost  # the last is always taken
    allowance = 0.05 / 0.95 * num_steps
    assert spent <= max(allowance, 2 * cost) + 1e-9
    if 2 * cost + len(due) * cost <= allowance:
        assert taken[1:] == due  # nothing is left out without need
    elif allowance > 6 * cost:
        assert spent > allowance / 3  # nor much more than needed
        gaps = [b - a for a, b in pairwise(taken)]
        assert max(gaps[1:]) <= 3 * min(gaps[1:]) + spacing  # stretched, not cut off


def test_a_run_keeps_its_budget_on_all_ranks_and_says_so(tmp_path, gengap):
    words = ["--train.steps", 12, "--probe.num_samples", 50, "--probe.every", 1, "--mlflow.enabled", "false"]
    words += ["--launch.num_processes", 2, "--probe.max_time_fraction", 1e-6, "--out", "run"]
    done = gengap("train", *words)
    assert done.returncode == 0, done.stderr
    probed = [line["step"] for line in read_metrics(tmp_path / "run") if "effective_rank/fc2" in line]
    assert probed == [0, 2, 3, 5, 7, 9, 10, 12]  # eight are always taken
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["probe_left_out"] == [1, 4, 6, 8, 11]
    assert "skipped 5 measurement(s), at steps 1, 4, 6, 8, 11" in done.stdout


def test_a_slow_first_step_is_not_taken_for_the_pace(tmp_path, monkeypatch):
    """1.5 s for the first step, a moment for every other: 5% of that pays for no measurement but those at the ends."""
    measure, first = ProbeObserver.__call__, [1.5]

    def slow(self: ProbeObserver, model: nn.Module, **options: bool) -> Observation:
        time.sleep(0.1)
        return measure(self, model, **options)

    def progress(done: int, total: int, note: str) -> None:
        if done == 1 and first:
            time.sleep(first.pop())

    monkeypatch.setattr(ProbeObserver, "__call__", slow)
    monkeypatch.setattr("gengap_dist.training.probe_scheduler.measurement_seconds", lambda metrics: 0.1)
    monkeypatch.setattr("gengap_dist.training.probe_scheduler.MIN_MEASUREMENTS", 2)
    settings = {"train__steps": 100, "batch__global_size": 8, "probe__num_samples": 20, "probe__diagnostics": []}
    prepare_folder(tmp_path / "run", "run.json", resume=False)
    result = run(config(probe__max_time_fraction=0.05, **settings), tmp_path / "run", progress=progress)
    assert result["probe_left_out"] == [2, 5, 10, 22, 46]


class Moody(nn.Module):
    """Cannot be measured in eval mode after its first training pass: its probe set is wider than its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 10)
        self.was_trained = False

    def forward(self, x):
        if self.training and len(x) > 2:  # two samples are an inspection
            self.was_trained = True
        if self.was_trained and not self.training and len(x) == 77:
            raise ArithmeticError("no mood")
        return self.head(self.net(x.flatten(1)))


def moody(num_classes: int, in_channels: int) -> nn.Module:
    return Moody()


def test_after_step_0_no_failed_measurement_ends_a_run(tmp_path):
    settings = {"model__name": f"{__name__}:moody", "data__image_size": 8, "probe__num_samples": 77}
    settings |= {"probe__diagnostics": (), "train__steps": 4, "probe__every": 2, "probe__per_decade": None}
    with pytest.warns(UserWarning, match=r"near-rank loss is not measured now: .*ArithmeticError: no mood"):
        result = train(tmp_path / "run", **settings)
    assert result["num_steps"] == 4
    assert read_info(tmp_path / "run").status == "finished"
    measured = [line["step"] for line in read_metrics(tmp_path / "run") if "effective_rank/net.1" in line]
    assert measured == [0]


def never(num_classes: int, in_channels: int) -> nn.Module:
    model = Moody()
    model.was_trained = True
    return model


def test_before_step_0_it_does(tmp_path):
    settings = {"model__name": f"{__name__}:never", "data__image_size": 8, "probe__num_samples": 77}
    with pytest.raises(UsageError, match="no mood"):
        train(tmp_path / "run", **settings, train__steps=4)
