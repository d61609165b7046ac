import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gengap_dist import models
from gengap_dist.cli.terminal import _stage
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.errors import UsageError
from gengap_dist.runs.checkpoint import checkpoints_by_step
from gengap_dist.runs.run_folder import load_spectra, read_info, read_metrics
from gengap_dist.training.trainer import run
from tests.conftest import config, cut_after, train, weights

SMALL = {
    "train__steps": 24,
    "batch__global_size": 50,
    "batch__micro_size": 20,
    "train__num_evals": 4,
    "probe__num_samples": 100,
    "probe__max_time_fraction": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(out, **SMALL)


def test_run_folder_is_complete(whole):
    out, result = whole
    info = read_info(out)
    assert info.status == "finished"
    assert info.result == json.loads(json.dumps(result))
    assert info.config == json.loads(json.dumps(config(**SMALL).model_dump(mode="json")))
    assert (info.seed, info.world_size, info.num_parameters) == (0, 1, 61_706)
    assert info.data["num_train"] == 1294
    assert torch.__version__.startswith(info.versions["torch"])
    lines = list(read_metrics(out))
    assert [line["step"] for line in lines] == list(range(25))  # step 0 is the untrained network
    assert all({"step", "epoch", "seconds"} <= line.keys() for line in lines)
    assert all("train/loss" in line for line in lines[1:])
    assert [line["step"] for line in lines if "val/accuracy" in line] == [
        0, 1, 2, 5, 6, 10, 12, 18, 22, 24,
    ]  # fmt: skip
    probed = [line["step"] for line in lines if "effective_rank/fc2" in line]
    assert probed == [0, 1, 2, 5, 10, 22, 24]
    assert sorted(int(path.stem[5:]) for path in (out / "spectra").glob("*.npz")) == probed
    assert 0 <= lines[0]["near_rank_loss/fc2/abs_1e-2"] <= 1
    assert "near_rank_loss/conv1/pool/centred/rel_1e-2" in lines[-1]
    for line in lines[1:]:  # 17 of 50 samples in the first micro-batch: two sizes of gradient
        assert line["noise_scale/trace_covariance"] == line["noise_scale/trace_covariance"]
    assert info.small_size == 16
    diagnostics = {"nc1", "distance_from_init", "train/update_norm", "effective_rank/fc2.affine/weight"}
    assert diagnostics <= lines[10].keys()
    assert lines[0]["distance_from_init"] == 0 < lines[1]["distance_from_init"]
    assert lines[1]["distance_from_init"] == pytest.approx(lines[1]["train/update_norm"])  # one step from the start
    assert lines[-1]["test/accuracy"] == result["test/accuracy"]
    assert not any("test/accuracy" in line for line in lines[:-1])  # the test set is touched once, at the end
    assert not list(out.rglob("*.part"))


def test_spectra_on_disk_give_the_metrics(whole):
    out, _ = whole
    values, facts = load_spectra(out / "spectra" / "step_00000024.npz")["fc2"]
    line = list(read_metrics(out))[-1]
    assert facts["num_samples"] == 100
    assert line["near_rank_loss/fc2/abs_1e-2"] == pytest.approx(float((values < 1e-2).mean()))
    assert line["sigma_max/fc2"] == values[0]


def test_the_runs_of_a_process_share_their_data_and_its_name(tmp_path):
    context, loaded = RuntimeContext("a launcher", ["a", "command"]), []
    for name in ("one", "other"):
        run(config(**SMALL, seed=len(name)), tmp_path / name, context=context)
        info = read_info(tmp_path / name)
        assert (info.launcher, info.command) == ("a launcher", ["a", "command"])
        loaded.append(context.data.get(datasets.data_key(config(**SMALL).data, 0), lambda: None))
    assert loaded[0] is loaded[1] is not None


def test_the_same_seed_is_the_same_run_and_another_is_not(whole, tmp_path):
    _, result = whole
    assert train(tmp_path / "a", **SMALL)["test/loss"] == result["test/loss"]
    assert train(tmp_path / "b", seed=1, **SMALL)["test/loss"] != result["test/loss"]


def timeless(out):
    return [
        {key: value for key, value in line.items() if "seconds" not in key and not key.startswith("time/")}
        for line in read_metrics(out)
    ]


@pytest.mark.parametrize("moment", ["step", "save", "result"])
def test_resume_is_bitwise_the_uninterrupted_run(whole, tmp_path, monkeypatch, moment):
    """The run is cut off in the middle of a step, right after a checkpoint, or before its result was written."""
    from gengap_dist.training import trainer as run_module
    from gengap_dist.training.algorithms import base

    session = run_module.Trainer
    settings = SMALL | {"checkpoint__every_seconds": 0.0}  # save at every log point
    out = tmp_path / "run"

    class Cut(Exception):
        pass

    calls = 0

    def cut(self, *args, original):
        nonlocal calls
        calls += 1
        if (moment == "step" and calls == 15) or (moment != "step" and calls > 3 * (moment == "save")):
            raise Cut
        return original(self, *args)

    if moment == "step":
        original = base.train_step
        monkeypatch.setattr(base, "train_step", lambda *args: cut(*args, original=lambda s, *a: original(s, *a)))
    else:
        name = "evaluate_and_probe" if moment == "save" else "result"
        original = getattr(session, name)
        monkeypatch.setattr(session, name, lambda self: cut(self, original=original))
    with pytest.raises(Cut):
        train(out, **settings)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert read_info(out).status == "running"
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 23, "epoch"')  # a line that the crash cut short
    train(out, resume=True, **settings)
    assert timeless(out) == timeless(whole[0])
    for name, weight in weights(out).items():
        assert torch.equal(weight, weights(whole[0])[name]), name
    assert read_info(out).status == "finished"
    assert len(read_info(out).resumed) == 1


@pytest.mark.full  # else: tests/test_kills.py
@pytest.mark.processes
def test_killed_process_resumes_to_the_same_weights(whole, tmp_path):
    out = tmp_path / "run"
    words = ["--mlflow.enabled", "false", "--checkpoint.every_seconds", "0", "--out", str(out)]
    for key, value in SMALL.items():
        words += [f"--{key.replace('__', '.')}", "null" if value is None else str(value)]
    command = [sys.executable, "-m", "gengap_dist.train", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(out.glob("checkpoints/step_*")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run([sys.executable, "-m", "gengap_dist.train", "--out", str(out), "--resume"], check=False)
    assert again.returncode == 0
    assert timeless(out) == timeless(whole[0])
    assert all(torch.equal(weight, weights(whole[0])[name]) for name, weight in weights(out).items())


def test_a_resumed_run_says_where_it_continues(tmp_path):
    out, said = tmp_path / "run", []
    train(out, **SMALL)
    last = max(checkpoints_by_step(out / "checkpoints"))
    run(config(**SMALL), out, resume=True, progress=lambda done, total, note: said.append(note))
    assert said[0] == f"continuing after {last} of {read_info(out).num_steps} steps"
    assert _stage(0, said[0]) == said[0], "nothing of it is taken for a counter"


def test_resume_refuses_other_settings_and_other_models(whole, tmp_path):
    out = tmp_path / "run"
    train(out, **SMALL)
    with pytest.raises(UsageError, match=r"optim.lr \(0.5\) was 0.02 when the run"):
        train(out, resume=True, optim__lr=0.5, **SMALL)
    for path in out.glob("checkpoints/*/model.pt"):
        path.write_bytes(b"PK damaged")
    with pytest.raises(
        UsageError, match=r"damaged \(model.pt does not match its checksum\), and there is no earlier one"
    ):
        train(out, resume=True, **SMALL)


@pytest.mark.filterwarnings("ignore:all classes have the same mean:UserWarning")  # which is what the last probe finds
def test_divergence_is_a_result(tmp_path):
    result = train(tmp_path / "run", optim__lr=1e6, **SMALL)
    info = read_info(tmp_path / "run")
    assert info.status == "diverged"
    assert info.result == result
    assert "train/loss was" in info.error
    lines = list(read_metrics(tmp_path / "run"))
    assert lines[-1]["step"] == result["diverged_at_step"]
    assert not abs(lines[-1]["train/loss"]) < float("inf")


class Exploding(nn.Module):
    """A finite loss with a gradient whose norm is too large for float32, from its first pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        out = self.linear(x.flatten(1))
        return out + 1e30 * (out - out.detach())


def exploding(num_classes: int, in_channels: int) -> nn.Module:
    return Exploding()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("log_every", [1, 50])
def test_an_infinite_gradient_is_a_divergence_at_its_step(tmp_path, clip_norm, log_every):
    """Clipped by its infinite norm a step would have length 0, and the run would finish untrained."""
    settings = {"model__name": f"{__name__}:exploding", "data__image_size": 8, "probe__enabled": False}
    settings |= {"train__steps": 5, "train__log_every": log_every, "optim__clip_norm": clip_norm}
    result = train(tmp_path / "run", **settings)
    info = read_info(tmp_path / "run")
    assert (info.status, result) == ("diverged", {"diverged_at_step": 1})
    assert info.error == "train/grad_norm was inf at step 1"


def test_divergence_in_the_last_update_is_one_too(tmp_path):
    """The loss of a step is of the weights before it."""
    once = {"train__steps": 1, "probe__enabled": False, "train__num_evals": 1}
    result = train(tmp_path / "run", optim__lr=1e38, **once)
    info = read_info(tmp_path / "run")
    assert (info.status, result) == ("diverged", {"diverged_at_step": 1})
    assert info.error == "train_full/loss was nan at step 1"


def test_a_seed_of_any_size(tmp_path):
    train(tmp_path / "run", seed=10**15, train__steps=2, probe__enabled=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch__global_size": 5000}, r"batch.global_size \(5000\) is larger than the training set of 1294"),
        ({"batch__ghost_size": 32}, r"model.norm \(ghost\) has no effect on LeNet5"),
        ({"model__name": "mlp", "batch__global_size": 1293}, "leaves batch norm a group of one sample in a step of 1"),
        ({"model__name": "mlp", "batch__micro_size": 1}, "a group of one sample in a step of 64"),
        (
            {"model__name": "mlp", "model__norm": "sync", "batch__global_size": 200},
            r"batch.micro_size \(128\) splits the 200 samples .*choose at least 200, more ranks, or model.norm=ghost",
        ),
        (
            {
                "model__name": "mlp",
                "model__activation": "linear",
                "algorithm__rank_penalty": 1.0,
                "algorithm__rank_layers": ["fc9"],
            },
            r"algorithm.rank_layers \(fc9\) matches no layer",
        ),
        ({"model__name": "resnet65"}, r"did you mean resnet56\?"),
        (
            {"model__name": "vgg16", "model__activation": "linear"},
            r"model.activation \(linear\) has no effect on vgg16",
        ),
        ({"optim__warmup_epochs": 21.0}, r"optim.warmup_epochs \(21\) are 441 steps, and the run has 420"),
        (
            {"algorithm__sam_rho": 0.1, "launch__strategy": "zero1"},
            r"algorithm.sam_rho \(0.1\) is not supported by launch.strategy=zero1",
        ),
        ({"train__autocast": "float16", "launch__device": "cpu"}, r"train.autocast \(float16\) needs a GPU"),
        ({"train__tf32": True, "launch__device": "cpu"}, r"train.tf32 \(true\) needs a GPU, and this run is on a CPU"),
        ({"data__device": "cuda", "launch__device": "cpu"}, r"data.device \(cuda\) needs a GPU, and this run is on a"),
        (
            {
                "model__name": "mlp",
                "batch__global_size": 100,
                "algorithm__gradient_penalty": 0.1,
                "algorithm__penalty_size": 1,
            },
            "a group of one sample in a step of 100",
        ),
        ({"launch__device": "cuda"}, r"launch.device \(cuda\) needs a GPU"),
        ({"data__image_size": 12}, r"data.image_size \(12\) is too small for lenet5"),
        ({"model__name": "lenet"}, r"model.name \(lenet\) is not a model \(did you mean lenet5\?\)"),
        ({"model__name": "torch.nn:Flatten"}, r"outputs \[2, 1024\] for 2 inputs, needs \[2, 10\]"),
        ({"probe__layers": ["fc22"]}, r"probe.layers \(fc22\) matches no layer"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, says):
    if settings.get("launch__device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match=says):
        train(tmp_path / "run", **settings)


def drawn_by_numpy(num_classes: int, in_channels: int) -> nn.Module:
    """Initialised by the generators of numpy and of Python."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))
    with torch.no_grad():
        weight = np.random.normal(size=model[1].weight.shape)  # noqa: NPY002
        model[1].weight.copy_(torch.from_numpy(weight * random.random()))
    return model


def test_the_seed_is_that_of_all_generators(tmp_path):
    settings = {"model__name": "tests.training.test_trainer:drawn_by_numpy", "data__image_size": 8, "train__steps": 2}
    results = []
    for number, seed in enumerate((3, 3, 4)):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        results.append(train(tmp_path / str(number), seed=seed, probe__enabled=False, **settings)["test/loss"])
    assert results[0] == results[1] != results[2]


def test_the_import_of_a_users_module_does_not_change_its_initialisation(tmp_path, monkeypatch):
    """It draws a random number; only the first run of a process imports it."""
    (tmp_path / "drawing.py").write_text(
        "import torch\nfrom torch import nn\ntorch.rand(1)\n"
        "def net(num_classes, in_channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"model__name": "drawing:net", "data__image_size": 8, "train__steps": 1, "probe__enabled": False}
    losses = [train(tmp_path / name, **settings)["test/loss"] for name in ("first", "second")]
    assert losses[0] == losses[1]


KEPT = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def kept(num_classes: int, in_channels: int) -> nn.Module:
    return KEPT


def copied(num_classes: int, in_channels: int) -> nn.Module:
    return copy.deepcopy(KEPT)


def test_a_factory_that_returns_one_network_twice_is_refused(tmp_path):
    """The second run would begin where the first ended; a copy is another network."""
    settings = {"data__image_size": 8, "train__steps": 1, "probe__enabled": False}
    train(tmp_path / "first", model__name="tests.training.test_trainer:kept", **settings)
    with pytest.raises(UsageError, match=r"returned a network that it returned before.*build a new one in each call"):
        train(tmp_path / "second", model__name="tests.training.test_trainer:kept", **settings)
    for name in ("third", "fourth"):
        train(tmp_path / name, model__name="tests.training.test_trainer:copied", **settings)


def pictures(root: Path, *, level: int = 0) -> Path:
    """An image folder of two classes, bright and dark, with noise."""
    rng = np.random.default_rng(0)
    for part, num in (("train", 30), ("test", 8)):
        for name, mean in (("a", 60), ("b", 190)):
            (root / part / name).mkdir(parents=True)
            for number in range(num):
                pixels = rng.normal(mean + level, 20, (8, 8, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def swap(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "a").rename(root / part / "c")
        (root / part / "b").rename(root / part / "a")
        (root / part / "c").rename(root / part / "b")


def remove_one(root: Path) -> None:
    (root / "train" / "a" / "3.png").unlink()


def rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "a").rename(root / part / "c")


def change_one(root: Path) -> None:
    Image.new("RGB", (8, 8)).save(root / "train" / "a" / "3.png")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap, "the inputs have changed"),
        (remove_one, r"num_train \(59\) was 60"),
        (rename_a_class, r"classes \(\['b', 'c'\]\) was \['a', 'b'\]"),
        (change_one, "the inputs have changed"),
    ],
)
def test_a_run_is_not_resumed_with_other_data(tmp_path, change, says):
    """Unlike its place, which may change."""
    root, out = pictures(tmp_path / "data"), tmp_path / "run"
    settings = {"data__name": "imagefolder", "data__image_size": 8, "data__val_fraction": 0.0, "model__name": "mlp"}
    settings |= {"probe__enabled": False, "batch__global_size": 20, "checkpoint__every_steps": 2, "train__steps": 6}
    settings["checkpoint__keep"] = 9
    train(out, data__root=str(root), **settings)
    cut_after(out, 2)
    moved = root.rename(tmp_path / "moved")
    change(moved)
    with pytest.raises(UsageError, match=f"the data are not those with which the run in .* was started: {says}"):
        train(out, resume=True, data__root=str(moved), **settings)
    shutil.rmtree(moved)
    pictures(moved)
    assert train(out, resume=True, data__root=str(moved), **settings)["num_steps"] == 6


def test_a_study_whose_data_change_between_runs_ends_with_one_sentence(tmp_path):
    from gengap_dist.study.data_check import DataCheck
    from gengap_dist.study.run_matrix import PlannedRun, StudyCallback

    root = pictures(tmp_path / "data")
    settings = {"data__name": "imagefolder", "data__image_size": 8, "model__name": "mlp", "data__root": str(root)}
    settings |= {"probe__enabled": False, "batch__global_size": 20, "train__steps": 1}
    check = DataCheck(StudyCallback())

    def run_and_check(name: str, **more: object) -> None:
        train(tmp_path / name, **settings | more)
        check.on_run_end(PlannedRun("arm", name, config(**settings | more), tmp_path / name), "finished")

    run_and_check("first", seed=0)
    run_and_check("second", seed=1)
    run_and_check("control", seed=1, data__shuffle_labels=True)
    remove_one(root)
    with pytest.raises(UsageError, match=r"data of .*third are not those of .*first.*num_val \(5\) was 6.*has moved"):
        run_and_check("third", seed=2)


def tied(num_classes: int, in_channels: int) -> torch.nn.Module:
    """A network with one layer, norm included, under two names."""
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU())
    first, last = torch.nn.Linear(in_channels * 64, 32), torch.nn.Linear(32, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), first, layer, layer, last)


