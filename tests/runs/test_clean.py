"""What `gengap clean` removes, and what it never touches; answers stay the same, and a kill leaves a valid folder."""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gengap_dist.analysis.report.figure_list import RUN_FIGURES, STUDY_FIGURES
from gengap_dist.analysis.study_data import read_study
from gengap_dist.cli.clean import command
from gengap_dist.cli.terminal import layer_table
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint, clean, lease
from gengap_dist.runs.run_folder import (
    describe_damage,
    load_layer_facts,
    load_spectra,
    read_info,
    spectra_by_step,
    write_atomically,
    write_info,
)
from gengap_dist.runs.slim import write_slim_copy
from tests.analysis.report.folders import write_study
from tests.conftest import FULL, train
from tests.study import tiny

Tree = dict[str, str]
BOTH = ("checkpoints", "spectra")
STEPS = (5, 10, 20)
OF_LAYERS = ("near_rank_change", "near_rank_loss_rel", "rank_by_samples", "measures", "spectra", "all_spectra")


def save(run: Path, *steps: int, of: str | None = None) -> None:
    """Checkpoints of a run, or of another one."""
    writer = checkpoint.CheckpointWriter(run / "checkpoints", keep=9)
    for step in steps:
        states = {name: {"w": torch.full((300,), float(step))} for name in ("model", "optimizer", "run")}
        writer.save(step, states, {"run": of or read_info(run).id})
        writer.wait()


def tree(folder: Path) -> Tree:
    """Digest of every file below a folder, and what links lead to, by its path in there."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: f"-> {path.readlink()}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A study of two arms and two seeds, one run of which diverged, with three checkpoints and four sets of spectra."""
    arms = {"sb8": {"batch__global_size": 8}, "lb64": {"batch__global_size": 64}}
    folder = write_study(tmp_path_factory.mktemp("clean") / "study", arms, 2)
    for run in folder.glob("runs/*/*"):
        write_info(run, read_info(run).with_fields(last_hidden_layer="fc2"))
        save(run, *STEPS)
        for name in ("n32", "own_batch", "weights"):
            shutil.copytree(run / "spectra", run / "spectra" / name, ignore=shutil.ignore_patterns("n*", "o*", "w*"))
    return folder


@pytest.fixture
def study(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "study")


@pytest.fixture
def small(whole, tmp_path) -> Path:
    """The same study with one seed, and fewer spectra."""
    ignored = shutil.ignore_patterns("seed1", "own_batch", "step_00000010.npz")
    return shutil.copytree(whole, tmp_path / "study", ignore=ignored)


def cleaned(folder: Path, *what: Any) -> list[clean.LeftAlone]:
    """Clean all runs of a folder; returns what was left alone."""
    runs, left_alone = clean.find_runs(folder)
    for run in runs:
        plan = clean.plan_run(run, what or BOTH)
        freed, changed = clean.remove(plan)
        assert freed == plan.freed
        left_alone += [*plan.left_alone, *changed]
    return left_alone


