"""What a run records for its verdicts: losses of the probe set, measurements at losses, correctness of test images."""

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gengap_dist import models
from gengap_dist.analysis.study_data import read_run
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics, read_test_correct
from gengap_dist.training.tasks import Task
from gengap_dist.training.trainer import run
from tests.conftest import FULL, config, cut_after, thinned, train, weights
from tests.runs.test_schema import SCHEMA_1

FALLING = {
    "model__name": "mlp",
    "model__widths": (64,),
    "model__norm": "none",
    "train__dtype": "float64",
    "train__steps": 60,
    "train__num_evals": 2,
    "batch__global_size": 100,
    "batch__micro_size": 30,
    "optim__lr": 0.05,
    "probe__num_samples": 300,
    "probe__per_decade": None,
    "probe__at_losses": [2.0, 1.6, 1.2, 0.8, 0.4],
}
"""21 steps fill the window; then the loss falls through some of the values."""
PLAIN = FALLING | {"algorithm__label_smoothing": 0.2}


def run_there(world, out):
    run(config(**PLAIN), out, world=world)


def measured_steps(out):
    return [line["step"] for line in read_metrics(out) if "probe/loss" in line]


def timeless(out):
    return [
        {key: value for key, value in line.items() if "seconds" not in key and not key.startswith("time/")}
        for line in read_metrics(out)
    ]


@pytest.fixture(scope="module")
def falling(tmp_path_factory):
    out = tmp_path_factory.mktemp("falling") / "run"
    train(out, **PLAIN)
    return out


# -- the probe set ---------------------------------------------------------------------------------------


def test_loss_and_accuracy_of_the_probe_set_are_those_of_its_images_without_smoothing(falling):
    settings = config(**PLAIN)
    splits = datasets.load(settings.data)
    chosen = torch.from_numpy(seeded_rng(0, 2).permutation(len(splits.train))[:300])
    model = models.from_config(settings, splits.spec, World()).double().eval()
    model.load_state_dict(weights(falling))
    inputs = Preprocess(splits.pixels, torch.device("cpu"), torch.float64)(splits.train.inputs[chosen])
    with torch.no_grad():
        outputs = model(inputs)
    *_, last = read_metrics(falling)
    targets = splits.train.targets[chosen]
    assert last["probe/loss"] == pytest.approx(float(cross_entropy(outputs, targets)), rel=1e-12)
    assert last["probe/accuracy"] == float((outputs.argmax(1) == targets).double().mean())


def test_every_measurement_has_a_validation_and_only_planned_ones_choose_the_best(falling, tmp_path):
    lines = list(read_metrics(falling))
    measured = {line["step"] for line in lines if "probe/loss" in line}
    validated = {line["step"] for line in lines if "val/accuracy" in line}
    assert validated == measured | {0, 30, 60}
    assert {line["step"] for line in lines if "probe_seconds/validation" in line} == measured - {0, 30, 60}
    train(tmp_path / "without", **PLAIN | {"probe__enabled": False})
    without, with_probes = (read_info(out).result for out in (tmp_path / "without", falling))
    for name in ("best_val_step", "best_val/accuracy", "test/loss", "test_at_best_val/accuracy"):
        assert with_probes[name] == without[name]
    assert with_probes["best_val_step"] in (0, 30, 60)


def test_no_validation_samples_no_validation(tmp_path):
    train(tmp_path / "run", **FALLING | {"data__val_fraction": 0.0, "train__steps": 2})
    assert not any(name.startswith("val/") for line in read_metrics(tmp_path / "run") for name in line)
    steps, losses, scores = read_run(tmp_path / "run").curve()
    assert len(steps) == len(losses) == len(scores) == 0


# -- at losses ---------------------------------------------------------------------------------------


def running_means(out):
    """Step to the mean loss of the last 2,048 images, by the record of a run with steps of 100 images."""
    losses = [line["train/loss"] for line in read_metrics(out) if "train/loss" in line]
    sizes = [100] * len(losses)
    means = {}
    for step in range(1, len(losses) + 1):
        room, total = 2_048, 0.0
        for size, loss in zip(reversed(sizes[:step]), reversed(losses[:step]), strict=True):
            total += min(size, room) * loss
            room -= min(size, room)
        if not room:
            means[step] = total / 2_048
    return means


def test_measured_one_step_after_the_mean_of_the_last_images_fell_below_a_value(tmp_path):
    train(tmp_path / "run", **FALLING | {"data__num_train": 1_200})  # epochs of 12 whole steps
    means = running_means(tmp_path / "run")
    expected = {0, 60}
    for value in FALLING["probe__at_losses"]:
        below = [step for step, mean in means.items() if mean < value]
        expected |= {min(below) + 1} if below else set()
    found = measured_steps(tmp_path / "run")
    assert found == sorted(step for step in expected if step <= 60)
    assert len(found) > 3


