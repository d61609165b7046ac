"""The plan against what really happens: on 4,096 simulated ranks, on real ones, and against real optimizers."""

import json
import math
import time
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.cli.plan import command as plan_command
from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import BatchPlan, blocks, split
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.parallel import memory_model
from gengap_dist.parallel.strategies import DDP
from gengap_dist.preflight import calibrate, communication_model
from gengap_dist.preflight.batch_layout import Cluster, layout
from gengap_dist.preflight.communication_model import Link, Message, collective_seconds
from gengap_dist.preflight.machine_constants import (
    ComputeConstants,
    Constants,
    LinkConstants,
    load,
    save,
    workload_name,
)
from gengap_dist.preflight.plan import Plan, make_plan
from gengap_dist.probes import layer_view, measure
from gengap_dist.probes.activations import eval_context, leaf_names
from gengap_dist.probes.layers import select_layers
from gengap_dist.probes.spectra.accumulate import METHODS, DualAccumulator, PrimalAccumulator, merge_ranks
from gengap_dist.probes.spectra.measure import plan_passes, stream_bytes
from gengap_dist.runs.run_folder import read_info
from gengap_dist.training.observer import PROBE_BLOCK
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import Objective, StepBatch, train_step
from gengap_dist.training.tasks import Classification
from tests.conftest import FULL, ROOT, config, thinned, train

MANY = 4096


# -- batches and the order of data on 4,096 ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "global_size", "micro_size", "ghost_size"),
    [
        (32_768, 8_192, 128, None),
        (45_001, 12_345, 2, None),  # ragged twice: shares differ, and so does the last step
        (20_000, 10_000, 3, None),
        (40_003, 16_384, 64, 8),  # ghost groups, fewer of them than ranks in the last step, whose last one is short
        (6_000, 1_000, 16, None),  # most ranks idle
    ],
)
def test_an_epoch_on_4096_ranks_visits_every_image_once(num_samples, global_size, micro_size, ghost_size):
    order = EpochSampler(num_samples, global_size, seed=3)
    seen = torch.zeros(num_samples, dtype=torch.int64)
    for step in range(order.steps_per_epoch, 2 * order.steps_per_epoch):  # the second epoch
        indices = order.indices(step)
        plan = BatchPlan(len(indices), MANY, micro_size, ghost_size)
        samples, counts, sizes, groups = [], [], Counter(), Counter()
        for rank in range(MANY):
            mine = plan.micro_batches(rank)
            images = [indices[span.start : span.stop] for span in mine]
            for part in images:
                seen[part] += 1
                sizes[len(part)] += 1
                groups.update(map(len, part.split(ghost_size or micro_size)) if len(part) else ())
            samples.append(sum(map(len, images)))
            counts.append(len(mine))
        found = layout(plan)
        assert found.samples_per_rank == (min(samples), max(samples))
        assert found.micro_batches_per_rank == (min(counts), max(counts))
        assert found.micro_sizes == (min(size for size in sizes if size), max(sizes))
        assert found.num_idle == samples.count(0)
        assert found.norm_sizes == sorted(groups)
    assert (seen == 1).all()


# -- the probe's reduction on 4,096 ranks -----------------------------------------------------------------------------


class Unheard(Exception):
    """A rank has spoken, and waits."""


