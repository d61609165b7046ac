"""Next-token prediction: its sums by hand, exact for any cut of ragged sequences, and a target that is a loss."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from gengap_dist.analysis.study_data import read_study
from gengap_dist.config.loading import nested
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.preflight.plan import make_plan
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.export import export
from gengap_dist.training.setup import build_model
from gengap_dist.training.tasks import LanguageModeling, build_task
from tests.conftest import config, cut_after, thinned, train, weights
from tests.study import tiny
from tests.training.algorithms.test_world_size_law import ramp
from tests.training.algorithms.test_world_size_law import train as train_on
from tests.training.tasks.documents import write_documents

TEXT = {
    "data__name": "text",
    "data__context": 24,
    "data__num_train": 90,
    "model__width": 8,
    "model__heads": 2,
    "batch__global_size": 40,
    "train__dtype": "float64",
    "train__epochs": 4,
    "train__num_evals": 3,
    "probe__num_samples": (64,),
    "probe__diagnostics": ("noise_scale",),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, object]:
    """Settings of a small model on 200 kB of generated text; a sequence has parts of 1 to 4 documents."""
    return TEXT | {"data__root": write_documents(tmp_path_factory.mktemp("text"), 200_000)}


def series(out: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(out) if name in line]


def test_the_sums_by_hand():
    task = LanguageModeling(DataSpec.tokens(5, 3))
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    targets = torch.tensor([[4, ~2, 0], [~1, 3, 3]], dtype=torch.int16)
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 4] + log_p[0, 2, 0] + log_p[1, 1, 3] + log_p[1, 2, 3])
    torch.testing.assert_close(task.loss_sum(logits, targets), expected, rtol=0, atol=1e-12)
    assert task.num_targets(targets).tolist() == [2, 2]
    task.check(logits, targets)
    assert task.metrics(math.log(8), 0.0) == {"loss": math.log(8), "perplexity": pytest.approx(8)}
    assert math.isnan(task.metrics(math.nan, 0.0)["perplexity"])
    assert task.metrics(1e6, 0.0)["perplexity"] > 1e300  # and no error


def start(settings) -> tuple[datasets.Splits, torch.nn.Module]:
    run = config(**settings)
    splits = datasets.load(run.data)
    return splits, build_model(run, splits, build_task(run, splits.spec), World())


@pytest.mark.processes
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(crews, tmp_path, text):
    """One step of plain SGD on all sequences, with other numbers of counted tokens on every rank and micro-batch."""
    few = {"data__root": write_documents(tmp_path / "few", 3_000), "data__num_train": None, "batch__global_size": 10}
    settings = (
        text
        | few
        | {"train__steps": 1, "checkpoint__every_steps": 1, "probe__enabled": False, "data__val_fraction": 0.0}
    )
    settings |= {"optim__name": "sgd", "optim__momentum": 0.0, "optim__lr": 1.0}
    splits, model = start(settings)
    settings["batch__global_size"] = len(splits.train)
    counts = (splits.train.targets >= 0).sum(1)
    assert len(counts.unique()) >= 4
    assert (splits.train.targets[-1] < 0).sum() > 2  # padding
    inputs = Preprocess(None, torch.device("cpu"), torch.float64)(splits.train.inputs)
    log_p = model(inputs).log_softmax(-1)  # [N, T, V]
    counted = splits.train.targets >= 0
    picked = log_p.gather(-1, splits.train.targets.long().clamp(min=0)[..., None])[..., 0]
    loss = -(picked * counted).sum() / counted.sum()
    loss.backward()
    for size, micro in ((1, 7), (2, 40), (2, 9), (3, 5)):
        out = tmp_path / f"{size}-{micro}"
        crews[size](train_on, settings | {"batch__micro_size": micro}, out)
        after = weights(out)
        for name, parameter in model.named_parameters():
            gradient = parameter.detach() - after[name]
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12, msg=f"{name}, {out.name}")
        assert series(out, "train/loss")[0] == pytest.approx(loss.item(), rel=1e-12)


GPT2 = {  # tied weights, and dropout except in attention, which is no module
    "model__name": "transformers:gpt2",
    "model__options": {"n_layer": 2, "n_embd": 8, "n_head": 2, "attn_pdrop": 0.0},
}
RUNS = {
    "plain": {},
    "transformers": GPT2,
    "fsdp": {"launch__strategy": "fsdp"},
    "recomputed": {"train__activation_checkpointing": True},
    "ramp_tokens": {  # 4 steps of 20 sequences, 5 of 40, 3 of 60, of an epoch of 90: the kill is in the middle
        "batch__global_size": 20,
        "batch__schedule": ramp((0, 20), (1_441, 40), (5_000, 60)),
        "batch__schedule_unit": "tokens",
        "batch__schedule_lr_power": 0.5,
        "train__tokens": 8_000,
    },
    "transformers, fsdp": GPT2 | {"launch__strategy": "fsdp"},
    "transformers, recomputed": GPT2 | {"train__activation_checkpointing": True},
}


@pytest.mark.processes
@pytest.mark.parametrize("name", thinned(RUNS, lambda name: name in ("plain", "transformers", "ramp_tokens")))
def test_ranks_micro_batches_and_a_kill_change_nothing(crews, tmp_path, text, name):
    if "transformers" in name:
        pytest.importorskip("transformers", reason="transformers is not installed")
    settings = text | RUNS[name] | {"checkpoint__every_steps": 5, "checkpoint__keep": 9, "probe__enabled": False}
    outs = []
    for size, micro in ((1, 7), (2, 16), (3, 7)):
        outs.append(tmp_path / str(size))
        alone = {"launch__strategy": "auto"} if size == 1 else {}
        crews[size](train_on, settings | alone | {"batch__micro_size": micro}, outs[-1])
    outs.append(shutil.copytree(outs[1], tmp_path / "moved"))
    cut_after(outs[-1], 5)
    crews[3](train_on, settings | {"batch__micro_size": 16}, outs[-1], True)
    first = outs[0]
    for out in outs[1:]:
        for key in ("train/loss", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte"):
            assert series(out, key) == pytest.approx(series(first, key), abs=1e-8), (out.name, key)
        for key, value in weights(out).items():
            torch.testing.assert_close(value, weights(first)[key], rtol=0, atol=1e-8, msg=f"{out.name}, {key}")
        for key in ("train_full/loss", "test/loss", "best_val/loss"):
            assert read_info(out).result[key] == pytest.approx(read_info(first).result[key], abs=1e-8)
    losses = series(first, "train/loss")
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3


def test_a_run_is_recorded_probed_and_evaluated(tmp_path, text):
    """The loss on the test text, by hand; perplexity and bits follow from it."""
    train(tmp_path / "run", **text)
    info = read_info(tmp_path / "run")
    splits, model = start(text)
    model.load_state_dict(weights(tmp_path / "run"))
    inputs = Preprocess(None, torch.device("cpu"), torch.float64)(splits.test.inputs)
    targets = splits.test.targets
    with torch.no_grad():
        log_p = model(inputs).log_softmax(-1)
    loss = -log_p.gather(-1, targets.long().clamp(min=0)[..., None])[..., 0][targets >= 0].mean().item()
    assert info.result["test/loss"] == pytest.approx(loss, rel=1e-12)
    assert info.result["test/perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert info.result["test/bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-12)
    assert (info.metric.name, info.metric.higher_is_better) == ("loss", False)
    assert info.result["best_val/loss"] == min(series(tmp_path / "run", "val/loss"))
    assert info.data["num_tokens"]["train"] > 100_000
    assert info.last_hidden_layer == "blocks.1"
    assert len(series(tmp_path / "run", "near_rank_loss/blocks.1/token/centred/rel_1e-2")) > 2


def test_a_plan_knows_its_size(text):
    plan = make_plan(config(**text), Cluster(nodes=2, gpus_per_node=2), Constants())
    assert plan.refused == []
    assert plan.num_parameters == sum(p.numel() for p in start(text)[1].parameters())
    assert (plan.data.num_train, plan.num_steps) == (90, 12)
    assert plan.memory.activations > 0


@pytest.mark.full
def test_the_exported_network_is_that_of_the_run(tmp_path, text):
    train(tmp_path / "run", **text | {"probe__enabled": False, "train__dtype": "float32"})
    info = read_info(tmp_path / "run")
    assert info.data is not None
    exported = export(tmp_path / "run", info.config, info.data, 12)
    assert exported.input.dtype == "int64"
    _, model = start(text | {"train__dtype": "float32"})
    model.load_state_dict(weights(tmp_path / "run"))
    tokens = torch.randint(257, (5, 24))
    torch.testing.assert_close(torch.export.load(tmp_path / "run" / exported.file).module()(tokens), model(tokens))


def test_a_target_loss_ends_a_run(tmp_path, text):
    target = {"train__target_loss": 5.3, "train__stop_at_target": True, "train__num_evals": 12, "probe__enabled": False}
    train(tmp_path / "run", **text | target)
    losses = series(tmp_path / "run", "val/loss")
    assert losses[-1] <= 5.3 < losses[-2]
    result = read_info(tmp_path / "run").result
    assert result["updates_to_target"] == result["num_steps"] < 12
    with pytest.raises(UsageError, match=r"train.target_loss \(9\) is not below the validation loss of the untrained"):
        train(tmp_path / "met", **text | target | {"train__target_loss": 9.0})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task__name": "classification"}, "that are tokens: set task.name=language_modeling"),
        (
            {"train__target_accuracy": 0.5},
            "needs a task with accuracy, and language_modeling measures loss: set train.ta",
        ),
        ({"model__name": "lenet5"}, "choose gpt"),
        ({"model__name": "mlp"}, "model.name (mlp) does not accept inputs of shape [24]"),
        ({"algorithm__label_smoothing": 0.1}, "changes the targets of classification"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, settings, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        train(tmp_path / "run", **text | settings)


def test_images_are_no_language():
    with pytest.raises(UsageError, match=r"task.name \(language_modeling\) needs sequences of tokens.*set data.name="):
        LanguageModeling(DataSpec.images(10, 1))


@pytest.mark.full
@pytest.mark.processes
def test_a_study_speaks_of_loss(tmp_path, text):
    """More loss is worse: the gap of the arm with few updates is positive; the target is a loss."""
    settings = nested({key.replace("__", "."): value for key, value in text.items()})
    settings = json.loads(json.dumps(settings, default=str))
    settings["data"]["num_train"] = 200
    settings["train"] |= {"target_loss": 4.0, "num_evals": 10}
    settings |= {"mlflow": {"enabled": False}, "optim": {"lr": 3e-3}}
    arms = [{"name": f"b{size}", "set": {"batch.global_size": size}} for size in (10, 20, 100)]
    settings["study"] = {"name": "text", "question": "Does the batch matter?", "seeds": [0, 1, 2], "arms": arms}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = tiny.start(path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    study = read_study(tmp_path / "out")
    assert study.comparison.gaps["b100"].paired.mean > 0
    assert study.comparison.target.score == "4 validation loss"
    page = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (tmp_path / "out" / "report.html").read_text())
    assert "Loss added by each arm" in page
    assert "updates to 4 validation loss" in page
    assert "accuracy" not in page.lower().replace("target_accuracy", "")
