"""Checkpoints on disk: whole or not there, whatever happens at whatever byte."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from tests.conftest import ROOT, thinned

STATE = {"w": torch.arange(3000.0), "step": 3, "nested": {"names": ["a", "b"], "none": None}}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    saver = checkpoint.CheckpointWriter(folder, keep)
    for step in steps:
        saver.save(step, {"model": STATE, "run": {"step": step}}, {"world_size": 1})
    saver.wait()


def test_what_is_saved_is_what_is_loaded_and_the_last_k_stay(tmp_path):
    save(tmp_path, 10, 20, 30)
    assert [*checkpoint.checkpoints_by_step(tmp_path)] == [20, 30]
    path = checkpoint.latest(tmp_path, pytest.fail)
    assert path == tmp_path / "step_00000030"
    state = checkpoint.load(path / "model.pt")
    assert torch.equal(state.pop("w"), STATE["w"])
    assert state == {key: value for key, value in STATE.items() if key != "w"}
    assert not list(tmp_path.glob(".*"))


def test_what_is_saved_is_the_moment_of_saving(tmp_path):
    weight = torch.zeros(1_000_000)
    saver = checkpoint.CheckpointWriter(tmp_path, 1)
    saver.save(1, {"model": {"w": weight}}, {})
    weight += 1  # as training does while the thread writes
    saver.wait()
    assert checkpoint.load(tmp_path / "step_00000001" / "model.pt")["w"].count_nonzero() == 0


@pytest.mark.parametrize("name", ["model.pt", "run.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, name, damage):
    save(tmp_path, 10, 20)
    path = tmp_path / "step_00000020" / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-7])
    else:
        path.unlink()
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step_00000010"
    assert name in said[0] or name == "checkpoint.json"  # whose sums no longer fit the files
    assert "the previous one, step_00000010, is used" in said[0]
    (tmp_path / "step_00000010" / "model.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="and there is no earlier one: start the run again"):
        checkpoint.latest(tmp_path, said.append)


def test_every_flipped_byte_is_noticed(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "step_00000010" / "run.pt"
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert checkpoint.describe_damage(path.parent) == "run.pt does not match its checksum"


SAVE_UNDER_A_LIMIT = """
import resource, signal, sys
from pathlib import Path
from tests.runs.test_checkpoint import save
limit, action = int(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGXFSZ, signal.SIG_DFL if action == "kill" else signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
save(Path(sys.argv[3]), 20)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("action", "limit"),
    thinned(
        [(action, limit) for action in ("kill", "fail") for limit in (0, 1, 700, 12_000)],
        lambda action, limit: (action, limit) in (("kill", 700), ("kill", 12_000), ("fail", 0), ("fail", 700)),
    ),
)
def test_a_save_that_ends_at_any_byte_leaves_the_one_before(tmp_path, limit, action):
    """A file may grow to `limit` bytes: at the next one the process is killed, or meets what a full disk gives it."""
    save(tmp_path, 10)
    code = [sys.executable, "-c", SAVE_UNDER_A_LIMIT, str(limit), action, str(tmp_path)]
    ended = subprocess.run(code, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == (-signal.SIGXFSZ if action == "kill" else 1), ended.stderr
    assert action == "kill" or "OSError" in ended.stderr.splitlines()[-1]
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step_00000010"
    save(tmp_path, 20)
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step_00000020"
    assert not list(tmp_path.glob(".*"))


def test_other_peoples_weights_are_told_by_name(tmp_path):
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UsageError, match=r"weight is \[3, 2, 1\], the model's is \[3, 2\]") as error:
        checkpoint.restore(model, {"weight": torch.ones(3, 2, 1), "gamma": torch.ones(1)}, tmp_path)
    assert "bias is missing" in str(error.value)
    assert "gamma is not in the model" in str(error.value)