class Chorus:
    """Simulated ranks: `run(job)` gives what `job(rank, world)` returns on each, with sums over all of them.

    Every rank is run up to its first sum, then all are run anew up to their second, and so on: a job must do the same
    every time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: list[Tensor] = []

    def run(self, job: Any) -> list[Any]:
        while True:
            total: Tensor | None = None
            answers = []
            for rank in range(self.size):
                voice = Voice(rank, self.size)
                object.__setattr__(voice, "heard", iter(self.sums))
                try:
                    answers.append(job(rank, voice))
                except Unheard as spoken:
                    (tensor,) = spoken.args
                    total = tensor.clone() if total is None else total.add_(tensor)
            if total is None:
                return answers
            self.sums.append(total)


class Voice(World):
    """One of them."""

    def all_reduce(self, tensor: Tensor, *what: str) -> Tensor:
        for total in self.heard:  # pyright: ignore[reportAttributeAccessIssue]
            return tensor.copy_(total)
        raise Unheard(tensor)


def same_spectrum(found: Tensor, matrix: Tensor) -> None:
    true = torch.linalg.svdvals(matrix)
    alive = true > METHODS["gram"].relative_floor * true[0]  # a centred square matrix has one that is 0
    assert float((found[: len(true)] - true)[alive].abs().max()) < 1e-9 * float(true[0])
    assert (found[: len(true)][~alive] <= METHODS["gram"].relative_floor * true[0]).all()


@pytest.mark.parametrize(
    ("num_rows", "centred"),
    thinned(
        [(num_rows, centred) for num_rows in (300, 9_000) for centred in (False, True)],
        lambda num_rows, centred: centred == (num_rows == 300),
    ),
)
def test_shards_of_4096_ranks_give_the_spectrum_of_the_gathered_matrix(num_rows, centred):
    """Rows dealt as the observer deals them would give most ranks none; here also ranks with one row or two."""
    torch.manual_seed(0)
    whole_ND = torch.randn(num_rows, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3.0
    shares = split(num_rows, MANY)
    assert sum(share.size == 0 for share in shares) == max(0, MANY - num_rows)

    def job(rank: int, world: World) -> Any:
        tall = PrimalAccumulator(METHODS["gram"](12, torch.device("cpu")))
        if shares[rank].size:
            tall.add(whole_ND[shares[rank].start : shares[rank].stop].T)
        merge_ranks([tall], world)
        return tall if rank in (0, MANY // 2, MANY - 1) else None

    for tall in filter(None, Chorus(MANY).run(job)):
        assert tall.count == num_rows
        mean = whole_ND.mean(0) if centred else 0.0
        same_spectrum(tall.finalized(centred).singular_values(), whole_ND - mean)


@pytest.mark.parametrize("centred", [False, True])
def test_columns_of_4096_ranks_give_the_spectrum_of_the_gathered_matrix(centred):
    """The dual form, after the turn: each rank has all rows of its share of the columns, most ranks none at all."""
    torch.manual_seed(0)
    whole_ND = torch.randn(10, 3_000, dtype=torch.float64)
    shares = split(3_000, MANY)

    def job(rank: int, world: World) -> Any:
        wide = DualAccumulator(METHODS["gram"](11, torch.device("cpu")))
        if shares[rank].size:
            wide.add(whole_ND[:, shares[rank].start : shares[rank].stop])
        merge_ranks([wide], world)
        return wide if rank in (0, MANY - 1) else None

    for wide in filter(None, Chorus(MANY).run(job)):
        mean = whole_ND.mean(0) if centred else 0.0
        same_spectrum(wide.finalized(centred).singular_values(), whole_ND - mean)


class Tapped(World):
    """A rank that counts what it sends and receives; of simulated others it hears nothing but what was agreed."""

    def begin(self, counts: list[int] | None = None) -> None:
        object.__setattr__(self, "sent", Counter())
        object.__setattr__(self, "counts", counts)

    def all_reduce(self, tensor: Tensor, *what: str) -> Tensor:
        self.sent["summed"] += tensor.nbytes
        if self.counts is None:
            return super().all_reduce(tensor, *what)
        if tensor.shape == (self.size,) and self.sent["summed"] == tensor.nbytes:  # how many images ranks have
            tensor.copy_(tensor.new_tensor(self.counts))
        return tensor

    def all_to_all(self, chunks, heights, width=None):
        columns = chunks[0].shape[1] if width is None else width
        itemsize = chunks[0].itemsize
        self.sent["to others"] += sum(chunk.nbytes for to, chunk in enumerate(chunks) if to != self.rank)
        self.sent["from others"] += (sum(heights) - heights[self.rank]) * columns * itemsize
        if self.counts is None:
            return super().all_to_all(chunks, heights, width)
        return [chunks[0].new_zeros(height, columns) for height in heights]


PROBED = {
    "tall": {"views": ["channel", "pool"], "memory_mib": 64},
    "flatten": {"views": ["flatten"], "memory_mib": 4},  # wide ones, in several passes
    "tsqr": {"views": ["pool"], "memory_mib": 64, "method": "tsqr"},
}


def probed_model() -> nn.Module:
    torch.manual_seed(0)
    return models.build("lenet5", DataSpec.images(10, 1))


def planned(options: dict[str, Any], counts: list[int]) -> list[Message]:
    options = {"method": "gram"} | options
    model = probed_model()
    with eval_context(model):
        layers = select_layers(model, torch.zeros(1, 1, 32, 32), ["auto"])
        sites = layer_view.build_layer_views(layers, options.pop("views"), sum(counts))
    passes = plan_passes(sites, max(counts), options["memory_mib"])
    sizes = {"input_size": 32 * 32, "num_leaves": len(leaf_names(model))}
    return communication_model.probe_messages(
        sites, passes, counts, num_ranks=len(counts), device_type="cpu", **sizes, **options
    )


def shares_of_probe(num_samples: int, size: int) -> list[int]:
    return [sum(s.size for s in blocks(num_samples, PROBE_BLOCK, World(rank, size))) for rank in range(size)]


def count_probe(world: World, options: dict[str, Any], counts: list[int], simulated: bool) -> dict[str, int]:
    tapped = Tapped(world.rank, world.size)
    tapped.begin(counts if simulated else None)
    images = [torch.rand(counts[world.rank], 1, 32, 32)] if counts[world.rank] else []
    measure(probed_model(), images, layers="auto", world=tapped, **options)
    return dict(tapped.sent)


def agree(messages: list[Message], by_rank: list[dict[str, int]], everyone: bool) -> None:
    summed = sum(m.num_bytes for m in messages if m.operation == "all-reduce")
    turned = sum(m.num_bytes for m in messages if m.operation == "all-to-all")
    assert {sent["summed"] for sent in by_rank} == {summed}
    busiest = max(max(sent.get("to others", 0), sent.get("from others", 0)) for sent in by_rank)
    assert busiest == turned if everyone else busiest <= turned


def what_is_sent(world: World, counts: list[int]) -> dict[str, Any]:
    found = {name: count_probe(world, options, counts, simulated=False) for name, options in PROBED.items()}
    return found | {"ddp": ddp_bytes(world)}


@pytest.fixture(scope="module")
def really_sent(crews) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each of them sent."""
    return {size: crews[size](what_is_sent, shares_of_probe(300, size)) for size in (2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", PROBED)
def test_bytes_of_a_probe_are_those_really_sent(really_sent, size, name):
    messages = planned(PROBED[name], shares_of_probe(300, size))
    agree(messages, [answer[name] for answer in really_sent[size]], everyone=True)
    turned = [m for m in messages if m.what == "columns of wide layers"]
    assert [m.num_bytes > 0 for m in turned] == [True] * (name == "flatten")


@pytest.mark.filterwarnings("ignore:layer .* has non-finite activations")  # of ranks that are not there
@pytest.mark.parametrize("name", ["tall", "flatten"])
def test_bytes_of_a_probe_on_4096_ranks_are_those_a_rank_sends(name):
    counts = shares_of_probe(1024, MANY)
    assert sum(map(bool, counts)) == 8
    options = PROBED[name] | {"memory_mib": 24}
    found = [count_probe(World(0, MANY), options, counts, simulated=True)]
    messages = planned(options, counts)
    agree(messages, found, everyone=False)
    if name == "flatten":  # the busiest of all: rank by rank, block by block
        brute = brute_turns(options, counts)
        assert sum(m.num_bytes for m in messages if m.operation == "all-to-all") == brute


def brute_turns(options: dict[str, Any], counts: list[int]) -> int:
    """What the busiest rank sends or receives when lenet5's wide layers are turned."""
    model = probed_model()
    with eval_context(model):
        sites = layer_view.build_layer_views(
            select_layers(model, torch.zeros(1, 1, 32, 32), ["auto"]), ["flatten"], sum(counts)
        )
    sent, received = Counter(), Counter()
    for pieces in plan_passes(sites, max(counts), options["memory_mib"]):
        for piece in (piece for piece in pieces if sites[piece.view_index].is_wide):
            block = stream_bytes("cpu", options["memory_mib"]) // (8 * (sites[piece.view_index].num_rows + 1))
            left = piece.stop - piece.start
            while left > 0:
                width = min(left, max(1, block) * MANY)
                left -= width
                for rank, share in enumerate(split(width, MANY)):
                    sent[rank] += 4 * counts[rank] * (width - share.size)
                    received[rank] += 4 * (sum(counts) - counts[rank]) * share.size
    return max([*sent.values(), *received.values()])


# -- a step's bytes, memory, time -------------------------------------------------------------------------------------


def ddp_bytes(world: World) -> tuple[int, int]:
    """Bytes and number of all-reduces in one step, as torch.distributed is given them."""
    splits = datasets.load(DataConfig())
    given: list[int] = []
    real = dist.all_reduce
    settings = config(batch__micro_size=8, launch__strategy="ddp")
    strategy = DDP(settings, world)
    strategy.setup(probed_model().train(), partial(build_optimizer, settings.optim))
    batches = BatchLoader(splits.train, Preprocess(splits.pixels, world.device, torch.float32), DataConfig(), 0)
    spans = BatchPlan(50, world.size, 8).micro_batches(world.rank)

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(tensor.nbytes)
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        train_step(strategy, batches, StepBatch(torch.arange(50), 0, spans), Objective(Classification(splits.spec)))
    finally:
        dist.all_reduce = real
    return sum(given), len(given)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_a_ddp_step_are_those_really_sent(really_sent, size):
    plan = make_plan(config(batch__global_size=50, batch__micro_size=8), Cluster(1, size), Constants())
    (message,) = plan.messages
    assert [answer["ddp"] for answer in really_sent[size]] == [(message.num_bytes, message.times)] * size
    assert plan.bytes_on_wire == 2 * (size - 1) * message.num_bytes // size


def test_saved_activations_of_lenet5_are_known():
    """By hand, in float32: images, what the non-linearities put out, what pools remember, logits' softmax, labels."""
    n, settings = 12, config()
    per_image = 4 * (32 * 32 + 6 * 28 * 28 + 16 * 10 * 10 + 6 * 14 * 14 + 16 * 5 * 5 + 120 + 84 + 10)
    per_image += 8 * (6 * 14 * 14 + 16 * 5 * 5 + 1)  # int64: where the maxima were; labels
    spec = DataSpec.images(10, 1)
    found, how = memory_model.saved_for_backward(settings, probed_model(), spec, Classification(spec).loss_sum, n)
    assert how == "one pass of 12 fake samples"
    assert found - n * per_image in range(0, 9)  # the loss's own weight, a scalar


class NeedsValues(nn.Sequential):
    def forward(self, x):
        return super().forward(x * float(x.sum() >= 0))


def test_a_network_that_needs_values_is_run_with_real_images():
    model = NeedsValues(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3))
    spec = DataSpec.images(3, 1, 4)
    what = spec, Classification(spec).loss_sum
    with pytest.warns(UserWarning, match="needs values"):
        found, how = memory_model.saved_for_backward(config(), model, *what, 100)
    assert how == "passes of 2 and 4 samples, extrapolated"
    real = memory_model._saved_bytes(config(), model, dict(model.named_parameters()), *what, 100)
    assert found == real


@pytest.mark.parametrize(
    "settings",
    [{"name": "sgd"}, {"name": "sgd", "momentum": 0.0}, {"name": "adamw"}, {"name": "lars"}, {"name": "lamb"}],
    ids=str,
)
def test_optimizer_state_is_what_an_optimizer_holds(settings):
    given = config(**{f"optim__{key}": value for key, value in settings.items()})
    model = probed_model()
    optimizer = build_optimizer(given.optim, model)
    model(torch.rand(2, 1, 32, 32)).sum().backward()
    optimizer.step()
    held = sum(v.nbytes for kept in optimizer.state.values() for v in kept.values() if v is not None and v.ndim)
    assert memory_model.weight_bytes(given, model, "ddp", 8)["optimizer_state"] == held


def test_sharded_memory_adds_up_to_the_whole():
    model, ranks = probed_model(), 7
    whole = 4 * sum(p.numel() for p in model.parameters())
    for strategy, (parameters, gradients, state) in {
        "zero0": (1, 1, 1),
        "zero1": (1, 1, 2 / ranks),  # momentum, and float32 masters
        "zero2": (1, 1 / ranks, 2 / ranks),
        "zero3": (1 / ranks, 1 / ranks, 2 / ranks),
        "fsdp": (1 / ranks, 1 / ranks, 1 / ranks),
    }.items():
        found = memory_model.weight_bytes(config(), model, strategy, ranks)
        assert found["parameters"] == math.ceil(parameters * whole)
        assert found["gradients"] == math.ceil(gradients * whole)
        assert found["optimizer_state"] == pytest.approx(state * whole, abs=1)


def test_hybrid_sharding_keeps_more_and_sends_less_between_nodes():
    """Two nodes of two: a rank keeps a half, not a quarter, and only sums of its half are sent between nodes."""
    settings = {"launch__strategy": "fsdp", "batch__global_size": 128, "batch__micro_size": 16}
    flat, hybrid = (
        make_plan(config(**settings, launch__shard_size=size), Cluster(2, 2), Constants()) for size in (None, 2)
    )
    assert flat.memory
    assert hybrid.memory
    whole = 4 * (flat.num_parameters or 0)
    assert (flat.memory.gradients, hybrid.memory.gradients) == (whole / 4, whole / 2)
    assert [(message.operation, message.num_bytes, message.ranks) for message in hybrid.messages] == [
        ("all-gather", 4 * whole, Cluster(1, 2)),
        ("reduce-scatter", 2 * whole, Cluster(1, 2)),
        ("all-reduce", whole, Cluster(2, 1)),
    ]
    assert hybrid.bytes_on_wire == 2 * whole + whole + whole


def test_the_probe_keeps_to_its_limit():
    for mib in (3, 8, 64):
        found = make_plan(
            config(probe__memory_mib=mib, probe__views=["flatten"], probe__num_samples=256), Cluster(1, 2), Constants()
        )
        assert found.memory is not None
        images = 128 * 32 * 32 * 4  # of the rank with the most, which the limit leaves out
        assert 0 < found.memory.probe - images <= found.memory.probe_limit == mib * 2**20


def test_a_plan_knows_the_probe_set_that_a_run_chooses(tmp_path):
    settings = {"model__name": "mlp", "model__widths": (150,), "model__norm": "none", "train__steps": 1}
    train(tmp_path / "run", **settings)
    plan = make_plan(config(**settings), Cluster(1, 2), Constants())
    assert plan.probe
    assert plan.probe.num_samples == read_info(tmp_path / "run").num_probe_samples == 1280  # 8 x 150, in blocks of 128
    small = make_plan(config(**settings, data__num_train=500), Cluster(1, 1), Constants())
    assert small.probe
    assert (small.probe.num_samples, small.data and small.data.num_train) == (500, 500)


def test_sizes_are_those_of_the_data_loaded(pictures):
    for settings in [DataConfig(), DataConfig(val_fraction=0.0, image_size=40), pictures]:
        splits, sizes = datasets.load(settings), datasets.sizes(settings)
        parts = (splits.train, splits.val, splits.test)
        assert sizes[:3] == tuple(map(len, parts))
        assert sizes.spec == splits.spec
        assert sizes.num_bytes == sum(tensor.nbytes for images in parts for tensor in images)


@pytest.fixture
def pictures(tmp_path) -> DataConfig:
    from PIL import Image

    for part, num in (("train", 4), ("test", 3)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / kind
            folder.mkdir(parents=True)
            for number in range(num):
                Image.new("RGB", (9, 7)).save(folder / f"{number}.png")
    return DataConfig(name="imagefolder", root=tmp_path / "pictures", image_size=8)


def test_sizes_of_real_fashion_mnist(real_data):
    settings = DataConfig(name="fashion_mnist", root=real_data)
    splits, sizes = datasets.load(settings), datasets.sizes(settings)
    assert sizes[:3] == (len(splits.train), len(splits.val), len(splits.test))
    assert sizes.spec == splits.spec


def test_levels_send_what_a_flat_ring_sends():
    """With bandwidth alone, and links alike: (R-1)/R M, twice for an all-reduce, however ranks stand on nodes."""
    link = Link(alpha=0.0, beta=1.0)
    for nodes, each in ((1, 8), (8, 1), (2, 4), (64, 8)):
        ranks = nodes * each
        for operation, rounds in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)):
            took = collective_seconds(Message("", operation, 1000), Cluster(nodes, each), link, link)
            assert took == pytest.approx(rounds * 1000 * (ranks - 1) / ranks)
        turned = collective_seconds(Message("", "all-to-all", 1000, times=2), Cluster(nodes, each), link, link)
        assert turned == pytest.approx(1000)


