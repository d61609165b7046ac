"""One contract for all strategies: whatever turns gradients into updates, the run is the single process's run.

Exactness is float32's: every strategy adds the same numbers in another order. (Such an order may decide on which side
of a ReLU's kink a sum falls; then a step's gradient is another one, in float32 only. The cases here meet no kink.)
"""

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel.capabilities import CAPABILITIES
from gengap_dist.parallel.strategies import STRATEGIES, Single
from gengap_dist.parallel.strategies.fsdp import units
from gengap_dist.training.checks import check_parameters, check_strategy
from tests.conftest import FULL, config, thinned
from tests.parallel.strategies import jobs
from tests.ranks import on_ranks

NEEDS = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
SHARED = [pytest.param(name, marks=NEEDS if "zero" in name else ()) for name in STRATEGIES if name != "single"]
# DeepSpeed's stages 1 and 3 stand for 0 and 2, which are in the tests of many steps, batch norm and resuming, too
ALIKE = ("zero0", "zero2")
FEW = [
    pytest.param(*one.values, marks=[*one.marks, pytest.mark.full]) if one.values[0] in ALIKE else one for one in SHARED
]
CASES = {  # ranks have 7 and 8 micro-batches in a step; or 3, 3 and 4; the 13th step is smaller
    2: {"batch__global_size": 99, "batch__micro_size": 7, "optim__weight_decay": 1e-3},
    3: {"batch__global_size": 100, "batch__micro_size": 11, "optim__nesterov": True},
}
MLP = {"model__name": "mlp", "model__widths": [24, 16], "batch__global_size": 60}
STEPS = 40 if FULL else 15


@pytest.fixture(scope="module")
def alone(crews):
    """`alone(settings, steps)`: what a single process finds."""
    known: dict[str, dict[str, Any]] = {}

    def run(settings: dict[str, Any], steps: int) -> dict[str, Any]:
        key = repr((settings, steps))
        if key not in known:
            (known[key],) = crews[1](jobs.trained, "single", settings, steps)
        return known[key]

    return run


def farthest(found: dict[str, Any], true: dict[str, Any]) -> float:
    """The largest difference between two nested dicts of arrays; running statistics of batch norm left aside."""
    assert found.keys() == true.keys()
    distances = [0.0]
    for key, value in true.items():
        if isinstance(value, dict):
            distances.append(farthest(found[key], value))
        elif not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert found[key].shape == value.shape
            distances.append(float(np.abs(found[key] - value).max()))
    return max(distances)


def agree(answers: list[dict[str, Any]], true: dict[str, Any], tolerance: float) -> None:
    first = answers[0]
    assert {answer["digest"] for answer in answers} == {first["digest"]}
    assert all(answer["same"] for answer in answers)
    for answer in answers:
        assert answer["loss"] == pytest.approx(true["loss"], rel=0, abs=tolerance)
        assert answer["norm"] == pytest.approx(true["norm"], rel=10 * tolerance)
    assert farthest(first["model"], true["model"]) < tolerance
    assert farthest(first["optimizer"], true["optimizer"]) < tolerance


ON_TWO = ("ddp", "zero1", "zero3")  # the others on three
NAMES_AND_SIZES = [(name, size) for name in STRATEGIES if name != "single" for size in CASES]


@pytest.mark.parametrize(
    ("name", "size"), thinned(NAMES_AND_SIZES, lambda name, size: name == "ddp" or (name in ON_TWO) == (size == 2))
)
def test_many_uneven_steps_are_the_single_process_steps(crews, alone, name, size):
    """Losses, gradient norms, whole weights, optimizer state and each rank's own gradient before it met the others'."""
    if "zero" in name:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    answers = crews[size](jobs.trained, name, CASES[size], STEPS, True)
    agree(answers, alone(CASES[size], STEPS), 1e-5)
    for step, energies in crews[1](jobs.small_energies, CASES[size], size, [0, 12, 30] if FULL else [0, 12])[0].items():
        assert answers[0]["energy"][step] == [pytest.approx(pair, rel=1e-4) for pair in energies], step


@pytest.mark.parametrize("name", FEW)
def test_a_rank_without_samples(crews, alone, name):
    settings = {"batch__global_size": 2, "batch__micro_size": 2}
    answers = crews[3](jobs.trained, name, settings, 4, True)
    agree(answers, alone(settings, 4), 1e-5)
    assert [count for _, count in answers[0]["energy"][0]] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SHARED)