def figures(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """The rows of the CSV of each figure of layers."""
    found = read_study(folder)
    drawn = {name: entries[name][1](found, found.comparison) for name in OF_LAYERS if name in entries}
    return {name: json.loads(json.dumps(figure.rows)) for name, figure in drawn.items()}


def test_the_answer_is_the_same_and_only_figures_of_spectra_have_fewer_layers(study, tmp_path):
    run = study / "runs" / "sb8" / "seed0"
    write_slim_copy(study, tmp_path / "slim")
    slim, before = tree(tmp_path / "slim"), read_study(study)
    rows, layers = tiny.table(study), layer_rows(run)
    drawn = figures(study, STUDY_FIGURES), figures(run, RUN_FIGURES)
    assert cleaned(study) == []
    assert read_study(study).comparison == before.comparison
    assert tiny.table(study) == rows
    assert layer_rows(run) == layers
    for then, now in zip(drawn, (figures(study, STUDY_FIGURES), figures(run, RUN_FIGURES)), strict=True):
        for name, of_all in then.items():
            kept = [row for row in of_all if row["layer"].startswith("fc2")]
            assert 0 < len(kept) < len(of_all)
            assert now[name] == (kept if "spectra" in name else of_all)
    write_slim_copy(study, tmp_path / "slim")
    assert tree(tmp_path / "slim") == slim
    assert not any(describe_damage(path) for path in study.glob("runs/*/*"))


def layer_rows(run: Path) -> list[list[Any]]:
    """What `gengap report` prints of the layers of a run."""
    table = layer_table(read_study(run).runs[0])
    assert table
    return [[*column.cells] for column in table.columns]


def test_what_goes_and_what_stays(study):
    before = tree(study)
    spectra = {path: load_spectra(study / path) for path in before if path.endswith(".npz")}
    assert cleaned(study) == []
    after = tree(study)
    gone = {path for path in before if "checkpoints/" in path and "step_00000020/" not in path}
    gone |= {path for path in before if "/weights/" in path}
    assert len(gone) == 4 * (2 * 4 + 4)
    assert before.keys() - after.keys() == gone
    assert after.keys() <= before.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert changed == spectra.keys() - gone
    for path in changed:
        now = load_spectra(study / path)
        assert [*now] == ["fc2", "fc2/centred"]
        assert all((now[key][0] == spectra[path][key][0]).all() and now[key][1] == spectra[path][key][1] for key in now)
        assert load_layer_facts(study / path) == {key: facts for key, (_, facts) in spectra[path].items()}
    assert cleaned(study) == []
    assert tree(study) == after


def test_kinds(study):
    run = study / "runs" / "sb8" / "seed0"
    before = tree(run)
    cleaned(run, "checkpoints")
    assert {path for path in before if path not in tree(run)} == {
        path for path in before if path.startswith(("checkpoints/step_00000005", "checkpoints/step_00000010"))
    }
    cleaned(run, "all_checkpoints")
    assert not any((run / "checkpoints").iterdir())
    assert {path: before[path] for path in before if "checkpoints" not in path} == tree(run)


def test_a_file_of_a_layer_called_like_a_member_and_one_that_is_written_again(tmp_path):
    """Facts of all layers are in a member of their own, which no layer key can be called."""
    from gengap_dist.runs.run_folder import dump_arrays

    facts = {"floor": 0.0, "num_samples": 4, "num_units": 2}
    measured = dict.fromkeys(("meta", "meta/pool", "file", "meta%2Fmeasured"), facts)
    path = tmp_path / "step_00000000.npz"
    path.write_bytes(dump_arrays({key: (np.array([1.0]), facts) for key in measured}))
    assert load_layer_facts(path) == measured
    path.write_bytes(dump_arrays({"meta": (np.array([1.0]), facts)}, measured))
    assert [*load_spectra(path)] == ["meta"]
    assert [*load_layer_facts(path)] == [*measured]


# -- what is left alone -----------------------------------------------------------------------------------------------


def status(name: str) -> Callable[[Path], object]:
    return lambda run: write_info(run, read_info(run).with_fields(status=name))


def hold(run: Path) -> None:
    """A lease of a process that lives."""
    owner = lease.this_process()._replace(pid=os.getppid(), started=lease._started(os.getppid()))
    (run / ".lease.1").write_text(f"{json.dumps(owner)}\n0\n")


def hold_elsewhere(run: Path) -> None:
    (run / ".lease.1").write_text(f"{json.dumps(['host', 'another boot', 1, '1', 'token'])}\n0\n")


def move_out(name: str) -> Callable[[Path], object]:
    """A link to somewhere else in the place of a file or folder."""

    def change(run: Path) -> None:
        (run / name).rename(run.parents[3] / "elsewhere")
        (run / name).symlink_to(run.parents[3] / "elsewhere")

    return change


WHOLE_RUNS = {
    "running": (status("running"), "has not finished (status running, or was lost)"),
    "preempted": (status("preempted"), "has not finished (status preempted): it continues from its checkpoints"),
    "killed": (status("killed"), "has not finished"),
    "failed": (status("failed"), "has not finished"),
    "lease": (hold, "is being written by process"),
    "lease elsewhere": (hold_elsewhere, "is being written by process 1 on host"),
    "lease of its study": (lambda run: hold(run.parents[2]), "is being written by process"),
    "damaged": (lambda run: (run / "run.json").write_text("{"), "cannot be read"),
    "newer": (lambda run: (run / "run.json").write_text('{"schema": 99}'), "cannot be read"),
    "cut": (lambda run: (run / "metrics.jsonl").write_text(""), "is damaged (its metrics.jsonl does not end"),
    "a link": (move_out("run.json"), "has a link in the place of its run.json"),
    "a probe": (lambda run: write_info(run, read_info(run).with_fields(launcher="probe")), "measured by gengap probe"),
}


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_run_that_may_need_them_is_left_alone(small, name):
    change, reason = WHOLE_RUNS[name]
    run = small / "runs" / "sb8" / "seed0"
    change(run)
    before = tree(run)
    (found,) = [each for each in cleaned(small) if each.path == run]
    assert reason in found.reason
    assert tree(run) == before
    if "study" not in name:
        assert [path.name for path in (small / "runs/lb64/seed0/checkpoints").iterdir()] == ["step_00000020"]


def damage_last(run: Path) -> None:
    (run / "checkpoints/step_00000020/model.pt").write_bytes(b"")


def put(name: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")

    return change


PARTS = {
    "checkpoints": [
        (damage_last, "checkpoints", "needs its older checkpoints, because step_00000020 is damaged (model.pt"),
        (move_out("checkpoints"), "checkpoints", "is a link"),
    ],
    "checkpoints/step_00000005": [
        (put("checkpoints/step_00000005/notes.txt"), "checkpoints/step_00000005", "(notes.txt)"),
        (put("checkpoints/step_00000005/mine.pt"), "checkpoints/step_00000005", "(mine.pt)"),
        (move_out("checkpoints/step_00000005"), "checkpoints/step_00000005", "is no checkpoint"),
        (move_out("checkpoints/step_00000005/model.pt"), "checkpoints/step_00000005", "(model.pt)"),
        (lambda run: (shutil.rmtree(run / "checkpoints/step_00000005"), save(run, 5, of="another")),
         "checkpoints/step_00000005", "is of another run"),
        (lambda run: (run / "checkpoints/step_00000005/checkpoint.json").unlink(),
         "checkpoints/step_00000005", "is of another run"),
    ],
    "checkpoints/": [
        (put("checkpoints/notes.txt"), "checkpoints/notes.txt", "is no checkpoint"),
        (put("checkpoints/best/model.pt"), "checkpoints/best", "is no checkpoint"),
        (put("checkpoints/.step_00000004.part/mine"), "checkpoints/.step_00000004.part", "(mine)"),
    ],
    "spectra": [
        (move_out("spectra"), "spectra", "is a link"),
        (lambda run: write_info(run, read_info(run).with_fields(last_hidden_layer=None)), "spectra", "does not name"),
    ],
    "spectra/step_00000001.npz": [
        (put("spectra/step_00000001.npz"), "spectra/step_00000001.npz", "is damaged"),
        (move_out("spectra/step_00000001.npz"), "spectra/step_00000001.npz", "is no file of spectra"),
    ],
    "spectra/": [
        (put("spectra/mine.npz"), "spectra/mine.npz", "is no file of spectra"),
        (put("spectra/mine/step_00000001.npz"), "spectra/mine", "is no folder of spectra"),
        (put("spectra/n32/notes.txt"), "spectra/n32/notes.txt", "is no file of spectra"),
        (lambda run: write_info(run, read_info(run).with_fields(last_hidden_layer="fc9")),
         "spectra/step_00000000.npz", "has no spectrum of fc9"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("at", [(where, number) for where, cases in PARTS.items() for number in range(len(cases))])
def test_what_is_not_of_the_run_is_left_alone(small, at):
    change, path, reason = PARTS[at[0]][at[1]]
    run = small / "runs" / "sb8" / "seed0"
    change(run)
    before, elsewhere = tree(run), small.parent / "elsewhere"
    outside = tree(elsewhere) if elsewhere.is_dir() else elsewhere.exists() and elsewhere.read_bytes()
    found = {each.path.relative_to(run).as_posix(): each.reason for each in cleaned(run)}
    assert reason in found[path]
    after = tree(run)
    assert {name: text for name, text in after.items() if name.startswith(path)} == {
        name: text for name, text in before.items() if name.startswith(path)
    }
    assert outside == (tree(elsewhere) if elsewhere.is_dir() else elsewhere.exists() and elsewhere.read_bytes())
    assert len(after) < len(before)  # the rest is cleaned


def test_folders_that_are_no_runs(study, tmp_path):
    (study / "runs" / "sb8" / "notes").mkdir()
    (study / "damaged" / "sb8-seed0-1").mkdir(parents=True)
    (study / "runs" / "mine").symlink_to(shutil.copytree(study / "runs" / "lb64", tmp_path / "arm"))
    before = tree(tmp_path / "arm")
    found = {each.path.relative_to(study).as_posix(): each.reason for each in cleaned(study)}
    assert found.keys() == {"runs/sb8/notes", "damaged", "runs/mine"}
    assert tree(tmp_path / "arm") == before


# -- interrupted, too late, full --------------------------------------------------------------------------------------


def test_an_interrupted_clean_leaves_a_valid_folder_and_goes_on(small, monkeypatch):
    run, calls, whole = small / "runs" / "sb8" / "seed0", 0, small / "runs" / "sb8" / "whole"
    last = run / "checkpoints" / "step_00000020"
    shutil.rmtree(run / "checkpoints" / "step_00000005")
    cleaned(shutil.copytree(shutil.copytree(run, whole), small / "done"))
    expected = tree(small / "done")

    def interrupting(do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            if (calls := calls - 1) == 0:
                raise KeyboardInterrupt
            return do(*args, **settings)

        return call

    for name in ("unlink", "rename", "replace", "rmdir"):
        monkeypatch.setattr(Path, name, interrupting(getattr(Path, name)))
    for calls_before in range(1, 100, 1 if FULL else 2):
        calls = calls_before
        try:
            cleaned(run)
            break
        except KeyboardInterrupt:
            calls = 0
        assert describe_damage(run) == ""
        assert checkpoint.latest(run / "checkpoints", pytest.fail) == last
        assert not any(map(checkpoint.describe_damage, checkpoint.checkpoints_by_step(run / "checkpoints").values()))
        assert all(load_spectra(path) for path in spectra_by_step(run / "spectra").values())
        cleaned(run)
        assert {path: digest for path, digest in tree(run).items() if not path.startswith(lease.PREFIX)} == expected
        shutil.rmtree(run)
        shutil.copytree(whole, run)
    assert calls_before > 15
    assert tree(run) == expected


def test_what_has_changed_since_it_was_listed_stays(study):
    run = study / "runs" / "sb8" / "seed0"
    plan = clean.plan_run(run, BOTH)
    put("checkpoints/step_00000005/notes.txt")(run)
    os.utime(run / "spectra" / "step_00000000.npz")
    freed, changed = clean.remove(plan)
    assert {each.path.name for each in changed} == {"step_00000005", "step_00000000.npz"}
    assert 0 < freed < plan.freed
    status("running")(run)
    save(run, 30)
    plan = plan._replace(removals=clean.plan_run(study / "runs/sb8/seed1", BOTH).removals)
    freed, changed = clean.remove(plan)
    assert (freed, [each.path for each in changed]) == (0, [run])


def test_a_full_disk_gets_room_by_the_checkpoints(study):
    run = study / "runs" / "sb8" / "seed0"
    plan, (soft, hard) = clean.plan_run(run, ("checkpoints",)), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file can be written, not even a lease
        freed, changed = clean.remove(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (freed, changed) == (plan.freed, [])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000020"]
    assert not list(run.glob(".lease*"))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_lists_and_removes_what_it_lists(study, capsys):
    before = tree(study)
    save(study / "runs/lb64/seed1", 30)
    status("running")(study / "runs/lb64/seed0")
    put("checkpoints/mine.pt")(study / "runs/sb8/seed0")
    (study / "runs/sb8/seed0/mlflow.json").write_text(
        json.dumps({"uri": "sqlite:////m.db", "experiment_id": "1", "run_id": "0123"})
    )
    before = tree(study)
    assert command([str(study)]) == 0
    listed = capsys.readouterr().out
    assert tree(study) == before
    assert "checkpoints/ step_00000005, step_00000010, step_00000020" in listed
    assert "all layers but fc2, in 16 files" in listed
    assert "left alone: study/runs/lb64/seed0 has not finished" in listed
    assert "left alone: study/runs/sb8/seed0/checkpoints/mine.pt is no checkpoint" in listed
    assert "copies of 1 run(s) in MLflow at sqlite:////m.db" in listed
    assert "would be removed: add --yes" in listed
    assert command([str(study), str(study / "runs/sb8/seed0"), "--yes"]) == 0  # the same run twice
    removed = capsys.readouterr().out
    assert removed.splitlines()[:-1] == listed.splitlines()[:-1]
    assert removed.splitlines()[-1] == listed.splitlines()[-1].replace("would be removed: add --yes", "were removed")
    assert command([str(study), "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_bad_input(study, tmp_path):
    (tmp_path / "empty").mkdir()
    before = tree(study)
    for words, says in (
        (["empty"], "FOLDER ({}/empty) contains neither run.json nor study.json: give the folder of a run or study"),
        (["nowhere"], "contains neither run.json nor study.json"),
        ([str(study), "empty", "--yes"], "contains neither"),
    ):
        with pytest.raises(UsageError) as error:
            command(words)
        assert says.format(tmp_path) in str(error.value)
    assert tree(study) == before  # also of the folder that was given beside a wrong one
    content = json.loads((study / "study.json").read_text()) | {"members": []}
    write_atomically(study / "study.json", json.dumps(content))
    with pytest.raises(UsageError, match="is a comparison, whose runs are elsewhere"):
        command([str(study), "--yes"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two layers with two checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "run"
    small = {"data__image_size": 8, "model__name": "mlp", "model__widths": [16, 8], "probe__num_samples": [32, 64]}
    train(out, train__epochs=1, batch__global_size=512, checkpoint__every_steps=2, **small)
    return out


def test_a_trained_run_is_measured_and_continued_after_a_clean(trained):
    before = {path.name for path in (trained / "checkpoints").iterdir()}
    state = checkpoint.load(max(trained.glob("checkpoints/step_*")) / "model.pt")
    assert len(before) == 2
    assert cleaned(trained) == []
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {max(before)}
    last = checkpoint.latest(trained / "checkpoints", pytest.fail)
    assert last
    assert all((checkpoint.load(last / "model.pt")[name] == value).all() for name, value in state.items())
    assert [*load_spectra(trained / "spectra" / "step_00000000.npz")] == ["fc2", "fc2/centred"]
    assert next(iter(load_layer_facts(trained / "spectra" / "n32" / "step_00000000.npz"))) == "fc1"
    assert not list((trained / "spectra" / "weights").iterdir())


@pytest.mark.full
def test_a_study_its_commands_and_its_continuation(tmp_path, gengap):
    arms = [{"name": f"b{size}", "set": {"batch.global_size": size}} for size in (64, 256)]
    config = tiny.write(
        tmp_path / "s.yaml", {"seeds": [0, 1], "tolerance": 3, "arms": arms},
        model={"name": "mlp", "widths": [16, 8]}, probe=tiny.SETTINGS["probe"] | {"num_samples": [32, 64]},
    )  # fmt: skip
    out = tmp_path / "out"
    first = tiny.start(config, out)
    assert first.returncode == 0, first.stderr

    def answers() -> dict[str, Any]:
        said = {}
        for name, words in {
            "report": (out,), "run": (out / "runs" / "b64" / "seed0",), "slim": ("slim", out, "slim"),
            "compare": (out, "--out", "compared"),
        }.items():  # fmt: skip
            done = gengap("compare" if name == "compare" else "report", *words)
            assert (done.returncode, done.stderr) == (0, "")
            said[name] = done.stdout
        numbers = [*out.rglob("*.csv"), *Path("compared").rglob("*.csv")]
        said |= {str(path): path.read_bytes() for path in numbers if "spectra" not in path.name}
        return said | tree(Path("slim"))

    before = answers()
    done = gengap("clean", out, "--yes")
    assert done.returncode == 0, done.stderr
    assert answers() == before
    kept = tiny.ended(out)
    again = tiny.start(config, out)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert {path: time for path, time in tiny.ended(out).items() if path in kept} == kept
