"""Switches of precision and speed: on or off, a run computes the same; what cannot be switched on is refused."""

import copy
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import average_buffers
from gengap_dist.models.dropout import replace_random_layers
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.parallel import memory_model
from gengap_dist.parallel.execution import (
    WORKSPACE_VARIABLE,
    check_compiler,
    checkpoint_blocks,
    checkpointable_blocks,
    deterministic,
)
from gengap_dist.parallel.strategies import Single
from gengap_dist.runs.run_folder import read_info, read_metrics
from gengap_dist.training.algorithms import AlgorithmSetup, build_algorithm
from gengap_dist.training.checks import check_switches
from gengap_dist.training.tasks import Classification
from tests.conftest import config, cut_after, thinned, train
from tests.parallel.strategies import jobs
from tests.ranks import Crew

EXACT = {"train__dtype": "float64"}  # rounding is told from all else best where it is small
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20": {"model__name": "resnet20", "data__image_size": 16, "batch__global_size": 24, "batch__micro_size": 12},
    "mlp-ghost": {"model__name": "mlp", "model__widths": [12, 12], "batch__global_size": 60, "batch__ghost_size": 10,
                  "batch__micro_size": 20},
}  # fmt: skip
SAME = {"activation_checkpointing": 0.0, "channels_last": 1e-9, "deterministic": 0.0}  # how far losses may be off
HAS_COMPILER = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v ${CXX:-g++}"], capture_output=True).returncode != 0,
    reason="no C++ compiler on the PATH",
)
TINY = EXACT | {"model__name": "mlp", "model__widths": [8], "batch__global_size": 12, "batch__ghost_size": 2,
                "batch__micro_size": 6, "optim__clip_norm": 1.0}  # fmt: skip


@pytest.fixture(scope="module")
def off(crews: dict[int, Crew]) -> Callable[[str, int], list[dict[str, Any]]]:
    """`off(network, ranks)`: what ranks know after five steps without switches."""
    known: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def run(network: str, size: int) -> list[dict[str, Any]]:
        if (network, size) not in known:
            known[network, size] = five_steps(crews, network, size)
        return known[network, size]

    return run


def five_steps(crews: dict[int, Crew], network: str, size: int, **switches: object) -> list[dict[str, Any]]:
    return crews[size](jobs.trained, "ddp" if size > 1 else "single", EXACT | NETWORKS[network] | switches, 5, True)


@pytest.mark.parametrize(
    ("network", "size"),
    thinned([(name, size) for name in NETWORKS for size in (1, 2)], lambda name, size: (name, size) != ("resnet20", 1)),
)
@pytest.mark.parametrize("switch", SAME)
def test_a_switch_changes_no_number(crews, off, switch, network, size):
    true = off(network, size)
    found = five_steps(crews, network, size, **{f"train__{switch}": True})
    for here, there in zip(found, true, strict=True):
        for key in ("loss", "norm"):
            assert here[key] == pytest.approx(there[key], rel=SAME[switch], abs=SAME[switch])
        assert [*here["model"]] == [*there["model"]]
        for name, value in there["model"].items():  # running statistics and their counters, too
            assert abs(here["model"][name] - value).max() <= SAME[switch], name
        energies = [pair for step in there["energy"] for pair in step]
        assert [pair for step in here["energy"] for pair in step] == [
            pytest.approx(pair, rel=1e3 * SAME[switch]) for pair in energies
        ]
    assert true[0]["loss"][0] != true[0]["loss"][-1]


# -- recompute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", thinned(["fsdp", "zero0", "zero2", "zero3"], lambda name: name in ("fsdp", "zero3")))
def test_recompute_under_sharded_strategies(crews, name):
    if "zero" in name:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    settings = NETWORKS["mlp-ghost"] | {"model__widths": [120, 120]}
    plain, twice = (
        crews[2](jobs.trained, name, settings | {"train__activation_checkpointing": on}, 3) for on in (False, True)
    )
    for here, there in zip(twice, plain, strict=True):
        assert here["loss"] == there["loss"]
        assert all((here["model"][key] == value).all() for key, value in there["model"].items())