def test_batch_norm(crews, alone, name):
    """Ghost batch norm makes training exact; the live running statistics are those of DDP."""
    settings = MLP | {"batch__ghost_size": 10, "batch__micro_size": 20}
    answers = crews[2](jobs.trained, name, settings, 5)
    agree(answers, alone(settings, 5), 1e-5)
    under_ddp = crews[2](jobs.trained, "ddp", settings, 5)[0]["model"]
    for key, value in answers[0]["model"].items():
        assert np.allclose(value, under_ddp[key], rtol=0, atol=1e-5), key
    assert abs(answers[0]["model"]["fc1.norm.running_mean"]).max() > 0.01  # they have moved
    assert len({answer["own"] for answer in answers}) == 2  # and were each rank's own before they were averaged


@pytest.mark.parametrize("name", FEW)
def test_frozen_weights_stay(crews, alone, name):
    settings = {"model__name": "tests.parallel.strategies.jobs:half_frozen", "batch__global_size": 30}
    answers = crews[2](jobs.trained, name, settings, 3, True)
    agree(answers, alone(settings, 3), 1e-5)
    start = alone(settings, 0)["model"]
    moved = [key for key, value in answers[0]["model"].items() if not np.array_equal(value, start[key])]
    assert moved == ["1.bias", "3.weight", "3.bias"]
    assert [*answers[0]["optimizer"]] == moved


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SHARED)
def test_resume_is_bitwise(crews, name, optimizer):
    settings = {"sgd": {"optim__weight_decay": 1e-3}, "adamw": {"optim__name": "adamw"}}[optimizer]
    assert crews[2](jobs.resumed, name, settings | {"batch__global_size": 40, "batch__micro_size": 7}) == [True, True]


MUON = {"optim__name": "muon", "optim__lr": 0.01, "optim__nesterov": True, "optim__weight_decay": 0.1}


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero0", marks=[NEEDS, pytest.mark.full]), "fsdp"])
def test_resume_of_muon_is_bitwise(crews, name):
    assert crews[2](jobs.resumed, name, MUON | {"batch__global_size": 40, "batch__micro_size": 7}) == [True, True]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_muon_sees_whole_matrices(crews, alone, name, size):
    """In float64: of shards, products that are rounded to bfloat16 would differ by 1e-2."""
    settings = MUON | {"batch__global_size": 50, "train__dtype": "float64"}
    agree(crews[size](jobs.trained, name, settings, 6), alone(settings, 6), 1e-10)


@NEEDS
@pytest.mark.parametrize(
    ("settings", "tolerance"), [({}, 1e-5), ({"optim__name": "adamw", "optim__weight_decay": 0.1}, 5e-4)],
    ids=["sgd", "adamw"],
)  # fmt: skip
def test_state_goes_round_through_all_strategies_and_world_sizes(crews, alone, settings, tolerance):
    """2 ranks, 3, then 1; Adam divides by small numbers, so its weights carry rounding further."""
    settings = settings | {"batch__global_size": 50, "batch__micro_size": 9}
    two = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "zero0"]
    three = ["zero2", "fsdp", "zero3", "zero1"]
    first = crews[2](jobs.ring, two, settings, 2)[0]
    second = crews[3](jobs.ring, three, settings, 2, first)[0]
    (last,) = crews[1](jobs.ring, ["single"], settings, 2, second)
    true = alone(settings, 2 * (len(two) + len(three) + 1))
    assert last["step"] == true["step"]
    assert farthest(last["model"], true["model"]) < tolerance
    assert farthest(last["optimizer"], true["optimizer"]) < tolerance


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero0", marks=NEEDS), "fsdp"])
@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_rates_that_follow_norms_of_whole_layers(crews, alone, name, optimizer):
    """Adam's division by the root of tiny squares makes LAMB's rounding larger; float64 shows that it is rounding."""
    pytest.importorskip("timm", reason="timm is not installed")
    settings = {"optim__name": optimizer, "batch__global_size": 50, "optim__weight_decay": 1e-3, "optim__lr": 0.01}
    agree(crews[2](jobs.trained, name, settings, 6), alone(settings, 6), 1e-5 if optimizer == "lars" else 5e-4)
    if name != "zero0":
        settings |= {"train__dtype": "float64"}
        agree(crews[2](jobs.trained, name, settings, 6), alone(settings, 6), 1e-10)