def test_label_smoothing_is_not_part_of_the_loss_that_decides(falling, tmp_path):
    train(tmp_path / "smoothed", **PLAIN | {"probe__at_losses": [1.0]})
    lines = [line["train/loss"] for line in read_metrics(tmp_path / "smoothed") if "train/loss" in line]
    (_, step, _) = measured_steps(tmp_path / "smoothed")
    assert np.mean(lines[step - 21 : step - 1]) > 1.05  # with smoothing it is far above


@pytest.mark.parametrize("size", thinned([2, 3], lambda size: size == 3))
def test_any_number_of_ranks_records_the_same(falling, crews, tmp_path, size):
    out = tmp_path / "run"
    prepare_folder(out, "run.json", resume=False)
    crews[size](run_there, out)
    assert measured_steps(out) == measured_steps(falling)
    assert (read_test_correct(out) == read_test_correct(falling)).all()
    lines, expected = [*read_metrics(out)], [*read_metrics(falling)]
    for line, other in zip(lines, expected, strict=True):
        for name in ("probe/loss", "probe/accuracy", "val/loss", "val/accuracy"):
            assert (name in line) == (name in other)
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-9)
    assert lines[0]["probe/loss"] == expected[0]["probe/loss"]  # of equal networks, to the last bit
    assert lines[0]["val/loss"] == expected[0]["val/loss"]


@pytest.fixture(scope="module")
def saved_at_every_step(tmp_path_factory):
    """Sums are read early after every step; in `falling` only where something is due."""
    out = tmp_path_factory.mktemp("saved") / "run"
    train(out, **PLAIN, checkpoint__every_steps=1, checkpoint__keep=99)
    return out


def test_when_checkpoints_are_written_does_not_move_a_measurement(falling, saved_at_every_step):
    assert timeless(saved_at_every_step) == timeless(falling)


@pytest.mark.parametrize("behind", range(-3, 3) if FULL else (-1, 0))
def test_a_run_that_was_cut_off_measures_at_the_same_losses(falling, saved_at_every_step, tmp_path, behind):
    second = measured_steps(falling)[2]
    out = tmp_path / "run"
    shutil.copytree(saved_at_every_step, out)
    cut_after(out, second + behind)
    train(out, resume=True, **PLAIN, checkpoint__every_steps=1, checkpoint__keep=99)
    assert timeless(out) == timeless(falling)


def test_the_time_limit_skips_measurements_at_losses_too(falling, tmp_path, monkeypatch):
    monkeypatch.setattr("gengap_dist.training.probe_scheduler.MIN_MEASUREMENTS", 2)
    result = train(tmp_path / "run", **PLAIN | {"probe__max_time_fraction": 1e-6})
    assert measured_steps(tmp_path / "run") == [0, 60]
    assert result["probe_left_out"] == measured_steps(falling)[1:-1] != []


def test_off_measures_at_no_loss(tmp_path):
    for number, off in enumerate(["off", False, None, []]):
        assert config(probe__at_losses=off).probe.at_losses == (), number
    train(tmp_path / "run", **FALLING | {"probe__at_losses": "off", "train__steps": 40})
    assert measured_steps(tmp_path / "run") == [0, 40]


def test_losses_that_are_none():
    with pytest.raises(UsageError, match=r"probe.at_losses \(-1\) is not a positive number, auto or off"):
        config(probe__at_losses=[1.0, -1])
    with pytest.raises(UsageError, match=r"probe.at_losses \(often\) is not a positive number, auto or off"):
        config(probe__at_losses="often")


# -- test images ---------------------------------------------------------------------------------------


def test_correctness_of_every_test_image(falling):
    settings = config(**PLAIN)
    splits = datasets.load(settings.data)
    model = models.from_config(settings, splits.spec, World()).double().eval()
    model.load_state_dict(weights(falling))
    with torch.no_grad():
        outputs = model(Preprocess(splits.pixels, torch.device("cpu"), torch.float64)(splits.test.inputs))
    found, result = read_test_correct(falling), read_info(falling).result
    assert found.dtype == bool
    assert (found == (outputs.argmax(1) == splits.test.targets).numpy()).all()
    assert found.mean() == result["test/accuracy"]
    assert (result["num_test"], (falling / "test_correct.npy").stat().st_size) == (360, 128 + 45)
    assert (read_run(falling).test_correct() == found).all()


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "more"])
def test_a_damaged_file_is_named(falling, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(falling, out)
    path = out / "test_correct.npy"
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-5])
        case "empty":
            path.write_bytes(b"")
        case "other":
            np.save(path, np.zeros(45))
        case "more":
            np.save(path, np.zeros(46, dtype=np.uint8))
    with pytest.raises(UsageError, match=r"test_correct.npy is damaged, needs a bit for each of 360 test samples"):
        read_test_correct(out)