def names(model: nn.Module) -> list[str]:
    found = {id(block) for block in checkpointable_blocks(model)}
    return [name for name, module in model.named_modules() if id(module) in found]


class Encoder(nn.Module):
    """A network as transformers are written: blocks in a list, inside a module that is not a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 32)
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)])  # has dropout
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).movedim(2, 1)
        for block in self.body.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def test_blocks_of_many_networks():
    build = partial(models.build, spec=DataSpec.images(10, 1))
    assert names(build("resnet20")) == ["conv1"] + [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    assert names(build("lenet5")) == ["conv1", "conv2", "fc1", "fc2"]
    assert names(build("torchvision:resnet18")) == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    vit = build("torchvision:vit_b_16")
    assert names(vit) == [f"encoder.layers.encoder_layer_{n}" for n in range(12)] + ["heads"]
    assert names(Encoder()) == ["body.blocks.0", "body.blocks.1"]
    assert names(nn.Linear(2, 2)) == []


def test_recompute_draws_the_same_dropout():
    """torch's own dropout: gradients are those of the masks that the forward pass had."""
    torch.manual_seed(0)
    plain, images = Encoder().double(), torch.rand(3, 1, 32, 32, dtype=torch.float64)
    twice = copy.deepcopy(plain)
    checkpoint_blocks(twice)
    for model in (plain, twice):
        torch.manual_seed(1)
        model(images).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), twice.parameters(), strict=True))
    torch.manual_seed(2)
    other = plain(images)
    assert not torch.equal(other, plain(images))  # dropout there is


def test_recompute_draws_the_same_where_a_layer_drops_twice():
    """Our own dropout counts its calls in a pass; a block that is computed again starts from where it did."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.inner(self.drop(x)))

    torch.manual_seed(0)
    position, x = SamplePosition(), torch.rand(3, 8, dtype=torch.float64)
    plain = nn.Sequential(Twice(), Twice()).double()
    replace_random_layers(plain, position)
    twice = copy.deepcopy(plain)
    checkpoint_blocks(twice)
    for model in (plain, twice):
        model[0].drop.position.move_to(0, 3, 1, 0)
        model(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), twice.parameters(), strict=True))
    assert twice[0].drop.position.calls == plain[0].drop.position.calls != {}


def test_a_copy_recomputes_with_its_own_weights():
    model = models.build("lenet5", DataSpec.images(10, 1))
    checkpoint_blocks(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.get_parameter("fc1.affine.weight"))
    images = torch.rand(2, 1, 32, 32)
    before = model(images)
    twin(images).sum().backward()
    assert torch.equal(model(images), before)
    assert model.get_parameter("conv1.affine.weight").grad is None
    assert twin.get_parameter("conv1.affine.weight").grad is not None


@contextmanager
def counting(own: set[int]) -> Iterator[dict[int, Tensor]]:
    """What autograd saves inside: storages that are not of `own`."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def test_recompute_keeps_less_than_a_third_of_resnet56():
    """Counted in a real pass, and as `plan` says: with the largest block's own on top, as in its backward pass."""
    kept, planned = [], []
    for on in (False, True):
        settings = config(model__name="resnet56", train__activation_checkpointing=on)
        spec = DataSpec.images(10, 3)
        model = models.from_config(settings, spec, World())
        planned.append(memory_model.saved_for_backward(settings, model, spec, Classification(spec).loss_sum, 4)[0])
        if on:
            checkpoint_blocks(model)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        with counting(own) as saved:
            loss = model(torch.rand(4, 3, 32, 32)).sum()
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
        loss.backward()
    assert kept[1] < kept[0] / 3
    assert planned[0] == pytest.approx(kept[0], rel=0.01)
    assert kept[1] < planned[1] < kept[1] + 0.1 * kept[0]
    assert planned[1] < planned[0] / 2


# -- float16 ----------------------------------------------------------------------------------------------------------

HALF = {"train__autocast": "float16"}