@pytest.mark.parametrize("name", FEW)
def test_clipping(crews, alone, name):
    """By the norm of the global gradient, which is recorded as it was before."""
    settings = {"batch__global_size": 50, "optim__clip_norm": 0.05}
    want = alone(settings, 6)
    assert min(want["norm"]) > 0.05
    agree(crews[2](jobs.trained, name, settings, 6), want, 1e-5)
    assert want["loss"][-1] > alone({"batch__global_size": 50}, 6)["loss"][-1]


def test_sam_under_fsdp(crews):
    settings = {"batch__global_size": 50, "algorithm__sam_rho": 0.1, "train__dtype": "float64"}
    agree(crews[2](jobs.trained, "fsdp", settings, 6), crews[2](jobs.trained, "ddp", settings, 6)[0], 1e-12)


@pytest.mark.parametrize("name", FEW)
def test_bfloat16_autocast(crews, alone, name):
    """Forward passes are rounded, and in the same way by all; weights and what the optimizer keeps are not."""
    settings = MLP | {"train__autocast": "bfloat16", "batch__ghost_size": 10, "batch__micro_size": 20}
    answers = crews[2](jobs.trained, name, settings, 5)
    agree(answers, crews[2](jobs.trained, "ddp", settings, 5)[0], 1e-4)
    assert answers[0]["loss"] == pytest.approx(alone(settings, 5)["loss"], abs=0.01)  # which cuts the batch elsewhere
    assert answers[0]["model"]["head.weight"].dtype == np.float32
    assert all(v.dtype == np.float32 for kept in answers[0]["optimizer"].values() for v in kept.values())
    exact = alone({key: value for key, value in settings.items() if key != "train__autocast"}, 5)["loss"]
    assert answers[0]["loss"] == pytest.approx(exact, abs=0.05)
    assert all(abs(a - b) > 1e-5 for a, b in zip(answers[0]["loss"], exact, strict=True))


def test_fsdp_is_exact_in_float64(crews, alone):
    settings = CASES[3] | {"train__dtype": "float64"}
    agree(crews[3](jobs.trained, "fsdp", settings, 8), alone(settings, 8), 1e-13)


HYBRID = {"launch__shard_size": 2}


def test_hybrid_sharding_on_two_by_two_ranks(crews, alone):
    """Sums go over both dimensions, also in a smaller step (the fourth); one rank resumes, then four."""
    settings = {"batch__global_size": 399, "batch__micro_size": 50, "optim__weight_decay": 1e-3}
    settings |= {"train__dtype": "float64", "optim__clip_norm": 0.05}
    answers = crews[4](jobs.trained, "fsdp", settings | HYBRID, 5, True)
    agree(answers, alone(settings, 5), 1e-12)
    assert min(answers[0]["norm"]) > 0.05  # every step is clipped
    for step, energies in crews[1](jobs.small_energies, settings, 4, [0, 3])[0].items():
        assert answers[0]["energy"][step] == [pytest.approx(pair, rel=1e-9) for pair in energies], step
    (resumed,) = crews[1](jobs.ring, ["single"], settings, 1, answers[0])
    resumed = crews[4](jobs.ring, ["fsdp"], settings | HYBRID, 1, resumed)[0]
    whole = alone(settings, 7)
    assert farthest(resumed["model"], whole["model"]) < 1e-12
    assert farthest(resumed["optimizer"], whole["optimizer"]) < 1e-12


def test_hybrid_sharding_has_groups_of_its_own(crews):
    for answer in crews[4](jobs.sharding, "fsdp", MLP | HYBRID):
        assert answer["dimensions"] == ("replicate", "shard")
        assert answer["ranks"] == [[0, 1], [2, 3]]
        assert answer["share"] == 0.5
        assert (answer["groups"], answer["left"]) == (2, 0)
    for answer in crews[4](jobs.sharding, "fsdp", MLP):
        assert answer == {"dimensions": ("batch",), "ranks": [0, 1, 2, 3], "share": 0.25, "groups": 0, "left": 0}


@pytest.mark.parametrize("name", FEW)
def test_a_gradient_that_is_no_number_ends_in_a_loss_that_is_none(crews, name):
    """DeepSpeed alone would leave the update out, and go on."""
    for losses in crews[2](jobs.blown_up, name, {"batch__global_size": 40}):
        assert np.isfinite(losses[0])
        assert not np.isfinite(losses[2])


