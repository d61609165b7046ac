"""How often a step waits for the GPU: once, for the step before it, and for what is named here; on fake GPUs."""

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.worker_pool import environment_variables
from gengap_dist.runs.run_folder import prepare_folder
from tests import fake_cuda
from tests.conftest import config, thinned
from tests.cuda.scenarios import ADAMW, AUGMENTED, BASE, FP16, LAMB, LOCAL, OFF, POST_LOCAL, SMALL, SYNC, Settings
from tests.cuda.test_scenarios import tabulate
from tests.ranks import Crew

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(fake_cuda.missing()), reason=str(fake_cuda.missing()))]

QUIET: Settings = BASE | OFF | {"train__steps": 24, "train__num_evals": 1, "checkpoint__every_seconds": 1e9}
FIRST, LAST = 14, 22  # between them nothing is due
THEIRS = {  # where libraries wait on their own, and through which of our modules: docs/gpu.md lists them
    "torch/amp/grad_scaler.py <genexpr>": "",  # in GradScaler._maybe_opt_step: was a gradient infinite?
    "torch/nn/parallel/distributed.py _pre_forward": "",  # DDP reads the times of its first passes
    "deepspeed/": "parallel/strategies/deepspeed.py",
    "torch/cuda/": "parallel/strategies/deepspeed.py",
}

STEPS: dict[str, Settings] = {
    "plain": {},
    "noise scale": {"batch__micro_size": 25},
    "augmentation": AUGMENTED,
    "ghost norm, dropout": SMALL,
    "sync norm": SYNC,
    "adamw, clipped": ADAMW | {"optim__clip_norm": 0.5},
    "lars": {"optim__name": "lars", "optim__lr": 0.1},
    "lamb": LAMB,
    "bfloat16": {"train__autocast": "bfloat16"},
    "float16": FP16,
    "float16, lars": FP16 | {"optim__name": "lars", "optim__lr": 0.1},
    "float16, noise scale, sam": FP16 | {"batch__micro_size": 25, "algorithm__sam_rho": 0.05},
    "channels_last": SMALL | {"train__channels_last": True},
    "activation_checkpointing": SMALL | {"train__activation_checkpointing": True},
    "sam": {"algorithm__sam_rho": 0.05},
    "gradient penalty": {"algorithm__gradient_penalty": 0.05, "algorithm__penalty_size": 10},
    "rank penalty, logdet": {"algorithm__rank_penalty": 0.02},
    "rank penalty, spread": {"algorithm__rank_penalty": 0.02, "algorithm__rank_measure": "spread"},
    "rank penalty, placebo": {
        "algorithm__rank_penalty": 0.02,
        "algorithm__rank_measure": "placebo",
        "algorithm__placebo_of": "spread",
    },
    "ema": SMALL | {"algorithm__weight_averaging": "ema"},
    "swa": SMALL | {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.0},
    "post-local sgd": POST_LOCAL | {"algorithm__local_start": 0.1},
    "swap": LOCAL | SMALL | {"algorithm__local_sgd": "swap", "algorithm__workers": 2, "algorithm__local_start": 0.1},
    "fsdp": {"launch__strategy": "fsdp"},
    "zero1": {"launch__strategy": "zero1"},
    "zero3": {"launch__strategy": "zero3"},
}


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    """One and two ranks that stay, each with a fake GPU."""
    with ExitStack() as stack:
        found = {}
        for size in (1, 2):
            with environment_variables(fake_cuda.environment(size)):
                found[size] = stack.enter_context(closing(Crew(size, LaunchConfig(device="cuda"))))
        yield found


def counted(world: World, settings: Settings, out: Path, first: int, last: int) -> Counter[str]:
    """Waits for the GPU after step `first` until step `last` is done, by kind and place."""
    from gengap_dist.training.trainer import run

    counting: Any = importlib.import_module("fake_cuda.counting").Counting()

    def progress(done: int, total: int, note: str) -> None:
        if done == first and not note:
            counting.__enter__()
        if done == last and not note:
            counting.__exit__()

    if world.rank == 0:
        prepare_folder(out, "run.json", resume=False)
    world.barrier()
    run(config(**settings), out, world=world, progress=progress)
    return counting.waits()


