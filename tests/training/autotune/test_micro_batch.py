"""batch.micro_size=auto: a number that all ranks share, that fits, and that changes nothing but the time."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed import cgroups
from gengap_dist.distributed.cores import threads_per_rank
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.preflight.batch_layout import Cluster
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.preflight.plan import make_plan
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics
from gengap_dist.training.autotune import available_memory
from gengap_dist.training.autotune.cache import MicroSize, load_micro_sizes, micro_sizes_path, store
from gengap_dist.training.autotune.micro_batch import Workload, candidates, resolve_micro_size
from gengap_dist.training.autotune.search import samples_per_second
from gengap_dist.training.autotune.synthetic_workload import SyntheticWorkload
from gengap_dist.training.tasks import Classification
from tests.conftest import ROOT, config, cut_after, thinned, train, weights

AUTO = {"batch__micro_size": "auto", "batch__global_size": 96, "train__steps": 4, "probe__num_samples": 64}
SMALL = {"model__name": "mlp", "model__widths": (32, 16)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The file of this module's tests, and of the ranks that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield micro_sizes_path()


def go(pool, out, *, resume: bool = False, **settings):
    prepare_folder(out, "run.json", resume=resume)
    pool.run(config(**settings), out, resume=resume, progress=lambda done, total, note: None)
    return read_info(out)


def timeless(out):
    return [{k: v for k, v in line.items() if "seconds" not in k and "time/" not in k} for line in read_metrics(out)]


@pytest.mark.parametrize("size", thinned([1, 2, 3], lambda size: size == 2))
def test_it_is_the_run_with_the_number_it_found(pools, cache, tmp_path, size):
    cache.unlink(missing_ok=True)
    settings = AUTO | SMALL | {"batch__ghost_size": 4} if size == 2 else AUTO
    first = go(pools[size], tmp_path / "auto", **settings)
    found, number = first.micro_size_auto, first.micro_size
    assert first.config["batch"]["micro_size"] == "auto"
    assert found["by"] == "measurement"
    assert number in candidates(config(**settings), size)
    rates = {int(tried): rate for tried, rate in found["samples_per_second"].items()}
    assert len(rates) > 1
    assert rates[number] == max(rates.values())
    again = go(pools[size], tmp_path / "number", **settings | {"batch__micro_size": number})
    assert again.micro_size_auto is None
    assert timeless(tmp_path / "auto") == timeless(tmp_path / "number")
    for name, weight in weights(tmp_path / "auto").items():
        assert torch.equal(weight, weights(tmp_path / "number")[name]), name


def test_it_is_remembered_by_machine_and_by_run(pools, cache, tmp_path):
    """First the file's word holds, then the record's, and neither where something else is asked."""
    cache.unlink(missing_ok=True)
    mark = go(pools[2], tmp_path / "a", **AUTO).micro_size_auto["mark"]
    known = load_micro_sizes().found[mark]
    store(mark, known.model_copy(update={"size": 2}))
    kept = go(pools[2], tmp_path / "b", **AUTO, checkpoint__every_steps=2)
    assert (kept.micro_size, kept.micro_size_auto["by"]) == (2, "an earlier measurement")
    cut_after(tmp_path / "b", 2)
    store(mark, known.model_copy(update={"size": 4}))
    resumed = go(pools[2], tmp_path / "b", **AUTO, checkpoint__every_steps=2, resume=True)
    assert (resumed.micro_size, resumed.micro_size_auto["by"]) == (2, "this run's record")
    number = AUTO | {"batch__micro_size": 2}
    go(pools[2], tmp_path / "c", **number, checkpoint__every_steps=2)
    assert timeless(tmp_path / "b") == timeless(tmp_path / "c")
    other = go(pools[2], tmp_path / "d", **AUTO | {"batch__global_size": 24})
    assert other.micro_size_auto["mark"] != mark
    cut_after(tmp_path / "b", 2)
    alone = go(pools[1], tmp_path / "b", **AUTO, checkpoint__every_steps=2, resume=True)
    assert alone.micro_size_auto["mark"] != mark


def test_a_plan_takes_what_a_run_found(cache):
    settings, place = config(**AUTO, launch__device="cpu"), Cluster(1, 1)
    cache.unlink(missing_ok=True)
    assert "assumed to choose 96" in make_plan(settings, place, Constants()).assumed[0]
    model = models.from_config(settings, DataSpec.images(10, 1), World())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_per_rank(1).number)
    try:
        _, found = resolve_micro_size(settings, Workload(model, TASK), World(), {})
    finally:
        torch.set_num_threads(threads)
    assert found is not None
    store(found["mark"], MicroSize(size=8, samples_per_second={}, pass_bytes=1))
    plan = make_plan(settings, place, Constants())
    assert plan.assumed[0].startswith("batch.micro_size=auto found 8 ")
    assert plan.batch is not None
    assert plan.batch.micro_sizes == (8, 8)


def test_a_damaged_or_locked_file_costs_a_measurement(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = micro_sizes_path()
    path.parent.mkdir()
    for text in ("{", "[]", '{"found": {"x": {"size": 0}}}'):
        path.write_text(text)
        with pytest.warns(UserWarning, match="has no valid micro-batch sizes"):
            assert load_micro_sizes().found == {}
    with pytest.warns(UserWarning, match="has no valid micro-batch sizes"):
        train(tmp_path / "run", **AUTO, probe__enabled=False)
    assert len(load_micro_sizes().found) == 1
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="has no valid"), pytest.warns(UserWarning, match="cannot be written"):
        store("x", MicroSize(size=1, samples_per_second={}, pass_bytes=1))


def test_what_has_no_choice_or_must_not_have_one(tmp_path, cache):
    cache.unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"model.norm \(local\) computes statistics over micro-batches"):
        train(tmp_path / "local", **AUTO, **SMALL, train__channels_last="auto")
    assert not cache.exists()  # and the order of pictures was not measured for nothing
    assert "would depend on the machine" in make_plan(config(**AUTO, **SMALL), Cluster(1, 1), Constants()).refused[0]
    assert candidates(config(**AUTO, model__norm="sync"), 2) == [48]
    assert candidates(config(**AUTO, algorithm__gradient_penalty=0.1, algorithm__penalty_size=12), 2) == [12]
    assert candidates(config(**AUTO, batch__ghost_size=32), 2) == [32, 64]  # a rank has two groups, or one
    grown = {"batch__schedule": [{"at": 0, "size": 20}, {"at": 100, "size": 40}]}
    assert candidates(config(**grown, batch__global_size=20), 2) == [1, 2, 4, 8, 16, 20]
    train(tmp_path / "sync", **AUTO | SMALL, model__norm="sync", probe__enabled=False)
    info = read_info(tmp_path / "sync")
    assert (info.micro_size, info.micro_size_auto["by"]) == (96, "there is no other")


def test_the_network_and_random_states_stay(tmp_path):
    settings = config(**AUTO | SMALL, model__norm="group")
    model = models.from_config(settings, DataSpec.images(10, 1), World()).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    resolve_micro_size(settings, Workload(model, TASK), World(), {})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# -- memory -----------------------------------------------------------------------------------------------------------


TASK = Classification(DataSpec.images(10, 1))


class Greedy(nn.Module):
    """Asks for more than there is, for more than `most` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.fc = most, nn.Linear(32 * 32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            torch.empty(2**46)
        return self.fc(images.flatten(1))


def greedy(world, mosts):
    settings = config(**AUTO | {"batch__global_size": 192})
    rehearsal = SyntheticWorkload(settings, Greedy(mosts[world.rank]), TASK, world.device)
    sizes = candidates(settings, world.size)
    return sorted(samples_per_second(rehearsal, settings, sizes[-1], sizes, world))


def test_a_rank_that_runs_out_of_memory_decides_for_all(crews):
    assert crews[2](greedy, (64, 1000)) == [[16, 32, 64]] * 2  # the next would be 96
    assert crews[2](greedy, (1000, 5)) == [[4]] * 2
    assert crews[2](greedy, (0, 1000)) == [[]] * 2


LIMITED = """
import resource, sys, psutil, torch
import gengap_dist.training.trainer
from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.models import from_config
from gengap_dist.training.autotune.micro_batch import Workload, resolve_micro_size
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.training.tasks import Classification
from gengap_dist.cli.train import main
from gengap_dist.distributed.process_group import World

def leave_only(mebibytes):
    most = psutil.Process().memory_info().vms + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

torch.set_num_threads(1)
words = {"model.name": "deep:Deep", "batch.micro_size": "auto", "launch.device": "cpu"}
config = validate(RunConfig, nested(words))
spec = DataSpec.images(10, 1)
network = Workload(from_config(config, spec, World()), Classification(spec))
leave_only(700)
print(resolve_micro_size(config, network, World(), {})[1]["size"], flush=True)
leave_only(150)
words |= {"out": "run", "mlflow.enabled": "false"}
main([word for name, value in words.items() for word in (f"--{name}", value)])
"""
DEEP = """
import torch
class Deep(torch.nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(in_channels, 64, 3, padding=1), torch.nn.Linear(64, num_classes)
    def forward(self, images):
        x = self.conv(images)
        for _ in range(400):
            x = x.sigmoid()
        return self.fc(x.mean((2, 3)))
"""  # saves 256 KiB in each of 400 layers: an image takes 100 MiB, and twice that is reckoned with


def test_what_does_not_fit_is_told_before_it_is_tried(tmp_path):
    (tmp_path / "deep.py").write_text(DEEP)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", LIMITED]
    done = subprocess.run(code, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "2\n", done.stderr
    assert done.returncode == 2, done.stderr
    told = done.stderr  # in which libraries that ended early may say more
    assert "batch.micro_size (auto) finds no size that fits in memory: a pass of 1 takes about 0.19" in told
    assert "train.activation_checkpointing=true" in told


def test_a_container_counts(tmp_path, monkeypatch):
    """Both versions of control groups, with limits in the group and above it."""
    old = {"a": ("700", "100"), "a/b": ("900", "5")}
    for root, limit_name, used_name, cache, levels in (
        ("", "memory.max", "memory.current", "file", {"": ("9000", "10"), "a/b": ("max", "5")}),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", old),
    ):
        for level, (limit, used) in levels.items():
            folder = tmp_path / "groups" / root / level
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit_name).write_text(f"{limit}\n")
            (folder / used_name).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"other 7\n{cache} 50\n")
    monkeypatch.setattr(cgroups, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cgroups, "MEMBERSHIPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("4:memory:/a/b\n3:cpu:/a\n0::/a/b\n")
    assert available_memory.available_memory(torch.device("cpu"), 1) == 700 - 100 + 50
    assert available_memory.available_memory(torch.device("cpu"), 3) == 650 // 3
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert available_memory.available_memory(torch.device("cpu"), 1) == 9000 - 10 + 50
    (tmp_path / "cgroup").unlink()
    assert available_memory.available_memory(torch.device("cpu"), 1) > 2**20