def test_the_best_weights_are_scored_without_changing_the_last(tmp_path):
    """Also where one layer has two names, and where the best weights are not the last."""
    settings = {"model__name": "tests.training.test_trainer:tied", "data__image_size": 8, "batch__ghost_size": 8}
    more = {"train__steps": 8, "train__num_evals": 4, "optim__lr": 3.0, "probe__enabled": False}
    result = train(tmp_path / "run", **settings, **more)
    path = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    splits = datasets.load(config(**settings).data)
    images = Preprocess(splits.pixels, torch.device("cpu"), torch.float32)(splits.test.inputs)
    accuracies = {}
    for name in ("best", "model"):
        model = models.from_config(config(**settings), DataSpec.images(10, 1), World()).eval()
        model.load_state_dict(torch.load(path / f"{name}.pt", weights_only=True))
        accuracies[name] = (model(images).argmax(1) == splits.test.targets).double().mean().item()
    assert result["best_val_step"] < 8
    assert accuracies["best"] != accuracies["model"]
    assert result["test_at_best_val/accuracy"] == accuracies["best"]
    assert result["test/accuracy"] == accuracies["model"]


def rewrite_run_state(checkpoint, change):
    """Replace the content of run.pt of a checkpoint, and its checksum."""
    path, facts = checkpoint / "run.pt", json.loads((checkpoint / "checkpoint.json").read_text())
    torch.save(change(torch.load(path, weights_only=True)), path)
    facts["sha256"]["run.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(facts))


def without(path, *names, **changes):
    """Remove fields of a JSON file, and change others."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in names}))


def first_form(state):
    """run.pt as it was before it had a schema."""
    evaluator, probes = state["evaluator"], state["probes"]
    timers = [probes["seconds"], evaluator["seconds"], state["train"]["train_seconds"], probes["seconds_each"]]
    return {
        "step": state["train"]["step"], "best": evaluator["best"], "reached": evaluator["target_step"],
        "seconds": state["seconds"], "timers": timers, "probe_left_out": probes["skipped_steps"],
        "noise": state["step_metrics"], "scaler": state["scaler"], "held": state["pending_rows"],
    }  # fmt: skip


def test_checkpoints_of_an_earlier_form_are_read_and_of_a_later_refused(whole, tmp_path):
    out, settings = tmp_path / "run", SMALL | {"checkpoint__every_steps": 12, "checkpoint__keep": 9}
    train(out, **settings)
    cut_after(out, 12)
    checkpoint = out / "checkpoints" / "step_00000012"
    kept = torch.load(checkpoint / "run.pt", weights_only=True)
    rewrite_run_state(checkpoint, lambda state: state | {"schema": 3})
    with pytest.raises(UsageError, match=r"run.pt has schema 3, and this version reads up to 2: continue with"):
        train(out, resume=True, **settings)
    rewrite_run_state(checkpoint, lambda _: first_form(kept))
    without(checkpoint / "checkpoint.json", "run", "config", schema=1)
    without(out / "run.json", "id")
    train(out, resume=True, **settings)
    assert timeless(out) == timeless(whole[0])
    assert all(torch.equal(weight, weights(out)[name]) for name, weight in weights(whole[0]).items())
    assert read_info(out).id is None