def test_many_nodes_are_joined_by_trees():
    link = Link(alpha=1.0, beta=0.0)
    assert collective_seconds(Message("", "all-reduce", 8), Cluster(1024, 1), link, link) == 2 * 10
    assert collective_seconds(Message("", "all-reduce", 8, times=3), Cluster(2, 4), link, link) == 3 * 2 * (3 + 1)


# -- refusals, constants, the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "settings", "says"),
    [
        ((8, 16), {}, "64) leaves 64 of 128 ranks without a sample"),
        ((2, 1), {"launch__strategy": "single"}, "does not support 2 ranks"),
        (
            (2, 1),
            {"launch__strategy": "zero2", "train__dtype": "float64"},
            "train.dtype (float64) is not supported by",
        ),
        (
            (2, 1),
            {"launch__strategy": "zero1", "optim__name": "lars"},
            "optim.name (lars) is not supported by",
        ),
        ((16, 4), {"model__name": "mlp"}, "leaves batch norm a group of one sample in a step of 64"),
        ((1, 2), {"batch__ghost_size": 8}, "model.norm (ghost) has no effect"),
        ((1, 2), {"batch__global_size": 2000}, "larger than the training set of 1294"),
        ((1, 2), {"data__memory_gib": 1e-4}, "data.memory_gib (0.0001) is less"),
        ((1, 2), {"data__name": "imagefolder", "data__root": "nowhere"}, "is not an image folder"),
        ((1, 2), {"model__name": "lenet6"}, "did you mean lenet5"),
        ((1, 2), {"probe__views": ["flatten"], "probe__memory_mib": 1}, "exceed the 1 MiB"),
        ((1, 2), {"probe__layers": ["fc9"]}, "matches no layer"),
        ((1, 2), {"model__name": "mlp", "model__widths": [10**6, 10**6]}, "mlp) has 3,729.2 GiB of weights"),
        ((1, 2), {"model__name": "mlp", "model__widths": [10**12] * 2}, "mlp) has more weights than 64 bits can count"),
        ((1, 2), {"data__image_size": 10**6}, "data.memory_gib (8.0) is less than"),
        ((1, 2), {"data__image_size": 10**6, "data__memory_gib": 1e9}, "lenet5) has 447,024.1 GiB of weights"),
        (
            (1, 2),
            {"data__image_size": 10**6, "data__memory_gib": 1e9, "model__name": "torchvision:resnet18"},
            "needs more memory than this machine has: choose",
        ),
        (
            (1, 2),
            {"data__image_size": 10**6, "data__memory_gib": 1e9, "model__name": "tests.preflight.test_plan:huge"},
            "needs more memory than this machine has: choose",
        ),
    ],
)
def test_what_is_refused_and_why(cluster, settings, says):
    plan = make_plan(config(**settings), Cluster(*cluster), Constants())
    assert len(plan.refused) == 1
    assert says in plan.refused[0]
    assert plan.batch is not None
    json.dumps(plan.as_json())


