"""Post-local SGD and SWAP against plain torch, on any number of ranks, and over restarts."""

import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist import models
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import split
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.models.batch_norm import has_batch_norm
from gengap_dist.parallel.strategies import DDP, Single
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import prepare_folder, read_metrics
from gengap_dist.training.algorithms import AlgorithmSetup, build_algorithm
from gengap_dist.training.algorithms.update_bn import recompute_running_stats
from gengap_dist.training.checks import check_norm
from gengap_dist.training.optimizer import build_optimizer
from gengap_dist.training.tasks import Classification
from tests.conftest import config, cut_after, thinned

LR, MOMENTUM, STEPS, FIRST, EVERY = 0.1, 0.9, 13, 4, 3
TINY = {
    "train__dtype": "float64",
    "batch__global_size": 24,
    "batch__micro_size": 5,
    "data__augment": ["flip"],
    "algorithm__local_start": FIRST / STEPS,
    "algorithm__local_steps": EVERY,
}


def start(world, local, workers, **settings):
    """A course, and its network, from which a twin can be made."""
    run = config(**TINY | {"algorithm__local_sgd": local, "algorithm__workers": workers} | settings)
    splits = datasets.load(run.data)
    batches = BatchLoader(splits.train, Preprocess(splits.pixels, world.device, torch.float64), run.data, run.seed)
    torch.manual_seed(7)
    model = models.from_config(run, splits.spec, world).double()
    strategy = (DDP if world.size > 1 else Single)(run, world)
    strategy.setup(model, partial(build_optimizer, run.optim))
    order = EpochSampler(len(splits.train), run.batch.global_size, run.seed)
    setup = AlgorithmSetup(run, Classification(splits.spec), strategy, batches, order, STEPS)
    return build_algorithm(setup), deepcopy(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def descend(model, optimizer, batch):
    """One step; the loss, and the gradient's norm."""
    images, labels = batch
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizer.step()
    return loss.item(), norm.item()


def copies(model, optimizer, count):
    """Networks and optimizers that start as these are."""
    out = []
    for _ in range(count):
        twin = deepcopy(model)
        out.append((twin, sgd(twin)))
        out[-1][1].load_state_dict(deepcopy(optimizer.state_dict()))
    return out


def mean(nets):
    return torch.stack([flat(net) for net, _ in nets]).mean(0)


def check(taken, results):
    """The step's loss and norm are the mean and the root mean square over workers of one size."""
    losses, norms = torch.tensor(results, dtype=torch.float64).T
    assert taken.norm is None
    assert float(taken.sums.loss_sum) / taken.size == pytest.approx(float(losses.mean()), rel=1e-10)
    assert float(taken.sums.worker_squared_norm) ** 0.5 == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-10)


