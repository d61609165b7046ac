"""Workarounds for torch: they work, and torch still needs them. A test that fails says which file of compat/ may go."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gengap_dist.compat.batch_norm_base import BatchNormBase
from gengap_dist.compat.ddp_buffers import no_buffer_sync
from gengap_dist.compat.default_store import default_store
from gengap_dist.compat.fake_tensors import FakeTensorMode
from gengap_dist.compat.sgd_first_step import init_momentum
from gengap_dist.distributed.process_group import World, destroy_process_group, ensure_process_group
from gengap_dist.parallel.execution import deterministic


@pytest.fixture
def group():
    ensure_process_group(World(), 10.0)
    yield
    destroy_process_group()


@pytest.mark.parametrize(
    ("private", "modules"),
    [
        (BatchNormBase, (nn, nn.modules, nn.modules.batchnorm)),
        (FakeTensorMode, (torch, torch.utils, torch.testing)),
        (dist.distributed_c10d._get_default_store, (dist, dist.distributed_c10d)),
        (torch.cuda.memory._record_memory_history, (torch.cuda, torch.cuda.memory)),
        (torch.cuda.memory._dump_snapshot, (torch.cuda, torch.cuda.memory)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_has_no_public_name_yet(private, modules):
    public = {module: [name for name in dir(module) if not name.startswith("_")] for module in modules}
    assert not [name for module, names in public.items() for name in names if getattr(module, name) is private]


def after_a_skipped_step(init) -> torch.Tensor:
    """The momentum of fused SGD after a first step that an overflow has skipped, where torch fills memory with NaN."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    init(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    with deterministic(True):  # torch.utils.deterministic.fill_uninitialized_memory
        scaler.scale(parameter.sum() * float("inf")).backward()
        scaler.step(optimizer)
    return optimizer.state[parameter]["momentum_buffer"]


def test_a_skipped_first_step_leaves_the_momentum_of_fused_sgd_uninitialized():
    assert after_a_skipped_step(lambda optimizer: None).isnan().all()
    assert after_a_skipped_step(init_momentum).tolist() == [0.0, 0.0, 0.0]


def test_ddp_copies_no_buffers_and_gives_no_warning(group):
    net = nn.BatchNorm1d(2)
    assert DistributedDataParallel(net).will_sync_module_buffers()
    assert not DistributedDataParallel(net, **no_buffer_sync()).will_sync_module_buffers()


def test_the_default_store_is_that_of_the_group(group):
    dist.barrier()
    keys = default_store().num_keys()
    assert keys > 0  # those of the group
    assert default_store().add("a counter", 2) == 2
    assert default_store().num_keys() == keys + 1


def said(code: str, **variables: str) -> tuple[str, str]:
    environment = os.environ | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip(), done.stderr


@pytest.mark.processes
def test_a_command_ends_with_its_exit_handlers_and_destroys_nothing():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import atexit, sys\n"
            "from gengap_dist.compat.hard_exit import exit_without_teardown\n"
            "class Kept:\n"
            "    def __del__(self): print('destroyed')\n"
            "sys.kept = Kept()\n"
            "atexit.register(print, 'handled')\n"
            "exit_without_teardown(3)",
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (3, ["handled"], "")


@pytest.mark.processes
def test_a_stance_imports_the_compiler_and_ours_does_not():
    out, _ = said(
        "import sys, torch\n"
        "from gengap_dist.compat.compiled_model import without_compiled_code\n"
        "with without_compiled_code(): print('torch._dynamo' in sys.modules)\n"
        "with torch.compiler.set_stance('force_eager'): print('torch._dynamo' in sys.modules)"
    )
    assert out.split() == ["False", "True"]


@pytest.mark.processes
@pytest.mark.parametrize("start", ["profiler.start()", "start_quietly(profiler)"])
def test_a_profiler_says_that_it_starts_unless_ours_starts_it(start):
    out, messages = said(
        "import os, torch\n"
        "from gengap_dist.compat.quiet_kineto import start_quietly\n"
        "profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)\n"
        f"{start}\n"
        "profiler.stop()\n"
        "print(os.environ.get('KINETO_LOG_LEVEL'))"
    )
    assert ("profiler_start" in messages) == (start == "profiler.start()")
    assert out == "None"