def huge(num_classes: int) -> nn.Module:
    return nn.Linear(10**7, 10**7)


@pytest.mark.parametrize(("nodes", "ranks"), [(125_000, 10**6), (10**9, 8 * 10**9)])
def test_a_plan_of_a_million_ranks_takes_seconds(nodes, ranks):
    start = time.process_time()
    plan = make_plan(config(batch__global_size=1_000, probe__views=["flatten"]), Cluster(nodes, 8), Constants())
    assert time.process_time() - start < 5
    assert plan.batch is not None
    assert plan.batch.num_idle == ranks - 1_000
    assert plan.probe is not None
    assert plan.probe.num_ranks_with_samples == 8
    assert [said.partition(":")[0] for said in plan.refused] == [
        f"batch.global_size (1000) leaves {ranks - 1_000} of {ranks} ranks without a sample"
    ]


def test_a_cache_that_cannot_be_written_does_not_lose_the_plan(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    link = LinkConstants(alpha=1e-5, beta=1e-9)
    monkeypatch.setattr(calibrate, "calibrate", lambda *given: Constants(where="here", inside=link))
    assert plan_command(["--calibrate"]) == 0
    said = capsys.readouterr()
    assert "steps: 420 updates" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith(f"gengap plan: warning: {tmp_path}/file/gengap_dist/constants.json cannot be written (")


def test_a_plan_says_what_a_run_records(tmp_path):
    from tests.conftest import train

    settings = {"batch__global_size": 96, "batch__micro_size": 40, "model__name": "mlp", "train__steps": 2}
    settings |= {"probe__enabled": False, "train__num_evals": 1}
    train(tmp_path / "run", **settings)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    plan = make_plan(config(**settings), Cluster(1, 1), Constants())
    assert plan.strategy == facts["strategy"]
    assert (plan.num_parameters, plan.num_steps) == (facts["num_parameters"], facts["num_steps"])
    assert plan.steps_per_epoch == facts["steps_per_epoch"]
    assert plan.batch is not None
    assert plan.batch.norm_sizes == facts["norm_size"]
    assert plan.messages == []


def timed(constants: Constants, cluster: tuple[int, int]) -> Plan:
    return make_plan(config(), Cluster(*cluster), constants)


def test_no_time_is_invented():
    name = workload_name(config(), DataSpec.images(10, 1), 32)
    compute = {name: ComputeConstants(seconds_per_sample=0.5, seconds_per_update=3.0)}
    link = LinkConstants(alpha=1.0, beta=0.0)
    assert timed(Constants(), (1, 2)).missing == "this network is not calibrated: add --calibrate"
    assert timed(Constants(compute=compute), (1, 2)).missing.startswith("the link inside a node is not calibrated")
    near = timed(Constants(compute=compute, inside=link), (1, 2))
    assert near.time is not None
    assert (near.time.compute, near.time.communication, near.missing) == (32 * 0.5 + 3.0, 2.0, "")
    far = timed(Constants(compute=compute, inside=link), (2, 1))
    assert far.time is None
    assert far.time_at_best is not None
    assert "between" in far.missing
    known = timed(Constants(compute=compute, between=LinkConstants(alpha=5.0, beta=0.0)), (2, 1))
    assert known.time is not None
    assert known.time.communication == 10.0


def test_constants_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load(None) == Constants()
    constants = Constants(where="here", inside=LinkConstants(alpha=1e-5, beta=1e-9))
    assert save(constants, None) == ""
    assert (tmp_path / "cache" / "gengap_dist" / "constants.json").exists()
    assert load(None) == constants
    for text, says in (
        ("{", "does not contain constants"),
        ('{"alpha": 3}', "alpha is not a setting"),
        ("[]", "does not contain"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=says):
            load(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "nowhere.json")


def test_the_command(tmp_path, gengap, new_gengap):
    demo = ROOT / "configs" / "demo_train.yaml"
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    words = ["--config", demo, "--gpus-per-node", 2, "--constants", tmp_path / "here.json"]
    done = new_gengap("plan", *words, "--calibrate", **cache)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout
    assert len(done.stdout.splitlines()) <= 40
    again = gengap("plan", *words, "--json", **cache)
    plan = json.loads(again.stdout)
    assert plan["time"]["step"] > plan["time"]["communication"] > 0
    assert plan["cluster"] == {"nodes": 1, "gpus_per_node": 2, "num_ranks": 2}
    if not FULL:
        return  # refusals and usage errors: above, and in cli/test_commands.py, in this process
    refused = gengap("plan", "--config", demo, "--nodes", 512, "--gpus_per_node", 8, **cache)
    assert refused.returncode == 2
    assert "4,096 rank(s)" in refused.stdout
    assert "leaves 4032 of 4096 ranks without a sample" in refused.stdout
    assert "is not calibrated: add --calibrate" in refused.stdout
    wrong = gengap("plan", "--nods", 3)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean --nodes" in wrong.stderr