def test_post_local_sgd_is_what_it_is_defined_as():
    course, model = start(World(), "post_local_sgd", 4)
    optimizer, nets = sgd(model), []
    for step in range(STEPS):
        taken = course.step(step, LR, MOMENTUM)
        indices, epoch = course.sampler.indices(step), course.sampler.epoch(step)
        if step < FIRST:
            descend(model, optimizer, course.batches(indices, epoch))
            continue
        nets = nets or copies(model, optimizer, 4)
        parts = [indices[part.start : part.stop] for part in split(len(indices), 4)]
        check(taken, [descend(*net, course.batches(part, epoch)) for net, part in zip(nets, parts, strict=True)])
        if (step - FIRST + 1) % EVERY == 0:
            average = mean(nets)
            for net, _ in nets:
                nn.utils.vector_to_parameters(average.clone(), net.parameters())
        assert (mean(nets) - flat(nets[0][0])).norm() > 1e-4 or (step - FIRST + 1) % EVERY == 0
        with course.evaluated_model() as network:
            torch.testing.assert_close(flat(network), mean(nets), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(("scaling", "rate"), [("none", 1.0), ("linear", 1 / 3), ("sqrt", 3**-0.5)])
def test_swap_is_what_it_is_defined_as(scaling, rate, corrected):
    """Uncorrected momentum, v = m v + lr g, keeps the rate before the workers': m / rate in u = m u + g, once."""
    more = {"optim__scaling": scaling, "optim__base_size": 8, "optim__momentum_correction": corrected}
    course, model = start(World(), "swap", 3, **more)
    optimizer, nets, num = sgd(model), [], course.sampler.num_samples
    for step in range(STEPS):
        taken = course.step(step, LR, MOMENTUM)
        if step < FIRST:
            descend(model, optimizer, course.batches(course.sampler.indices(step), course.sampler.epoch(step)))
            continue
        nets = nets or copies(model, optimizer, 3)
        results = []
        for worker, (net, own) in enumerate(nets):
            first = step == FIRST and not corrected
            own.param_groups[0] |= {"lr": LR * rate, "momentum": MOMENTUM / rate if first else MOMENTUM}
            indices = EpochSampler(num, 8, seed=0, worker=worker).indices(step - FIRST)
            results.append(descend(net, own, course.batches(indices, 1 + worker)))
        check(taken, results)
        assert (taken.size, taken.lr) == (24, pytest.approx(LR * rate))
    with course.evaluated_model() as network:
        torch.testing.assert_close(flat(network), mean(nets), rtol=1e-10, atol=1e-12)
    assert (mean(nets) - flat(nets[0][0])).norm() > 1e-3


def beside_torch(world):
    """The furthest that the project's post-local SGD is from torch's, in its own steps; sums over ranks of each."""
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    course, model = start(world, "post_local_sgd", 2)
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp.register_comm_hook(PostLocalSGDState(None, dist.new_group([world.rank], use_local_synchronization=True), FIRST,
                                             post_local_gradient_allreduce=False), post_localSGD_hook)  # fmt: skip
    averager = PeriodicModelAverager(period=EVERY, warmup_steps=FIRST + EVERY - 1)
    optimizer = PostLocalSGDOptimizer(sgd(model), averager)
    distances, sums = [], []
    total = World.all_reduce

    def counted(self, tensor, label="sum"):
        sums.append((step, label))
        return total(self, tensor, label)

    World.all_reduce = counted
    for step in range(STEPS):
        course.step(step, LR, MOMENTUM)
        indices, epoch = course.sampler.indices(step), course.sampler.epoch(step)
        part = split(len(indices), 2)[world.rank]
        descend(ddp, optimizer, course.batches(indices[part.start : part.stop], epoch))
        own = course.workers[world.rank].model if step >= FIRST else course.strategy.model
        distances.append(float((flat(own) - flat(model)).norm() / flat(model).norm()))
    World.all_reduce = total
    apart = flat(model) - total(world, flat(model)) / world.size
    return distances, sums, float(apart.norm())


def test_two_workers_on_two_ranks_are_torchs_post_local_sgd_and_meet_only_to_average(crews):
    for distances, sums, apart in crews[2](beside_torch):
        assert max(distances) < 1e-10
        assert [step for step, _ in sums] == [FIRST + EVERY - 1, FIRST + 2 * EVERY - 1, FIRST + 3 * EVERY - 1]
        assert apart == 0.0


def test_a_worker_without_a_sample_stands_still():
    """Two samples are left at the end of an epoch, and there are four workers."""
    course, _ = start(World(), "post_local_sgd", 4, algorithm__local_steps=99)
    course.first_step = 0
    course.sampler = EpochSampler(50, 24, seed=0)
    for step in range(2):
        course.step(step, LR, MOMENTUM)
    before = {worker: flat(strategy.model) for worker, strategy in course.workers.items()}
    taken = course.step(2, LR, MOMENTUM)
    assert taken.size == 2
    moved = {
        worker: not torch.equal(before[worker], flat(strategy.model)) for worker, strategy in course.workers.items()
    }
    assert moved == {0: False, 1: True, 2: False, 3: True}
    with course.evaluated_model() as network:
        torch.testing.assert_close(flat(network), torch.stack([flat(s.model) for s in course.workers.values()]).mean(0))


def test_workers_keep_their_loss_scales():
    """The run's when they begin; each its own in a checkpoint."""
    half = {"train__autocast": "float16", "train__dtype": "float32", "model__name": "mlp", "model__widths": [8]}
    course, _ = start(World(), "post_local_sgd", 2, **half)
    for step in range(FIRST):
        course.step(step, LR, MOMENTUM)
    course.strategy.execution.scaler.update(1024.0)
    course.step(FIRST, LR, MOMENTUM)
    scalers = [strategy.execution.scaler for strategy in course.workers.values()]
    assert [scaler.get_scale() for scaler in scalers] == [1024.0, 1024.0]
    for scaler, scale in zip(scalers, (512.0, 256.0), strict=True):
        scaler.update(scale)
    again, _ = start(World(), "post_local_sgd", 2, **half)
    again.load(course.state())
    assert [strategy.execution.scaler.get_scale() for strategy in again.workers.values()] == [512.0, 256.0]


@pytest.mark.parametrize(("share", "steps"), [(0.97, STEPS), (0.6, 1)])
@pytest.mark.parametrize("settings", [{"local_sgd": "swap", "workers": 2}, {"weight_averaging": "swa"}])
def test_a_last_part_without_steps_is_refused(settings, share, steps):
    """It would be plain training under another name."""
    name = "local_start" if "local_sgd" in settings else "average_start"
    run = config(**{f"algorithm__{key}": value for key, value in (settings | {name: share}).items()})
    with pytest.raises(
        UsageError, match=rf"algorithm.{name} \({share:g}\) leaves none of {steps} steps after it: choose"
    ):
        build_algorithm(AlgorithmSetup(run, None, Single(run, World()), None, EpochSampler(48, 24, 0), steps))


def test_an_average_of_swap_has_statistics_of_its_own():
    course, _ = start(World(), "swap", 2, model__name="mlp", model__widths=[16], batch__ghost_size=4)
    for step in range(STEPS):
        course.step(step, LR, MOMENTUM)
    with course.evaluated_model() as network:
        assert has_batch_norm(network)
        twin = deepcopy(network)
        for name, buffer in twin.named_buffers():
            if "running" in name:
                buffer.fill_(99.0)
        recompute_running_stats(twin, course.batches, World(), 4)
        for name, buffer in network.named_buffers():
            if "running" in name:
                torch.testing.assert_close(dict(twin.named_buffers())[name], buffer, msg=name)


@pytest.mark.parametrize(("local", "sizes"), [("post_local_sgd", {24, 5}), ("swap", {24, 9})])
def test_a_worker_that_would_normalise_one_sample_is_refused(local, sizes):
    """Five samples on four workers, and nine that leave one after batches of eight of a worker's own."""
    workers = 4 if local == "post_local_sgd" else 3
    course, model = start(World(), local, workers, model__name="mlp", batch__micro_size=24)
    with pytest.raises(UsageError, match=rf"{workers} algorithm.workers, leaves batch norm a group of one sample"):
        check_norm(course.config, model, sizes, 1)
    check_norm(course.config.model_copy(update={"algorithm": config().algorithm}), model, sizes, 1)


# -- whole runs -------------------------------------------------------------------------------------------------------

RUN = {
    "train__steps": 12,  # two epochs, whose last steps have 94 images
    "train__dtype": "float64",
    "train__num_evals": 2,
    "batch__global_size": 240,
    "data__augment": ["crop", "flip"],
    "checkpoint__every_steps": 3,
    "checkpoint__keep": 9,
    "probe__num_samples": 64,
    "probe__per_decade": 1,
    "algorithm__local_start": 0.25,  # from the fourth step on
    "algorithm__local_steps": 4,
}
GHOST = {"model__name": "mlp", "model__widths": [32, 16], "batch__ghost_size": 6, "algorithm__workers": 4}
CASES = {
    "post-local": {"algorithm__local_sgd": "post_local_sgd", "algorithm__workers": 4},
    "post-local, ghost norm": {"algorithm__local_sgd": "post_local_sgd", **GHOST},
    "post-local, SAM": {
        "algorithm__local_sgd": "post_local_sgd",
        **GHOST,
        "algorithm__workers": 2,
        "algorithm__sam_rho": 0.05,
    },
    "swap": {
        "algorithm__local_sgd": "swap",
        "algorithm__workers": 2,
        "optim__scaling": "linear",
        "optim__base_size": 120,
    },
    "swap, ghost norm": {"algorithm__local_sgd": "swap", **GHOST},
}


def go(pools, size, case, micro, out, *, resume=False, **settings):
    prepare_folder(out, "run.json", resume=resume)
    run = config(**RUN | CASES[case] | settings, batch__micro_size=micro, launch__num_processes=size)
    return pools[size].run(run, out, resume=resume, progress=lambda *_: None)


@pytest.fixture(scope="module")
def truth(pools, tmp_path_factory):
    """Every case on one rank."""
    out = {}
    for case in CASES:
        out[case] = tmp_path_factory.mktemp("truth")
        go(pools, 1, case, 240, out[case])
    return out


def last(out, name):
    path = checkpoint.checkpoints_by_step(out / "checkpoints")[RUN["train__steps"]]
    return torch.load(path / name, weights_only=True)


def same(ours, theirs, tolerance):
    """Two nests of tensors, near to each other; counts of batches depend on how many there were."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            if "batches_tracked" not in key:
                same(ours[key], theirs[key], tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, tolerance)
    else:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def check_same(out, whole, tolerance=1e-9):
    same(last(out, "model.pt"), last(whole, "model.pt"), tolerance)
    same(last(out, "algorithm.pt"), last(whole, "algorithm.pt"), tolerance)
    lines, expected = [*read_metrics(out)], [*read_metrics(whole)]
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in ("train/loss", "train/accuracy", "train/grad_norm", "val/loss", "val/accuracy", "test/accuracy"):
            assert (name in line) == (name in other)
            assert line.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=max(tolerance, 1e-15)), name


BOTH = [(case, size, micro) for case in CASES for size, micro in ((2, 240), (3, 7))]


@pytest.mark.parametrize(
    ("case", "size", "micro"),
    thinned(BOTH, lambda case, size, micro: (case in ("post-local", "swap, ghost norm")) == (size == 3)),
)
def test_world_size_law(pools, truth, tmp_path, case, size, micro):
    go(pools, size, case, micro, tmp_path / "run")
    check_same(tmp_path / "run", truth[case])


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_on_its_own_and_keeps_the_average(truth, case):
    """Workers differ, and the checkpoint's network is their mean: what `gengap probe` is to look at."""
    workers = [state["model"] for state in last(truth[case], "algorithm.pt")["workers"]]
    assert len(workers) == CASES[case]["algorithm__workers"]
    average = last(truth[case], "model.pt")
    assert any((workers[0][name] - workers[1][name]).norm() > 1e-3 for name in average if name.endswith("weight"))
    for name in (name for name in average if "running" not in name and "batches" not in name):
        mean = torch.stack([worker[name] for worker in workers]).mean(0)
        torch.testing.assert_close(average[name], mean, rtol=1e-12, atol=1e-12)
    losses = [line["train/loss"] for line in read_metrics(truth[case]) if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert last(truth[case], "optimizer.pt") == {}
    updates = [line["train/update_norm"] for line in read_metrics(truth[case]) if "train/update_norm" in line]
    assert min(updates) > 0


@pytest.mark.parametrize(
    "case",
    thinned(
        ["post-local", "post-local, ghost norm", "swap", "swap, ghost norm"],
        lambda case: case in ("post-local, ghost norm", "swap"),
    ),
)
def test_a_run_goes_on_with_another_number_of_ranks(pools, truth, tmp_path, case):
    """From one rank to three after the plain part; to two and to one in the local part."""
    out = tmp_path / "run"
    shutil.copytree(truth[case], out)
    for step, size in ((3, 3), (6, 2), (9, 1)):
        cut_after(out, step)
        go(pools, size, case, 240, out, resume=True)
        check_same(out, truth[case])


@pytest.mark.parametrize(("case", "size"), [("post-local, ghost norm", 2), ("swap", 3)])
def test_the_same_number_of_ranks_is_bitwise(pools, tmp_path, case, size):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(pools, size, case, 7, whole, train__dtype="float32")
    shutil.copytree(whole, cut)
    cut_after(cut, 6)
    go(pools, size, case, 7, cut, resume=True, train__dtype="float32")
    check_same(cut, whole, tolerance=0.0)