@pytest.mark.parametrize("name", [name for name in FEW if "zero3" not in str(name)])  # DeepSpeed's cache keeps it
def test_a_closed_strategy_leaves_the_memory(crews, name):
    assert crews[2](jobs.forgotten, name, {"batch__global_size": 20}) == [True, True]


@NEEDS
def test_one_rank_without_a_compiler_and_without_a_word(alone, tmp_path, monkeypatch, capfd):
    """DeepSpeed's op for CPUs is not needed, and nothing is built or left behind."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    settings = {"batch__global_size": 20}
    agree(on_ranks(1, jobs.trained, "zero2", settings, 2), alone(settings, 2), 1e-5)
    assert capfd.readouterr() == ("", "")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("zero0", {"train__dtype": "float64"}, r"train.dtype \(float64\) is not supported by launch.strategy=zero0"),
        ("zero1", {"optim__name": "lars"}, r"optim.name \(lars\) is not supported by launch.strategy=zero1"),
        ("zero2", {"optim__name": "lamb"}, r"optim.name \(lamb\) is not supported by launch.strategy=zero2"),
        ("zero3", {"optim__name": "lars"}, "choose ddp, zero0 or fsdp"),
        ("zero1", {"optim__name": "muon"}, r"optim.name \(muon\) is not supported by .*choose ddp, zero0 or fsdp"),
        ("fsdp", {"optim__name": "a:b"}, r"optim.name \(a:b\) is not supported by .*choose ddp or zero0"),
        ("ddp", HYBRID, r"launch.shard_size \(2\) is not supported by launch.strategy=ddp: choose fsdp"),
        ("fsdp", {"launch__shard_size": 4}, r"launch.shard_size \(4\) does not divide the number of ranks \(2\)"),
    ],
)
def test_what_a_strategy_cannot_train(name, settings, says):
    with pytest.raises(UsageError, match=says):
        check_strategy(config(launch__strategy=name, **settings), 2)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(importlib.sys.modules, "deepspeed", None)  # what import finds where it is not installed
    with pytest.raises(UsageError, match=r"launch.strategy \(zero2\) needs the package deepspeed: pip install"):
        STRATEGIES["zero2"](config(), World())


@pytest.mark.parametrize("name", ["single", *FEW])
def test_a_parameter_without_dimensions_is_trained_or_refused_with_a_remedy_that_works(crews, alone, name):
    settings = {"model__name": "tests.parallel.strategies.jobs:with_scalar", "batch__global_size": 30}
    if CAPABILITIES[name].scalar_parameters:
        size = 1 if name == "single" else 2
        agree(crews[size](jobs.trained, name, settings, 4), alone(settings, 4), 1e-5)
        return
    model = models.from_config(config(**settings), DataSpec.images(10, 1), World())
    says = rf"launch.strategy \({name}\) does not support parameter scale, which has no dimension: .*, or choose ddp"
    with pytest.raises(UsageError, match=says):
        check_parameters(config(launch__strategy=name, **settings), model, 2)


@pytest.mark.parametrize("name", FEW)
def test_a_parameter_that_no_pass_uses(crews, alone, name):
    """The others are trained as on one rank."""
    settings = {"model__name": "tests.parallel.strategies.jobs:with_unused", "batch__global_size": 30}
    answers, true = crews[2](jobs.trained, name, settings, 4), alone(settings, 4)
    assert {answer["digest"] for answer in answers} == {answers[0]["digest"]}
    assert answers[0]["loss"] == pytest.approx(true["loss"], abs=1e-5)
    for key, value in true["model"].items():
        assert np.abs(answers[0]["model"][key] - value).max() < 1e-5, key


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(200, 200), torch.nn.Linear(200, 200)
        self.second.weight = self.first.weight


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))


def test_fsdp_keeps_tied_parameters_together():
    assert len(units(torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.ModuleList([Tied()])))) == 0
    assert [type(unit) for unit in units(torch.nn.ModuleList([torch.nn.Linear(200, 200)]))] == [torch.nn.Linear]


def test_the_model_in_training_is_only_read():
    strategy = Single(config(), World())
    strategy.setup(torch.nn.Linear(2, 2), lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    with strategy.unsharded_model() as model:
        model.eval()(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="parameter weight was changed"), torch.no_grad():  # noqa: SIM117
        with strategy.unsharded_model() as model:
            model.weight.add_(1)