def halves(world: World, name: str, spoil: int | None) -> dict[str, Any]:
    """Two steps under the scaler; in the first, one rank's gradient is made infinite if `spoil` names that rank."""
    trainer = jobs.Trainer(name, world, EXACT | HALF | NETWORKS["mlp-ghost"])
    strategy, scale = trainer.strategy, trainer.strategy.execution.scaler.get_scale()
    model = strategy.model
    if spoil == world.rank:
        hook = model.get_parameter("head.bias").register_hook(lambda gradient: gradient / 0)
    start = {key: value.clone() for key, value in model.named_parameters()}
    first = trainer.train(1, watch=True)
    stayed = all(torch.equal(value, start[key]) for key, value in model.named_parameters())
    kept = strategy.execution.scaler.get_scale() / scale
    if spoil == world.rank:
        hook.remove()
    second = trainer.train(1, watch=True)
    finite = all(bool(value.isfinite().all()) for value in model.parameters())
    moved = not all(torch.equal(value, start[key]) for key, value in model.named_parameters())
    momenta = [float(kept["momentum_buffer"].abs().max()) for kept in strategy.optimizer_state().values()]
    return {"stayed": stayed, "kept": kept, "first": first, "second": second, "moved": finite and moved,
            "momentum": max(momenta)}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_float16_is_float64_but_for_rounding(crews, off, size):
    """Autocast leaves float64 products alone: what is left is the scale, a power of two."""
    true = off("mlp-ghost", size)
    for here, there in zip(five_steps(crews, "mlp-ghost", size, **HALF), true, strict=True):
        for key in ("loss", "norm"):
            assert here[key] == pytest.approx(there[key], rel=1e-12)
        for step, pairs in enumerate(there["energy"]):
            assert here["energy"][step] == [pytest.approx(pair, rel=1e-12) for pair in pairs]
        assert all(abs(here["model"][key] - value).max() < 1e-12 for key, value in there["model"].items())


@pytest.mark.parametrize(("size", "name"), [(1, "single"), (2, "ddp")])
def test_an_infinite_gradient_skips_the_step_on_all_ranks_and_halves_the_scale(crews, size, name):
    for answer in crews[size](halves, name, size - 1):
        assert answer["stayed"]
        assert answer["kept"] == 0.5
        assert not torch.tensor(answer["first"]["norm"]).isfinite().any()
        assert answer["moved"]
        assert answer["momentum"] < 10  # none but the second step's gradient: fused SGD has a trap there
    for answer in crews[size](halves, name, None):
        assert not answer["stayed"]
        assert answer["kept"] == 1.0


def descent(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def test_small_gradients_survive_float16_by_the_scale():
    """What float16 would call zero: float32 parameters, real float16 products."""
    found = {}
    for autocast in (None, "float16"):
        strategy = Single(config(train__autocast=autocast), World())
        torch.manual_seed(0)
        strategy.setup(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)), descent)
        strategy.backward(strategy.forward(torch.ones(1, 1, 2, 2)).sum() * 1e-8)
        found[autocast] = float(strategy.step())
    assert found["float16"] == pytest.approx(found[None], rel=1e-2)
    assert float(torch.tensor(1e-8).half()) == 0.0  # as the gradients are without a scale


def test_sam_under_float16(crews):
    settings = EXACT | NETWORKS["mlp-ghost"] | {"algorithm__sam_rho": 0.05}
    for size, name in ((1, "single"), (2, "ddp")):
        plain, half = (crews[size](sam_steps, name, settings | more)[0] for more in ({}, HALF))
        assert half["loss"] == pytest.approx(plain["loss"], rel=1e-12)
        assert half["norm"] == pytest.approx(plain["norm"], rel=1e-9)  # the first gradient's


