"""Checks of the doctor that run in a subprocess, because they may hang or crash: torch, two ranks, a client, the data.

The subprocess prints its results as JSON objects, one per line, so that results before a crash are not lost.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing import connection
from typing import Any

from gengap_dist.compat.safe_path import safe_path_variables
from gengap_dist.config.sections import DataConfig
from gengap_dist.distributed.cores import Threads
from gengap_dist.distributed.worker_pool import RankFailed, Worker, WorkerPool
from gengap_dist.errors import UsageError
from gengap_dist.tracking.mlflow.client import connect_client, describe, import_client, store_uri

RANK_SECONDS = 20  # timeout for two ranks on one machine to connect
IMPORT_SECONDS = 120  # importing torch from a cold network drive, in parallel with the other checks
GIB = 2**30

Facts = dict[str, Any]
"""Results of a subprocess; `error` if it failed, `late` if it exceeded the time limit."""


# -- parent ------------------------------------------------------------------------------------------------------------


def run_in_subprocess(function: str, *words: str, env: Mapping[str, str] | None = None) -> Facts:
    """The results of a function of this module, run in a subprocess within IMPORT_SECONDS."""
    return _collect(_start(function, os.environ | (env or {}), *words), time.monotonic() + IMPORT_SECONDS)


def run_two_ranks() -> list[Facts]:
    """The results of each of two ranks, within IMPORT_SECONDS."""
    facts: list[Facts] = [{}, {}]
    pool = WorkerPool(2, Threads(1, "doctor"))
    try:
        pool.start(check_rank)
        deadline = time.monotonic() + IMPORT_SECONDS
        while not pool.is_done and (left := deadline - time.monotonic()) > 0:
            connection.wait(pool.connections, left)
            for rank, found in pool.receive():
                facts[rank] |= found
        late: Facts = {"error": "not done in time", "late": True}
        ends = [{} if rank in pool.results else late for rank in range(2)]
    except RankFailed as error:  # it died; what it has sent before is known
        ends = [{"error": first_line(error).split(" ", 2)[2]}] * 2
    finally:
        pool.close(kill=True)
    return [end | of_rank for end, of_rank in zip(ends, facts, strict=True)]


def _start(function: str, env: Mapping[str, str], *words: str) -> "subprocess.Popen[str]":
    """Start a function of this module in a subprocess."""
    code = f"from {__name__} import {function}; {function}()"
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    command = [sys.executable, "-c", code, *words]
    env = {**env, **safe_path_variables()}
    return subprocess.Popen(command, env=env, stdin=null, stdout=pipe, stderr=null, encoding="utf-8", errors="replace")


def _collect(process: "subprocess.Popen[str]", deadline: float) -> Facts:
    """The results of a process; it is killed at `deadline`."""
    try:
        output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        facts = {"error": f"died with exit code {process.returncode}"} if process.returncode else {}
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        facts = {"error": "not done in time", "late": True}
    for output_line in output.splitlines():
        if output_line.startswith("{"):  # some packages print to stdout
            facts |= json.loads(output_line)
    return facts


def first_line(error: Exception) -> str:
    """An error's first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# -- subprocess --------------------------------------------------------------------------------------------------------


def check_rank(worker: Worker) -> None:
    """The job of each of the two ranks: sends a result for each step that works, and the first error."""

    def emit(**facts: Any) -> None:
        worker.send((worker.rank, facts))

    silent = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(silent, output)
    try:
        import torch
        import torch.distributed as dist

        from gengap_dist.distributed.process_group import init_process_group

        gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
        emit(torch=torch.__version__, gpus=[(gpu.name, gpu.total_memory / GIB) for gpu in gpus])
        try:
            emit(torchvision=importlib.import_module("torchvision").__version__)
        except Exception as error:
            emit(torchvision_error=first_line(error))
        began = time.monotonic()
        world = init_process_group("cpu", RANK_SECONDS)
        assert world.all_reduce(torch.ones(1)).item() == 2
        emit(gloo=time.monotonic() - began)
        if gpus:
            began = time.monotonic()
            size = min(2, len(gpus))  # NCCL needs one GPU per rank
            group = dist.new_group([*range(size)], timedelta(seconds=RANK_SECONDS), "nccl")
            if isinstance(group, dist.ProcessGroup):  # else this rank has no GPU
                ones = torch.ones(1, device=f"cuda:{world.rank}")
                dist.all_reduce(ones, group=group)
                assert ones.item() == size
                emit(nccl=(size, time.monotonic() - began))
        world.barrier()  # no rank exits before the other has finished
    except Exception as error:
        emit(error=first_line(error))


def query_mlflow() -> None:
    """Send one request with MLflow's own client; a health page would also answer clients that the server rejects."""
    import_client()
    began = time.monotonic()
    try:
        connect_client(store_uri(None)).search_experiments(max_results=1)
        _emit(seconds=time.monotonic() - began)
    except Exception as error:
        _emit(error=describe(error))


def read_data() -> None:
    """Read the data set given on the command line; image files are counted and not decoded."""
    from gengap_dist.data import datasets

    config = DataConfig.model_validate_json(sys.argv[1]).model_copy(update={"download": False})
    try:
        if config.name == "imagefolder":
            _emit(samples=sum(len(listing.paths) for listing in datasets.list_image_folders(config)))
        else:
            splits = datasets.load(config)
            _emit(samples=len(splits.train) + len(splits.val) + len(splits.test))
    except UsageError as error:
        _emit(error=str(error))


def try_import() -> None:
    """Import the module given on the command line."""
    try:
        importlib.import_module(sys.argv[1])
    except Exception as error:
        _emit(error=f"{type(error).__name__}: {first_line(error)}")


def _emit(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
