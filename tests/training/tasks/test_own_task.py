"""A task and a data set that this package does not know: trained, probed, compared and reported like its own."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from gengap_dist.analysis.study_data import read_study
from gengap_dist.data import datasets
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.tasks import build_task
from tests.conftest import config, cut_after, thinned, train, weights
from tests.study import tiny
from tests.training.tasks import table

HERE = table.__name__
TABLE = {
    "data__name": f"{HERE}:rows",
    "task__name": f"{HERE}:Regression",
    "model__name": "mlp",
    "model__widths": (12,),
    "model__norm": "none",
    "batch__global_size": 40,
    "train__dtype": "float64",
    "train__epochs": 2,
    "train__num_evals": 2,
    "probe__num_samples": (64,),
    "probe__diagnostics": (),
}
MASKED = TABLE | {"data__name": f"{HERE}:masked_rows", "task__name": f"{HERE}:MaskedRegression"}


def series(out, name):
    return [line[name] for line in read_metrics(out) if name in line]


def outputs_of(parameters, inputs):
    """The network by hand: one hidden layer of ReLU."""
    first_weight, first_bias, last_weight, last_bias = parameters.values()
    return (inputs @ first_weight.T + first_bias).relu() @ last_weight.T + last_bias


def test_the_loss_is_the_mean_over_all_targets_that_count(tmp_path):
    """By hand, in float64: 225 rows, of which each has none to four targets."""
    train(tmp_path / "run", **MASKED | {"batch__micro_size": 7, "train__log_every": 1})
    splits = datasets.load(config(**MASKED).data)
    counts = (splits.train.targets != table.MASKED).sum(1)
    assert counts.unique().tolist() == [0, 1, 2, 3, 4]
    trained = weights(tmp_path / "run")
    errors = (outputs_of(trained, splits.test.inputs) - splits.test.targets)[splits.test.targets != table.MASKED]
    result = read_info(tmp_path / "run").result
    assert result["test/loss"] == pytest.approx(float(errors.square().mean()), rel=1e-12)
    assert result["test/mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-12)
    assert result["train_test_gap"] == pytest.approx(result["test/mae"] - result["train_full/mae"], rel=1e-12)
    assert result["best_val/mae"] == min(series(tmp_path / "run", "val/mae"))
    assert read_info(tmp_path / "run").metric.name == "mae"


def test_the_gradient_is_that_of_the_mean_over_all_targets_of_the_step(tmp_path):
    """One step of plain SGD over all rows, in micro-batches of 7, against autograd on all rows at once."""
    one = {"batch__global_size": 225, "train__steps": 1, "optim__momentum": 0.0, "optim__lr": 0.1}
    train(tmp_path / "run", **MASKED | one | {"batch__micro_size": 7, "checkpoint__every_steps": 1})
    before, trained = weights_at_start(MASKED | one), weights(tmp_path / "run")
    splits = datasets.load(config(**MASKED).data)
    parameters = {name: value.clone().requires_grad_() for name, value in before.items()}
    loss = (
        (outputs_of(parameters, splits.train.inputs) - splits.train.targets)[splits.train.targets != table.MASKED]
        .square()
        .mean()
    )
    loss.backward()
    for name, value in parameters.items():
        expected = before[name] - 0.1 * value.grad
        assert torch.allclose(trained[name], expected, rtol=1e-12, atol=1e-14), name
    assert series(tmp_path / "run", "train/loss")[0] == pytest.approx(loss.item(), rel=1e-12)


def quiet(*about):
    """No progress."""


def weights_at_start(settings):
    from gengap_dist.distributed.process_group import World
    from gengap_dist.training.setup import build_model

    run = config(**settings)
    splits = datasets.load(run.data)
    return {
        k: v.clone() for k, v in build_model(run, splits, build_task(run, splits.spec), World()).state_dict().items()
    }


def test_a_target_loss_ends_a_run(tmp_path):
    settings = TABLE | {"train__stop_at_target": True, "train__num_evals": 12, "train__epochs": 20}
    train(tmp_path / "run", **settings | {"train__target_loss": 0.2})
    losses = series(tmp_path / "run", "val/loss")
    assert losses[-1] <= 0.2 < losses[-2]
    result = read_info(tmp_path / "run").result
    assert result["updates_to_target"] == result["num_steps"] < 120
    met = f"train.target_loss (9) is not below the validation loss of the untrained network, {losses[0]:.4g}"
    with pytest.raises(UsageError, match=re.escape(met)):
        train(tmp_path / "met", **settings | {"train__target_loss": 9.0})


ALGORITHMS = {
    "plain": {},
    "sam": {"algorithm__sam_rho": 0.05},
    "penalty": {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 8},
    "rank": {"algorithm__rank_penalty": 0.01},
    "local": {"algorithm__local_sgd": "post_local_sgd", "algorithm__workers": 2, "algorithm__local_start": 0.5},
}


@pytest.mark.processes
@pytest.mark.parametrize("algorithm", thinned(ALGORITHMS, lambda name: name == "plain"))  # others: laws of images
def test_ranks_micro_batches_and_a_kill_change_nothing(pools, tmp_path, algorithm):
    """With a ragged number of targets on every rank, and a ragged last step of 25 rows."""
    settings = MASKED | ALGORITHMS[algorithm] | {"checkpoint__every_steps": 5, "checkpoint__keep": 9}
    for size, micro in ((1, 40), (2, 9), (3, 16)):
        pools[size].run(config(**settings, batch__micro_size=micro), tmp_path / str(size), resume=False, progress=quiet)
    cut_after(tmp_path / "2", 5)
    pools[3].run(config(**settings, batch__micro_size=16), tmp_path / "2", resume=True, progress=quiet)
    for name in ("train/loss", "train/mae", "val/mae", "train/grad_norm"):
        expected = series(tmp_path / "1", name)
        assert len(expected) > 2
        for size in (2, 3):
            assert series(tmp_path / str(size), name) == pytest.approx(expected, rel=1e-9), (size, name)


def test_probes_take_the_loss_of_the_task(tmp_path):
    """The trace of the Hessian of a linear model is known: 2 (mean |x|^2 + 1). NC1 needs classes and says so."""
    diagnostics = ("hessian", "keskar", "neural_collapse", "weights")
    linear = {"model__widths": (), "probe__num_samples": (225,), "probe__diagnostics": diagnostics}
    linear |= {"probe__layers": ("head",)}
    with pytest.warns(UserWarning, match="neural_collapse is left out: NC1 needs one class for each sample"):
        train(tmp_path / "run", **TABLE | linear | {"train__epochs": 1})
    inputs = datasets.load(config(**TABLE).data).train.inputs
    expected = 2 * (float(inputs.square().sum(1).mean()) + 1)
    (last,) = series(tmp_path / "run", "hessian/trace")[-1:]
    error = series(tmp_path / "run", "hessian/trace_standard_error")[-1]
    assert abs(last - expected) < 4 * error + 1e-9
    assert series(tmp_path / "run", "keskar_sharpness")[-1] > 0


@pytest.mark.processes
def test_a_study_of_it_is_compared_and_reported(tmp_path, gengap):
    """More error is worse: the gap of the arm with the fewest updates is positive, and no text speaks of accuracy."""
    settings = yaml.safe_load(
        f"""
        data: {{name: "{HERE}:rows"}}
        task: {{name: "{HERE}:Regression"}}
        model: {{name: mlp, widths: [12], norm: none}}
        batch: {{global_size: 20}}
        optim: {{lr: 0.05}}
        train: {{epochs: 8, num_evals: 4}}
        probe: {{num_samples: [64]}}
        mlflow: {{enabled: false}}
        study: {{name: table, question: "Does the batch matter?", seeds: [0, 1, 2]}}
        """
    )
    arms = [{"name": f"b{size}", "set": {"batch.global_size": size}} for size in (20, 225)]
    settings["study"] |= {"arms": arms, "baseline": "b20"}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = tiny.start(path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    study = read_study(tmp_path / "out")
    arm = next(name for name in study.arms if name != study.baseline)
    mae = {name: np.mean([*study.test_values(name).values()]) for name in study.arms}
    assert mae[arm] > mae[study.baseline]
    assert study.comparison.gaps[arm].paired.mean == pytest.approx(mae[arm] - mae[study.baseline])
    (gap,) = [claim for claim in study.comparison.claims if claim.key == "gap"]
    assert "b225" in gap.evidence
    assert " adds " in gap.evidence
    page = (tmp_path / "out" / "report.html").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "Mae added by each arm" in text
    assert "test mae (sd)" in text + done.stdout
    assert "accuracy" not in text.lower().replace("train.target_accuracy", "").replace("target_accuracy", "")
    again = gengap("compare", tmp_path / "out", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "study.json").read_text())["baseline"]


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("Mean", "for the same samples twice, which is not a sum: return the sum over all targets, not their mean"),
        ("Vector", "returns a tensor of shape [2, 1]: return one number"),
        ("Raises", "(ValueError: no such column)"),
        ("Renamed", "Renamed.metric is called mae, and Renamed.metrics returns loss"),
        ("Counts", "return the number of targets of each sample"),
        ("rows", "needs a subclass of gengap_dist.training.tasks.Task"),
        ("Regresion", "cannot be imported"),
    ],
)
def test_a_wrong_task_is_refused_before_training(tmp_path, task, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        train(tmp_path / "run", **TABLE | {"task__name": f"{HERE}:{task}"})
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("ragged", "train has 5 inputs for 4 targets"),
        ("unequal", "test has inputs of shape [3] and type float64, and the first training sample of shape [2]"),
        ("words", "test has inputs of shape [2] and type float64, and the first training sample of shape [2] and ty"),
        ("missing", "returns a dict without train"),
        ("infinite", "that are not finite"),
        ("fails", "KeyError: 'column 7'): fix the function"),
        ("nothing", "cannot be imported"),
    ],
)
def test_wrong_data_are_refused(data, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        datasets.load(config(data__name=f"{HERE}:{data}").data)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task__name": "classification"}, "needs one class for each sample"),
        ({"task__name": "regression"}, "is not a task"),
        ({"algorithm__label_smoothing": 0.1}, "algorithm.label_smoothing (0.1) changes the targets of classification"),
        ({"train__target_accuracy": 0.9}, "train.target_accuracy (0.9) needs a task with accuracy"),
        ({"model__name": "lenet5"}, "model.name (lenet5) is built from num_classes and in_channels"),
        ({"data__augment": ("flip",)}, "data.augment (flip) changes images"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(tmp_path, settings, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        train(tmp_path / "run", **TABLE | settings)