def test_a_run_without_the_file(falling, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(falling, out)
    (out / "test_correct.npy").unlink()
    assert read_test_correct(out) is None


class Numbers(Task):
    """Squared error: nothing is right or wrong."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()


class Signs(Numbers):
    """The same, where a sign is right or wrong."""

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets > 0)[:, 0]


class Wrong(Numbers):
    """One answer for all samples."""

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets > 0).all()


def table() -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.linspace(-1, 1, 300 * 4).view(300, 4)
    return {"train": (x, x.sum(1)), "test": (x[:101], x[:101].sum(1))}


def linear(input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.ReLU(), torch.nn.Linear(12, 1))


TABLE = {"data__name": f"{__name__}:table", "model__name": f"{__name__}:linear", "train__steps": 3,
         "probe__num_samples": 100, "probe__diagnostics": ()}  # fmt: skip


def test_a_task_says_whether_its_samples_are_right(tmp_path):
    for name, known in (("Numbers", False), ("Signs", True)):
        train(tmp_path / name, **TABLE, task__name=f"{__name__}:{name}")
        found = read_test_correct(tmp_path / name)
        assert (tmp_path / name / "test_correct.npy").exists() == known == (found is not None)
        *_, last = read_metrics(tmp_path / name)
        assert last["probe/loss"] > 0
        assert read_info(tmp_path / name).metric.chance is None
    assert found.shape == (101,)
    with pytest.raises(UsageError, match=r"Wrong.correct returns bool of shape \[\] for 2 samples: return whether"):
        train(tmp_path / "wrong", **TABLE, task__name=f"{__name__}:Wrong")


# -- what run.json says ---------------------------------------------------------------------------------------


def uneven() -> dict[str, tuple[Tensor, Tensor]]:
    images = torch.randint(0, 256, (100, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 4 // 2  # half of them of class 0, and more below
    labels[:60] = 1
    return {"train": (images, labels), "test": (images[:20], labels[:20])}


def test_chance_is_the_share_of_the_largest_class_that_is_trained_on(tmp_path):
    settings = FALLING | {"data__name": f"{__name__}:uneven", "data__image_size": 8, "train__steps": 1,
                          "batch__global_size": 10, "probe__num_samples": 20, "data__num_train": 50}  # fmt: skip
    train(tmp_path / "run", **settings)
    trained_on = datasets.load(config(**settings).data).train.targets
    assert read_info(tmp_path / "run").metric.chance == float(trained_on.double().mean()) > 0.6


@pytest.mark.parametrize(
    ("layers", "last"), [(["auto"], "fc2"), (["fc*"], "fc2"), (["fc1", "fc2", "fc3"], "fc2"), (["conv1"], "conv1")]
)
def test_the_last_hidden_layer(tmp_path, layers, last):
    settings = {"train__steps": 1, "probe__num_samples": 64, "probe__layers": layers, "probe__diagnostics": ()}
    train(tmp_path / "run", **settings)
    info = read_info(tmp_path / "run")
    assert info.last_hidden_layer == last
    view = "/pool" if last == "conv1" else ""
    assert read_run(tmp_path / "run").primary_measure == f"near_rank_loss/{last}{view}/centred/rel_1e-2"
    assert list(read_run(tmp_path / "run").series(f"near_rank_loss/{last}{view}/centred/rel_1e-2")[0]) == [0, 1]
    assert info.samples_per_unit[f"{last}{view}"] == round(64 / {"fc2": 84, "conv1": 6}[last], 3)


def test_few_samples_for_each_unit_are_told(tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"the probe set of 64 gives fc1 a matrix with 0.533 rows for each of its.*set probe.num_samples=480",
    ):
        train(tmp_path / "run", train__steps=1, probe__num_samples=64)


def test_curve_has_the_steps_with_both(falling):
    steps, losses, scores = read_run(falling).curve()
    lines = {line["step"]: line for line in read_metrics(falling)}
    assert list(steps) == measured_steps(falling)
    assert list(losses) == [lines[step]["probe/loss"] for step in steps]
    assert list(scores) == [lines[step]["val/accuracy"] for step in steps]
    assert len(read_run(falling).series("train/lr")[0]) == 60


def test_a_run_of_schema_1_has_no_curve_and_no_bits(tmp_path):
    found = read_run(SCHEMA_1 / "runs" / "sb32" / "seed0")
    assert len(found.curve()[0]) == 0
    assert found.test_correct() is None