def sam_steps(world: World, name: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Losses, running statistics averaged, and norms of four steps of a algorithm."""
    trainer = jobs.Trainer(name, world, settings)
    setup = trainer.config, trainer.task, trainer.strategy, trainer.batches, trainer.order, 4
    course = build_algorithm(AlgorithmSetup(*setup))
    trainer.strategy.model.train()
    rows = []
    for step in range(4):
        taken = course.step(step, 0.02, 0.9)
        rows.append((float(world.all_reduce(taken.sums.loss_sum.clone())), float(taken.norm)))
    average_buffers(trainer.strategy.model, world)
    return {"loss": [row[0] for row in rows], "norm": [row[1] for row in rows]}


def test_the_scaler_goes_on_where_it_stopped():
    """Scale and growth counter through a checkpoint's formats; then the same bits as without a break."""
    world, settings = World(), HALF | NETWORKS["mlp-ghost"]
    whole = jobs.Trainer("single", world, settings)
    # it grows in the second part only if the first is remembered
    whole.strategy.execution.scaler.set_growth_interval(4)
    first = jobs.Trainer("single", world, settings)
    first.strategy.execution.scaler.set_growth_interval(4)
    first.train(3)
    second = jobs.Trainer("single", world, settings, first.save())
    second.strategy.execution.scaler.load_state_dict(first.strategy.execution.scaler.state_dict())
    scale = second.strategy.execution.scaler.get_scale()
    losses = whole.train(6)["loss"][3:]
    assert second.train(3)["loss"] == losses
    assert second.strategy.execution.scaler.get_scale() == whole.strategy.execution.scaler.get_scale() == 2 * scale
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole.strategy.model.parameters(), second.strategy.model.parameters(), strict=True)
    )


def test_the_scaler_is_in_the_checkpoint(tmp_path):
    train(tmp_path, train__steps=2, probe__enabled=False)
    (path,) = (tmp_path / "checkpoints").glob("step_*2")
    assert torch.load(path / "run.pt", weights_only=True)["scaler"] == {}  # of a run without float16


# -- compile ----------------------------------------------------------------------------------------------------------


def compiled_steps(world: World, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Five steps, no pass of the last three compiled anew."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    trainer = jobs.Trainer(name, world, settings)
    setup = trainer.config, trainer.task, trainer.strategy, trainer.batches, trainer.order, 5
    course = build_algorithm(AlgorithmSetup(*setup))
    trainer.strategy.model.train()
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            with torch.compiler.set_stance(
                "fail_on_recompile" if step > 1 and trainer.config.train.compile else "default"
            ):
                sums = course.step(step, 0.02, 0.9).sums
            losses.append(float(world.all_reduce(sums.loss_sum.clone())))
    saved = trainer.save()
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    return {"loss": losses, "breaks": breaks, "graphs": graphs} | jobs.arrays(saved)


@HAS_COMPILER
@pytest.mark.parametrize(
    ("size", "name", "more"),
    [
        pytest.param(1, "single", {}, marks=pytest.mark.full),  # else: a whole run, below
        (1, "single", {"algorithm__sam_rho": 0.05}),
        (1, "single", {"algorithm__gradient_penalty": 0.1, "algorithm__penalty_size": 6}),
        (2, "ddp", {"train__channels_last": True}),
    ],
    ids=["single", "sam", "gradient_penalty", "ddp"],
)
def test_compiled_steps_are_the_plain_steps(crews, size, name, more):
    """In one graph, ghost batch norm and all, compiled once: its place in the batch is no part of the program."""
    plain, compiled = (crews[size](compiled_steps, name, TINY | more | {"train__compile": on}) for on in (False, True))
    for here, there in zip(compiled, plain, strict=True):
        assert here["breaks"] == 0
        assert here["graphs"] >= 1
        assert there["graphs"] == 0
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-10)
        assert [*here["model"]] == [*there["model"]]
        for key, value in there["model"].items():
            assert abs(here["model"][key] - value).max() < 1e-10, key


@HAS_COMPILER
def test_runs_share_what_was_compiled_and_an_odd_last_step_is_not_compiled_at_all(tmp_path):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    for seed in (0, 1):
        train(tmp_path / str(seed), **TINY | {"train__epochs": 2, "train__steps": None}, train__compile=True, seed=seed)
        assert counters["stats"]["unique_graphs"] == 1
    steps = [line["train/loss"] for line in read_metrics(tmp_path / "1") if "train/loss" in line]
    info = read_info(tmp_path / "1")
    assert len(steps) == 2 * info.steps_per_epoch
    assert info.data["num_train"] % TINY["batch__global_size"]  # the last step of an epoch is smaller


