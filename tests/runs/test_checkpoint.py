"""Checkpoints on disk: whole or not there, whatever happens at whatever byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gengap_dist.config.sections import OptimConfig, RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from gengap_dist.runs.schema import RunInfo, RunStatus
from tests.conftest import ROOT, thinned

STATE = {"w": torch.arange(3000.0), "step": 3, "nested": {"names": ["a", "b"], "none": None}}


def save(folder: Path, *steps: int, keep: int = 2, **facts: object) -> None:
    saver = checkpoint.CheckpointWriter(folder, keep)
    for step in steps:
        saver.save(step, {"model": STATE, "run": {"step": step}}, {"world_size": 1} | facts)
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


# -- other things in the folder, and other people's checkpoints ------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_own_checkpoints_are_counted_and_deleted(tmp_path):
    folder, others = tmp_path / "checkpoints", tmp_path / "others"
    others.mkdir()
    save(tmp_path / "another", 5, 40, run="b")
    for name in ("step_00000005", "step_00000040"):
        shutil.copytree(tmp_path / "another" / name, others / name)
    for name in ("step_00000020_1", "step_00000020.bak", "step_000000020", "step_0000002", "a_step_00000020"):
        shutil.copytree(tmp_path / "another" / "step_00000005", others / name)
    (others / "step_00000001").mkdir()
    (others / "step_00000001" / "mine.txt").write_text("mine")
    (others / "mine").mkdir()
    (others / "mine" / "step_00000003").write_text("mine")
    for name in (".DS.part", ".DS_Store", "step_00000012", "step_00000013.txt"):
        (others / name).write_text("mine")
    before = content(others)
    shutil.copytree(others, folder)
    save(folder, 10, 20, 30, run="a")
    assert [*checkpoint.checkpoints_by_step(folder)] == [5, 20, 30, 40]
    assert {name: data for name, data in content(folder).items() if name in before} == before
    own = {name.split("/")[0] for name in content(folder) if name not in before}
    assert own == {"step_00000020", "step_00000030"}


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(folder, 10, 20, run="a")
    cut_short = lambda path, ignore_errors: (path / "checkpoint.json").unlink(missing_ok=True)  # noqa: E731
    monkeypatch.setattr(shutil, "rmtree", cut_short)
    checkpoint._remove(folder / "step_00000010")
    assert [*checkpoint.checkpoints_by_step(folder)] == [20]
    monkeypatch.undo()
    checkpoint.CheckpointWriter(folder, keep=2)
    assert [path.name for path in folder.iterdir()] == ["step_00000020"]


def test_what_stands_where_a_checkpoint_has_to_be_is_not_deleted(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 5, run="b")
    (folder / "step_00000007").mkdir()
    (folder / "step_00000007" / "mine.txt").write_text("mine")
    (folder / "step_00000008").write_text("mine")
    before = content(folder)
    for step in (5, 7, 8):
        with pytest.raises(FileExistsError, match=f"step_0000000{step} is there, which is no checkpoint of this run"):
            save(folder, step, run="a")
    assert content(folder) == before


def test_a_damaged_later_checkpoint_does_not_drive_out_the_newest(tmp_path):
    save(tmp_path, 20, run="a")
    (tmp_path / "step_00000020" / "model.pt").write_bytes(b"")
    save(tmp_path, 10, keep=1, run="a")
    assert checkpoint.latest(tmp_path, print) == tmp_path / "step_00000010"
    save(tmp_path, 20, keep=1, run="a")  # in its place
    assert [*checkpoint.checkpoints_by_step(tmp_path)] == [20]
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step_00000020"


def edit_facts(path: Path, **changes: object) -> None:
    facts = json.loads((path / "checkpoint.json").read_text()) | changes
    (path / "checkpoint.json").write_text(json.dumps({name: value for name, value in facts.items() if value != ...}))


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        ({"sha256": {}}, "checkpoint.json has no checksum of model.pt, run.pt"),
        ({"sha256": ...}, "checkpoint.json is not valid"),
        ({"sha256": []}, "checkpoint.json is not valid"),
        ({"schema": ...}, "checkpoint.json is not valid"),
        ({"schema": "2"}, "checkpoint.json is not valid"),
        ({"schema": 0}, "checkpoint.json is not valid"),
        ({"step": 30}, "checkpoint.json is that of step 30"),
    ],
)
def test_a_checkpoint_that_says_too_little_is_passed_over(tmp_path, changes, damage):
    save(tmp_path, 10, 20)
    edit_facts(tmp_path / "step_00000020", **changes)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step_00000010"
    assert damage in said[0]


def test_every_file_of_tensors_has_a_checksum(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "step_00000010"
    checksums = json.loads((path / "checkpoint.json").read_text())["sha256"]
    edit_facts(path, sha256={"run.pt": checksums["run.pt"]})
    assert checkpoint.describe_damage(path) == "checkpoint.json has no checksum of model.pt"
    edit_facts(path, sha256=checksums)
    shutil.copy(path / "model.pt", path / "best.pt")
    assert checkpoint.describe_damage(path) == "checkpoint.json has no checksum of best.pt"


def test_a_checkpoint_of_a_later_version_is_refused_and_kept(tmp_path):
    save(tmp_path, 10, 20)
    edit_facts(tmp_path / "step_00000020", schema=99)
    with pytest.raises(UsageError, match=r"step_00000020/checkpoint.json has schema 99, and this version reads up to"):
        checkpoint.latest(tmp_path, pytest.fail)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"run": "b"}, r"step_00000010 is of another run \(run b\) than its folder \(run a\): move it out"),
        ({"run": ...}, r"is of another run \(a run without an id\) than its folder \(run a\)"),
        (
            {"config": RunConfig(optim=OptimConfig(lr=9.0)).model_dump(mode="json")},
            r"optim.lr \(0.02\) was 9.0 when che",
        ),
        ({"config": ...}, "step_00000010/checkpoint.json does not name the settings of its run"),
        ({"run": ..., "config": ..., "schema": 1}, "is of another run"),  # an earlier version did not start this run
    ],
)
def test_a_checkpoint_belongs_to_its_run(tmp_path, changes, says):
    save(tmp_path, 10, run="a", config=RunConfig().model_dump(mode="json"))
    path = tmp_path / "step_00000010"
    edit_facts(path, **changes)
    info = RunInfo(id="a", seed=0, config={}, status=RunStatus.RUNNING)  # pyright: ignore[reportCallIssue]
    if not says:
        checkpoint.check_origin(path, info, RunConfig())
        return
    with pytest.raises(UsageError, match=says):
        checkpoint.check_origin(path, info, RunConfig())
