"""What the doctor tries in a process of its own, because it may hang or crash: torch, two ranks, a client, the data.

Such a process says what it finds as JSON objects, one a line, so that what came before a crash is not lost.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from gengap_dist.config.sections import DataConfig
from gengap_dist.distributed.launchers.base import hard_exit
from gengap_dist.distributed.launchers.local import free_port
from gengap_dist.errors import UsageError

RANK_SECONDS = 20  # that two ranks on one machine may take to meet
IMPORT_SECONDS = 120  # torch from a cold network drive, beside everything else that is checked
GIB = 2**30

Facts = dict[str, Any]
"""What a process found out; `error` if it came to no good end, `late` if it had to be ended."""


# -- here --------------------------------------------------------------------------------------------------------------


def attempt(function: str, *words: str, env: Mapping[str, str] | None = None) -> Facts:
    """What a function of this module says in a process of its own, within IMPORT_SECONDS."""
    return _listen(_start(function, os.environ | (env or {}), *words), time.monotonic() + IMPORT_SECONDS)


def two_ranks() -> list[Facts]:
    """What each of two ranks said before it ended or the time was up."""
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env["MASTER_PORT"] = str(free_port())
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # these two are nobody else's ranks
    started = [_start("rehearse", env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    until = time.monotonic() + IMPORT_SECONDS
    return [_listen(process, until) for process in started]


def _start(function: str, env: Mapping[str, str], *words: str) -> "subprocess.Popen[str]":
    """A function of this module in a process of its own."""
    code = f"from {__name__} import {function}; {function}()"
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=env, stdin=null, stdout=pipe, stderr=null, text=True)


def _listen(process: "subprocess.Popen[str]", until: float) -> Facts:
    """What a process says until it ends, or is ended."""
    try:
        said, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
        facts = {"error": f"died with exit code {process.returncode}"} if process.returncode else {}
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        facts = {"error": "not done in time", "late": True}
    for told in said.splitlines():
        if told.startswith("{"):  # some packages greet on stdout
            facts |= json.loads(told)
    return facts


def line(error: Exception) -> str:
    """An error's first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# -- there -------------------------------------------------------------------------------------------------------------


def rehearse() -> None:
    """One of the two ranks: a JSON object per line for each thing that worked, and the first that did not."""
    try:
        import torch
        import torch.distributed as dist

        from gengap_dist.distributed.process_group import init_process_group

        gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
        _say(torch=torch.__version__, gpus=[(gpu.name, gpu.total_memory / GIB) for gpu in gpus])
        try:
            _say(torchvision=importlib.import_module("torchvision").__version__)
        except Exception as error:
            _say(torchvision_error=line(error))
        began = time.monotonic()
        world = init_process_group("cpu", RANK_SECONDS)
        assert world.all_reduce(torch.ones(1)).item() == 2
        _say(gloo=time.monotonic() - began)
        if gpus:
            began = time.monotonic()
            size = min(2, len(gpus))  # NCCL wants a GPU for each rank
            group = dist.new_group([*range(size)], timedelta(seconds=RANK_SECONDS), "nccl")
            if isinstance(group, dist.ProcessGroup):  # else this rank has no GPU
                ones = torch.ones(1, device=f"cuda:{world.rank}")
                dist.all_reduce(ones, group=group)
                assert ones.item() == size
                _say(nccl=(size, time.monotonic() - began))
        world.barrier()  # none hangs up on the other
    except Exception as error:
        _say(error=line(error))
        hard_exit(1)
    hard_exit(0)


def ask_mlflow() -> None:
    """One request that any MLflow server answers, by MLflow's own client: health pages answer those it turns away."""
    from mlflow import MlflowClient

    began = time.monotonic()
    try:
        MlflowClient(sys.argv[1]).search_experiments(max_results=1)
        _say(seconds=time.monotonic() - began)
    except Exception as error:
        _say(error=" ".join(str(error).split()))


def read_data() -> None:
    """Read the data set that the command line describes; pictures are counted and not decoded."""
    from gengap_dist.data import datasets

    config = DataConfig.model_validate_json(sys.argv[1]).model_copy(update={"download": False})
    try:
        if config.name == "imagefolder":
            _say(images=sum(len(listing.samples) for listing in datasets.listings(config)))
        else:
            splits = datasets.load(config)
            _say(images=len(splits.train) + len(splits.val) + len(splits.test))
    except UsageError as error:
        _say(error=str(error))


def try_import() -> None:
    """Import the module that the command line names."""
    try:
        importlib.import_module(sys.argv[1])
    except Exception as error:
        _say(error=f"{type(error).__name__}: {line(error)}")


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