def test_dropout_is_not_compiled():
    """Its masks hang on numbers that are new in every micro-batch; a layer that drops nothing is no obstacle."""
    strategy = Single(config(train__compile=True), World())
    network = dropping(num_classes=10, in_channels=1)
    replace_random_layers(network, SamplePosition())
    sentence = r"does not support 2, whose dropout .0.5. mask changes with every micro-batch: choose a network without"
    with pytest.raises(UsageError, match=sentence):
        strategy.setup(network, descent)
    network.get_submodule("2").p = 0.0
    strategy.setup(network, descent)


def dropping(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32 * in_channels, 8), nn.Dropout(0.5), nn.Linear(8, num_classes))


@HAS_COMPILER
def test_probes_and_evaluation_see_the_plain_network_of_a_compiled_run(tmp_path):
    """All lines of the record but those of clocks, to rounding; also where a run begun plain is resumed compiled."""
    settings = TINY | {"train__steps": 4, "probe__num_samples": 32, "checkpoint__every_steps": 2}
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for out in (plain, compiled):
        train(out, **settings, train__compile=out is compiled)
    shutil.copytree(plain, resumed := tmp_path / "resumed")
    cut_after(resumed, 2)
    train(resumed, resume=True, **settings, train__compile=True)
    for out in (compiled, resumed):
        for here, there in zip(read_metrics(out), read_metrics(plain), strict=True):
            assert here.keys() == there.keys()
            for key in (key for key in there if "seconds" not in key and "time" not in key and "memory" not in key):
                assert here[key] == pytest.approx(there[key], rel=1e-6, abs=1e-9), key


# -- resuming with other switches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["activation_checkpointing", "channels_last"])
@pytest.mark.parametrize("first", [False, True])
def test_switches_may_change_at_a_resume(switch, first):
    """Momentum is taken over in the order that the weights have then: fused SGD would mix up pixels otherwise."""
    settings = EXACT | NETWORKS["resnet20"] | {"batch__global_size": 12}
    whole = jobs.Trainer("single", World(), settings)
    whole.train(4)
    begun = jobs.Trainer("single", World(), settings | {f"train__{switch}": first})
    begun.train(2)
    ended = jobs.Trainer("single", World(), settings | {f"train__{switch}": not first}, begun.save())
    ended.train(2)
    for (name, want), got in zip(
        whole.strategy.model.named_parameters(), ended.strategy.model.parameters(), strict=True
    ):
        assert torch.allclose(got, want, rtol=0, atol=1e-9), name


# -- deterministic ----------------------------------------------------------------------------------------------------


def state() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_deterministic_debug_mode(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get(WORKSPACE_VARIABLE),
    )


def test_determinism_is_put_back(monkeypatch):
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    with deterministic(False):
        assert state() == before
    with deterministic(True):
        assert state() == (2, True, False, ":4096:8")
    assert state() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert state() == before
    monkeypatch.setenv(WORKSPACE_VARIABLE, ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE_VARIABLE] == ":16:8"
    assert os.environ[WORKSPACE_VARIABLE] == ":16:8"


def test_what_cannot_be_deterministic_is_told():
    zeros = torch.zeros(2)
    sentence = (
        "train.deterministic .true. is not possible: put_ has no deterministic form on this device; choose another"
    )
    with pytest.raises(UsageError, match=sentence), deterministic(True):
        zeros.put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    with pytest.raises(RuntimeError, match="another"), deterministic(True):
        raise RuntimeError("another")


class Asked(nn.Linear):
    """A layer that tells whether its passes were deterministic."""

    said: list[bool] = []

    def forward(self, input: Tensor) -> Tensor:
        Asked.said.append(torch.are_deterministic_algorithms_enabled())
        return super().forward(input)


def asked(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Asked(32 * 32 * in_channels, num_classes))