def ours(waits: Counter[str]) -> Counter[str]:
    """Those that no library in THEIRS does on its own: `KIND @ [FILE:LINE FUNCTION] OUR PLACE < ITS CALLER < ...`."""

    def is_theirs(wait: str) -> bool:
        place, _, through = wait.partition("@ [")[2].partition("] ")
        place = re.sub(r":\d+ ", " ", place)
        return any(place.startswith(who) and through.startswith(ours) for who, ours in THEIRS.items())

    return Counter({wait: number for wait, number in waits.items() if not is_theirs(wait)})


ALONE = {"noise scale", "lamb", "float16, noise scale, sam", "rank penalty, logdet", "swap"}  # in `make test`
JOINED = {"plain", "sync norm", "lars", "float16", "swa", "post-local sgd", "fsdp", "zero1", "zero3"}


@pytest.mark.parametrize(
    ("name", "size"),
    thinned(
        [(name, size) for name in STEPS for size in (1, 2)],
        lambda name, size: (name in JOINED and size == 2) or (name in ALONE and size == 1),
    ),
)
def test_a_step_does_not_wait_for_the_gpu(crews, tmp_path, name, size):
    settings = QUIET | STEPS[name] | {"launch__device": "cuda"}
    waits = crews[size](counted, settings, tmp_path / "run", FIRST, LAST)
    mine, theirs = ours(waits[0]), Counter()
    for wait, number in (waits[0] - mine).items():
        theirs[re.sub(r":\d+ ", " ", wait.partition("@ [")[2].partition("]")[0])] += number
    per_step = {where: round(number / (LAST - FIRST), 2) for where, number in theirs.items()}
    tabulate(step=name, ranks=size, ours=mine.total() / (LAST - FIRST), theirs=per_step)
    for found in waits:
        of_steps, others = split(ours(found))
        assert of_steps == LAST - FIRST  # for the metrics of the step before, while this one is queued
        assert not others


def split(waits: Counter[str]) -> tuple[int, Counter[str]]:
    """The number of waits for the metrics of a step, and all other waits."""
    of_steps = Counter(
        {wait: number for wait, number in waits.items() if "step_metrics.py" in wait and "(read)" in wait}
    )
    return of_steps.total(), waits - of_steps


@pytest.mark.parametrize("size", [1, 2])
def test_recording_and_evaluating_wait_once_each(crews, tmp_path, size):
    settings = QUIET | {"train__steps": 40, "train__num_evals": 2, "batch__micro_size": 25, "launch__device": "cuda"}
    for waits in crews[size](counted, settings, tmp_path / "recorded", 31, 33):  # every 32 steps
        assert split(waits) == (3, Counter())  # for steps 30, 31 and, to record the times of all, 32
    for waits in crews[size](counted, settings, tmp_path / "evaluated", 19, 21):  # half-way, after recording
        of_steps, others = split(waits)
        assert of_steps == 3
        assert others.total() == sum(number for wait, number in others.items() if "evaluate" in wait) == 1


def test_a_wait_of_ours_is_seen():
    """The filter lets nothing of our own pass that goes through a library."""
    waits = {
        "sync @ [torch/cuda/__init__.py:1281 synchronize] run.py:382(train)": 1,
        "sync @ [torch/amp/grad_scaler.py:574 get_scale] parallel/strategies/base.py:150(unscaled)": 1,
        "sync @ loop.py:121(accumulate) < loop.py:81(train_step)": 1,
        "sync @ (no Python: a thread of autograd)": 1,
        "sync @ [torch/amp/grad_scaler.py:1 <genexpr>] parallel/strategies/base.py:1(step)": 1,
        "sync @ [torch/cuda/streams.py:1 synchronize] parallel/strategies/deepspeed.py:1(step)": 1,
    }
    assert len(ours(Counter(waits))) == 4
