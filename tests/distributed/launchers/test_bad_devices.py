"""A device that is not there, or not enough of them: one sentence and exit code 2, whoever starts the ranks.

torchrun adds its own report, and makes 1 of every exit code.
"""

import os
from pathlib import Path

import pytest

from tests import fake_cuda
from tests.conftest import thinned
from tests.ranks import start_interpreter, start_module

pytestmark = pytest.mark.processes

NO_GPU = (
    "launch.device (cuda) needs a GPU for each of {} local rank(s), and torch finds 0 on this machine: check nvidia"
)
TOO_FEW = "launch.device (cuda) needs a GPU for each of 2 local rank(s), and torch finds 1 on this machine: start fewer"
FLOAT16 = "train.autocast (float16) needs a GPU, and this run is on a CPU: choose bfloat16, or null"
LOCAL = ["-m", "gengap_dist.train", "--mlflow.enabled", "false"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *LOCAL]
RAY = [*LOCAL, "--launch.launcher", "ray", "--launch.ray_address", "local"]
CUDA, HALF = ["--launch.device", "cuda"], ["--launch.device", "cpu", "--train.autocast", "float16"]
TWO = ["--launch.num_processes", "2"]


def sentence(words: list[str], cwd: Path, code: int = 2, **env: str) -> str:
    """The one thing that a command says in ending with `code`."""
    local = words[: len(LOCAL)] == LOCAL and "ray" not in words
    start = start_module if local and not env else start_interpreter
    done = start(*words[1:], "--out", "run", cwd=cwd, env=os.environ | env)
    assert done.returncode == code, done.stderr
    assert "/gengap_dist/" not in done.stderr  # no traceback of ours; torchrun and Ray's threads have their own
    lines = {line for line in done.stderr.splitlines() if line.startswith("gengap train")}
    assert len(lines) == 1, done.stderr
    return lines.pop()


@pytest.mark.parametrize(
    ("words", "says"),
    thinned(
        [
            ([*LOCAL, *CUDA], NO_GPU.format(1)),
            ([*LOCAL, *CUDA, *TWO], NO_GPU.format(2)),
            ([*LOCAL, *HALF], FLOAT16),
            ([*LOCAL, *HALF, *TWO], FLOAT16),
        ],
        lambda words, says: (says == FLOAT16) == (words[-1] == "2"),
    ),
)
def test_local_ranks(tmp_path, words, says):
    assert sentence(words, tmp_path).startswith(f"gengap train: {says}")


@pytest.mark.parametrize(
    ("words", "says"), thinned([(CUDA, NO_GPU.format(2)), (HALF, FLOAT16)], lambda words, says: words == CUDA)
)
def test_ranks_of_torchrun(tmp_path, words, says):
    """The first rank says it, though another may have ended before."""
    assert sentence([*TORCHRUN, *words], tmp_path, code=1).startswith(f"gengap train: {says}")


@pytest.mark.parametrize(
    ("head", "code"),
    [pytest.param([*LOCAL, *TWO], 2, id="local", marks=pytest.mark.full), pytest.param(TORCHRUN, 1, id="torchrun")],
)
def test_fewer_gpus_than_local_ranks(tmp_path, head, code):
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    said = sentence([*head, *CUDA], tmp_path, code, **fake_cuda.environment(1))
    assert said.startswith(f"gengap train: {TOO_FEW}")


NO_ROOM = (
    "launch.num_processes (1) asks for more ranks than fit on the Ray cluster: its 1 node(s) hold 0 rank(s) of "
    "{'CPU': 1.0, 'GPU': 0.25}, PACK, and none has a GPU: choose launch.device=cpu without GPU in "
    "launch.resources_per_rank"
)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param(["--launch.resources_per_rank", '{"GPU": 0.25}'], NO_ROOM, id="no GPU"),
        # what a rank refuses comes out of the driver: test_ray.py has that of another setting
        pytest.param([*HALF, *TWO], FLOAT16, id="float16", marks=pytest.mark.full),
    ],
)
def test_ranks_of_ray(tmp_path, words, says):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gengap_dist[ray]'")
    assert sentence([*RAY, *words], tmp_path) == f"gengap train: {says}"
