"""Near-rank loss does not see what a network is wrapped in; what only holds a part of the weights is refused."""

import copy
import importlib.util
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import measure
from gengap_dist.probes.activations import unwrapped
from gengap_dist.probes.layers import Pattern
from gengap_dist.probes.weights import weight_spectra
from tests.ranks import forked_ranks, on_ranks

SIZES = (7, 16, 1, 9, 4)
KEYS = [f"{layer}/{view}" for layer in ("conv.2", "act") for view in ("channel", "pool", "flatten")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
NO_DEEPSPEED = "deepspeed is not installed" if importlib.util.find_spec("deepspeed") is None else ""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3))
        self.act, self.drop, self.head = nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.act(self.conv(x))).mean((2, 3)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def images(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list(torch.randn(sum(SIZES), 1, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype).split(SIZES))


def spectra(
    model: nn.Module, batches: list[torch.Tensor], world: World | None = None, layers: Pattern = "auto"
) -> dict[str, np.ndarray]:
    """By both methods; the second in one view."""
    found = measure(model, batches, layers=layers, views=("channel", "pool", "flatten"), world=world)
    out = {f"gram/{s.key}": s.singular_values.numpy() for s in found}
    found = measure(model, batches, layers=layers, views=("flatten",), world=world, method="tsqr")
    return out | {f"tsqr/{s.key}": s.singular_values.numpy() for s in found}


def error(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> float:
    """The largest, of what it is relative to the largest singular value."""
    assert [*found] == [*true], [*found]
    return max(float(np.abs(found[key] - s).max() / s.max()) for key, s in true.items())


GRAPHS: list[object] = []


def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
    """Of torch.compile: keeps a list of what was compiled, and runs it as it is."""
    GRAPHS.append(graph)
    return graph.forward


def compiled_inside(name: str) -> Callable[[Net], nn.Module]:
    def wrap(model: Net) -> nn.Module:
        parent, _, last = name.rpartition(".")
        inner = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, torch.compile(inner, backend=backend))
        return model

    return wrap


def compiled_in_place(model: Net) -> nn.Module:
    model.compile(backend=backend)
    return model


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend=backend),
    "compiled in place": compiled_in_place,
    "compiled conv": compiled_inside("conv"),
    "compiled conv.0": compiled_inside("conv.0"),
    "compiled act": compiled_inside("act"),
    "compiled twice": lambda model: torch.compile(compiled_inside("conv")(model), backend=backend),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("layers", ["auto", "conv*", "act", nn.Conv2d, nn.ReLU], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_in_one_process(wrapper, layers):
    torch.compiler.reset()
    GRAPHS.clear()
    true = spectra(net(), images(), layers=layers)
    model = WRAPPERS[wrapper](net())
    assert error(spectra(model, images(), layers=layers), true) == 0.0
    assert not GRAPHS
    with torch.no_grad():
        model.eval()(images()[0])
    graphs = len(GRAPHS)
    assert graphs or wrapper == "DataParallel"  # it has run, compiled
    assert error(spectra(model, images(), layers=layers), true) == 0.0
    assert len(GRAPHS) == graphs
    assert all("_orig_mod" not in s.key for s in weight_spectra(model))


def test_a_compiled_unit_is_named_like_any_other():
    from gengap_dist import models

    plain, model = (models.build("lenet5", DataSpec.images(3, 1, 16)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    model.conv1, model.fc1.act = torch.compile(model.conv1, backend="eager"), torch.compile(nn.ReLU(), backend="eager")
    x = [torch.randn(9, 1, 16, 16)]
    for layers in ("auto", "conv1", ["conv1", "conv1.*"], ["fc1", "fc1.act"], ["conv1", nn.Sequential]):
        true = {s.key: s.singular_values for s in measure(plain, x, layers=layers)}
        found = {s.key: s.singular_values for s in measure(model, x, layers=layers)}
        assert [*found] == [*true]
        assert all(torch.equal(found[key], s) for key, s in true.items())


def train(model: nn.Module, world: World, dtype: torch.dtype, backward: Callable, step: Callable) -> None:
    """Two steps on random images of this rank's own."""
    generator = torch.Generator().manual_seed(10 + world.rank)
    for _ in range(2):
        x, y = torch.randn(8, 1, 9, 9, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)
        backward(cross_entropy(model(x), y))
        step()


def report(model: nn.Module, world: World, dtype: torch.dtype) -> dict:
    """Spectra of a wrapped network on all ranks, and of a plain twin with its weights on this rank alone."""
    batches, twin = images(dtype), net(dtype)
    start = copy.deepcopy(twin.state_dict())
    twin.load_state_dict(unwrapped(model).state_dict())
    return {
        "wrapped": spectra(model, batches[world.rank :: world.size]),  # of all ranks of the process group
        "alone": spectra(twin, batches, World()),
        "sharded": spectra(twin, batches[world.rank :: world.size], world),
        "moved": max(float((twin.state_dict()[key] - value).abs().max()) for key, value in start.items()),
        "dtypes": {value.dtype for value in unwrapped(model).parameters()},
    }


def under_ddp(world: World) -> dict:
    out = {}
    for dtype in (torch.float64, torch.float32):
        for name in ("DDP", "DDP of compiled", "compiled DDP"):
            model = net(dtype)
            wrapped = DistributedDataParallel(
                torch.compile(model, backend="eager") if name == "DDP of compiled" else model
            )
            wrapped = torch.compile(wrapped, backend="eager") if name == "compiled DDP" else wrapped
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(wrapped, world, dtype, torch.Tensor.backward, optimizer.step)
            for buffer in model.buffers():  # the ranks' running statistics differ: take rank 0's
                torch.distributed.broadcast(buffer, 0)
            out[name, dtype] = report(wrapped, world, dtype)
    return out


def agrees(answers: list[dict], dtype: torch.dtype, case: object) -> None:
    for answer in answers:
        found = answer[case]
        assert found["moved"] > 1e-3  # it has been trained
        assert found["dtypes"] == {dtype}
        assert [*found["wrapped"]] == [*found["alone"]]
        assert len(found["wrapped"]) == 2 * 2 * 4
        assert error(found["wrapped"], found["sharded"]) == 0.0
        assert error(found["wrapped"], found["alone"]) <= TOLERANCE[dtype]
        assert error(found["wrapped"], answers[0][case]["wrapped"]) == 0.0


def test_ddp(crews):
    answers = crews[2](under_ddp)
    assert len(answers[0]) == 6
    for case in answers[0]:
        agrees(answers, case[1], case)


def refusal(model: nn.Module, world: World) -> str:
    try:
        measure(model, images(torch.float32)[world.rank :: world.size], world=world)
    except UsageError as error:
        return str(error)
    return "nothing was raised"


def under_deepspeed(world: World) -> dict:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # otherwise it compiles an op that only inference uses, for a minute
    out = {}
    for stage in (0, 1, 2, 3):
        model = net(torch.float32)
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        train(engine, world, torch.float32, engine.backward, engine.step)
        if stage == 3:
            out[stage] = refusal(engine, world)
            continue
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
        out[stage] = report(engine, world, torch.float32)
    return out


@pytest.fixture(scope="module")
def with_deepspeed() -> list[dict]:
    if NO_DEEPSPEED:
        pytest.skip(NO_DEEPSPEED)
    with forked_ranks():
        return on_ranks(2, under_deepspeed)


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed(with_deepspeed, stage):
    agrees(with_deepspeed, torch.float32, stage)


@pytest.mark.processes
def test_zero_stage_3_is_refused(with_deepspeed):
    for answer in with_deepspeed:
        assert "is sharded over ranks (ZeRO stage 3 or FSDP)" in answer[3]
        assert "measure under ZeRO stage 0 to 2 or DDP" in answer[3]


def under_fsdp(world: World) -> str:
    model = fully_shard(net(torch.float32), mesh=init_device_mesh("cpu", (world.size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, world, torch.float32, torch.Tensor.backward, optimizer.step)
    return refusal(model, world)


def test_fsdp_is_refused(crews):
    for answer in crews[2](under_fsdp):
        assert "is sharded over ranks (ZeRO stage 3 or FSDP)" in answer


def words_of_each(world: World) -> dict[str, str]:
    """What each kind of disagreement says on this rank."""
    other = world.rank == 1
    narrow, wide = (nn.Sequential(nn.Linear(4, width), nn.ReLU()).double() for width in (3, 5))
    inputs = torch.randn(6, 4, dtype=torch.float64)
    cases = {
        "shape": lambda: measure(narrow, [inputs[:, :3] if other else inputs]),
        "dtype": lambda: measure(narrow, [inputs.float() if other else inputs]),
        "layers": lambda: measure(wide if other else narrow, [inputs]),
        "names": lambda: measure(narrow, [inputs], layers="2" if other else "1"),
        "failure": lambda: measure(Failing(fails=other), [inputs]),
        "samples": lambda: len(measure(narrow, [] if other else [inputs])),
    }
    out = {}
    for name, call in cases.items():
        try:
            out[name] = str(call())
        except UsageError as error:
            out[name] = str(error)
    return out


class Failing(nn.Module):
    """Fails in the pass after the traced one."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.net, self.fails = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(), fails

    def forward(self, x):
        if self.fails and len(x) > 2:
            raise ValueError("not today")
        return self.net(x)


def test_ranks_that_disagree_are_told_in_one_sentence(crews):
    """Nobody waits for ever; a rank without samples is no disagreement."""
    first, second = crews[2](words_of_each)
    for name in ("shape", "dtype"):
        assert first[name] == "the network cannot be traced on another rank, which reports why"
        assert second[name] == "rank 1 has inputs of another shape or dtype than rank 0: give all ranks one kind"
    assert first["layers"] == second["layers"]
    assert first["layers"].startswith("ranks find different layers, or layers of different shapes")
    assert first["names"] == "the network cannot be traced on another rank, which reports why"
    assert second["names"].startswith("probe.layers (2) matches no layer")
    assert first["failure"] == "the network failed in a forward pass on another rank, which reports why"
    assert "(ValueError: not today)" in second["failure"]
    assert first["samples"] == second["samples"] == "2"


def mixture_of(world: World) -> tuple[list[str], list[str]]:
    """Experts that run for the samples of rank 1 only, and those whose traced call is missing there."""
    import warnings

    from tests.probes.test_functions import Halves, halves

    found = []
    for first in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spectra = measure(Halves(4), [halves(first=first)[world.rank]])
        found.append((sorted({s.layer for s in spectra}), [str(w.message) for w in caught]))
    return found


def test_a_layer_that_runs_on_one_rank_only_is_left_out_on_all(crews):
    for (traced, says_traced), (untraced, says_untraced) in crews[2](mixture_of):
        assert traced == untraced == ["a.1"]
        assert any("layer b.1" in words and "left out" in words for words in says_traced)
        assert any("b.0, b.1 did not run for the two traced samples" in words for words in says_untraced)