def test_a_run_is_deterministic_from_end_to_end(tmp_path):
    before = state()
    for on in (True, False):
        Asked.said.clear()
        settings = {"model__name": "tests.parallel.test_execution:asked", "probe__enabled": False, "train__steps": 2}
        train(tmp_path / str(on), train__deterministic=on, **settings)
        assert set(Asked.said) == {on}
        assert state() == before


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    (
        {"train__autocast": "float16"}, 1, "cpu",
        "train.autocast (float16) needs a GPU, and this run is on a CPU: choose bfloat16, or null",
    ),
    *(
        (
            {"train__autocast": "float16", "launch__strategy": name}, 2, "cuda",
            f"train.autocast (float16) is not supported by launch.strategy={name}: choose ddp, or "
            "train.autocast=bfloat16",
        )
        for name in ("fsdp", "zero0", "zero3")
    ),
    *(
        (
            {f"train__{switch}": True, "launch__strategy": name}, 2, None,
            f"train.{switch} (true) is not supported by launch.strategy={name}: choose ddp, or "
            f"train.{switch}=false",
        )
        for switch in ("channels_last", "compile")
        for name in ("fsdp", "zero1")
    ),
    (
        {"train__compile": True, "train__activation_checkpointing": True}, 1, None,
        "train.compile and train.activation_checkpointing cannot be used together: choose one, or neither",
    ),
    (
        {"train__compile": True, "model__norm": "sync"}, 1, None,
        "train.compile (true) does not support model.norm (sync), which communicates in every layer: choose "
        "model.norm=ghost, or train.compile=false",
    ),
    *(
        (
            {f"train__{switch}": True, "algorithm__rank_penalty": 0.1}, 1, None,
            "algorithm.rank_penalty (0.1) reads activations in forward hooks, which "
            f"train.{switch} (true) skips or repeats: choose train.{switch}=false",
        )
        for switch in ("compile", "activation_checkpointing")
    ),
    (
        {"train__autocast": "float16", "algorithm__rank_penalty": 0.1}, 1, "cuda",
        "algorithm.rank_penalty (0.1) computes values too small for train.autocast (float16): choose bfloat16, or "
        "null",
    ),
    *(
        (
            {"train__autocast": kind, "algorithm__gradient_penalty": 0.1, "algorithm__penalty_size": 32}, 1, "cuda",
            "algorithm.gradient_penalty (0.1) computes small differences of gradients, which "
            f"train.autocast ({kind}) loses in rounding: choose train.autocast=null",
        )
        for kind in ("float16", "bfloat16")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "num_ranks", "device", "sentence"), REFUSED)
def test_refusals(settings, num_ranks, device, sentence):
    with pytest.raises(UsageError) as caught:
        check_switches(config(**settings), num_ranks, device)
    assert str(caught.value) == sentence


def test_what_is_not_refused():
    check_switches(config(train__autocast="float16"), 1, None)
    check_switches(config(train__autocast="float16", algorithm__sam_rho=0.1), 2, "cuda")
    check_switches(config(train__activation_checkpointing=True, model__norm="sync", launch__strategy="zero3"), 2, "cpu")


def test_a_float16_run_on_a_cpu_ends_before_it_begins(tmp_path):
    with pytest.raises(UsageError, match=r"train.autocast .float16. needs a GPU"):
        train(tmp_path, train__autocast="float16", launch__device="cpu")


@pytest.mark.processes
def test_a_cpu_without_a_compiler(tmp_path):
    """One sentence, before anything is trained."""
    words = [sys.executable, "-m", "gengap_dist.train", "--out", "run", "--train.compile", "true"]
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [*words, "--launch.device", "cpu", "--mlflow.enabled", "false"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "train.compile (true) needs a C++ compiler, and there is no no-such-compiler on the PATH: install one, name it "
        "in CXX, or choose train.compile=false"
    )


def test_a_gpu_needs_a_c_compiler(monkeypatch):
    monkeypatch.setenv("CC", "nowhere")
    with pytest.raises(UsageError, match="needs a C compiler, and there is no nowhere on the PATH"):
        check_compiler("cuda")
