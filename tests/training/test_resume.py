"""A run that was cut off goes on as if it had not been: on as many ranks bitwise, on any other number to rounding."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr

import pytest
import torch

from gengap_dist.cli.train import command as train_command
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed import launchers
from gengap_dist.distributed.preemption import Preempted
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from gengap_dist.runs.run_folder import prepare_folder, read_info, read_metrics, write_info
from gengap_dist.training.trainer import run
from tests import slow_model
from tests.conftest import FULL, ROOT, config, cut_after, thinned, train, weights
from tests.ranks import start_module

SETTINGS = {
    "train__steps": 24,
    "batch__global_size": 100,
    "batch__micro_size": 16,
    "checkpoint__every_steps": 8,
    "checkpoint__keep": 9,
    "probe__num_samples": 64,
    "train__num_evals": 3,
}
CASES = {
    "sgd": {},
    "adamw": {"optim__name": "adamw", "optim__lr": 0.001},
    "lars": {"optim__name": "lars", "optim__lr": 2.0, "optim__weight_decay": 1e-4},
    "lamb": {"optim__name": "lamb", "optim__lr": 0.01, "optim__weight_decay": 1e-4},
    "norm": {"model__name": "mlp", "batch__ghost_size": 10, "model__widths": (64, 32)},
}


SEVERAL_BUCKETS = {"model__name": "mlp", "batch__ghost_size": 10, "train__steps": 10, "probe__enabled": False}


def settings(case: str, dtype: str) -> RunConfig:
    return config(train__dtype=dtype, **(SETTINGS | CASES[case]))


def timeless(out):
    return [
        {key: value for key, value in line.items() if "seconds" not in key and not key.startswith("time/")}
        for line in read_metrics(out)
    ]


def go(pools, size, run_config, out, *, resume=False):
    prepare_folder(out, "run.json", resume=resume)
    return pools[size].run(run_config, out, resume=resume, progress=lambda done, total, note: None)


@pytest.mark.parametrize(
    ("case", "size"),
    thinned(
        [("sgd", 2), ("sgd", 3), ("several buckets", 2), ("several buckets", 3)],
        lambda case, size: (case == "sgd") == (size == 2),
    ),
)
def test_the_same_number_of_ranks_is_bitwise(pools, tmp_path, case, size):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_config = settings("sgd", "float32") if case == "sgd" else config(**SETTINGS | SEVERAL_BUCKETS)
    go(pools, size, run_config, whole)
    shutil.copytree(whole, cut)
    cut_after(cut, 8)
    go(pools, size, run_config, cut, resume=True)
    assert timeless(cut) == timeless(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(cut)[name]), name


# the others' state after a kill is under test in algorithms/test_world_size_law.py
@pytest.mark.parametrize("case", thinned(CASES, lambda case: case in ("adamw", "norm")))
def test_from_two_ranks_to_three_to_one(pools, tmp_path, case):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    go(pools, 1, settings(case, "float64"), whole)
    go(pools, 2, settings(case, "float64"), moved)
    for step, size in ((8, 3), (16, 1)):
        cut_after(moved, step)
        go(pools, size, settings(case, "float64"), moved, resume=True)
    found = weights(moved)
    for name, weight in weights(whole).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-9, msg=name)
    lines, expected = [*read_metrics(moved)], [*read_metrics(whole)]
    assert [line["step"] for line in lines] == [*range(25)]
    for line, other in zip(lines[1:], expected[1:], strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-9)
    assert read_info(moved).strategy == "single"
    assert len(read_info(moved).resumed) == 2


# A seed with which no activation comes within rounding of a kink of ReLU or max-pooling: in float32, that is luck.
QUARTER = 10 if FULL else 5  # of the steps
SHARDED = SETTINGS | {"seed": 2, "train__steps": 4 * QUARTER, "checkpoint__every_steps": QUARTER}


@pytest.fixture(scope="module")
def float32_run(pools, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    go(pools, 1, config(**SHARDED), out)
    return out


def check_close(out, whole, tolerance=1e-5):
    found = weights(out)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance, msg=name)
    lines, expected = [*read_metrics(out)], [*read_metrics(whole)]
    assert [line["step"] for line in lines] == [*range(4 * QUARTER + 1)]
    for line, other in zip(lines, expected, strict=True):
        assert ("noise_scale/trace_covariance" in line) == ("noise_scale/trace_covariance" in other)
        for name in ("train/grad_norm", "effective_rank/fc1", "nc1", "weight_norm"):
            assert (name in line) == (name in other), name
            assert line.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), name
        if "train/loss" in line:
            assert line["train/loss"] == pytest.approx(other["train/loss"], abs=tolerance)


@pytest.mark.parametrize(
    "strategy",
    thinned(["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"], lambda name: name in ("zero1", "zero3", "fsdp")),
)
def test_every_strategy_is_the_same_run_with_its_probes(pools, float32_run, tmp_path, strategy):
    out = tmp_path / "run"
    go(pools, 2, config(launch__strategy=strategy, **SHARDED), out)
    check_close(out, float32_run)
    assert read_info(out).strategy == strategy


@pytest.mark.parametrize("between", thinned(["zero2", "zero3", "fsdp"], lambda name: name == "zero2"))
def test_from_ddp_to_sharded_to_single(pools, float32_run, tmp_path, between):
    out = tmp_path / "run"
    go(pools, 2, config(launch__strategy="ddp", **SHARDED), out)
    cut_after(out, QUARTER)
    go(pools, 2, config(launch__strategy=between, **SHARDED), out, resume=True)
    cut_after(out, 3 * QUARTER)
    go(pools, 1, config(**SHARDED), out, resume=True)
    check_close(out, float32_run)


def test_a_sharded_run_goes_on_bitwise(pools, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_config = config(launch__strategy="zero2", **SHARDED)
    go(pools, 2, run_config, whole)
    shutil.copytree(whole, cut)
    cut_after(cut, 2 * QUARTER)
    go(pools, 2, run_config, cut, resume=True)
    assert timeless(cut) == timeless(whole)
    assert all(torch.equal(weight, weights(cut)[name]) for name, weight in weights(whole).items())


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(pools, tmp_path, recwarn):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(pools, 2, settings("sgd", "float32"), whole)
    shutil.copytree(whole, cut)
    cut_after(cut, 16)
    (cut / "checkpoints" / "step_00000016" / "optimizer.pt").write_bytes(b"")
    go(pools, 2, settings("sgd", "float32"), cut, resume=True)
    assert timeless(cut) == timeless(whole)
    assert all(torch.equal(weight, weights(cut)[name]) for name, weight in weights(whole).items())


def test_resume_lists_every_setting_that_differs(pools, tmp_path):
    out = tmp_path / "run"
    go(pools, 1, settings("sgd", "float32"), out)
    changed = config(optim__lr=0.5, seed=3, launch__timeout_seconds=99, **SETTINGS)
    with pytest.raises(UsageError, match=r"seed \(3\) was 0 and optim.lr \(0.5\) was 0.02 when the run in"):
        go(pools, 1, changed, out, resume=True)


def test_a_full_disk_does_not_stop_the_run(crews, tmp_path):
    """Files may grow to 200 kB, which the record stays below and a checkpoint of LeNet-5 does not."""
    out = tmp_path / "run"
    ((warned, ended),) = crews[1](run_on_a_full_disk, out)
    assert warned.count("a checkpoint could not be written after step") >= 1
    assert "(File too large); there is none yet: free disk space in" in warned
    assert "then continue with --resume" in ended  # the last one is worth more than a warning
    assert read_info(out).status == "running"


def run_on_a_full_disk(world, out):
    """What a run warns of, and how it ends."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    prepare_folder(out, "run.json", resume=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with redirect_stderr(io.StringIO()) as said:
            run(config(**SETTINGS), out, world=world)
    except Exception as error:
        return said.getvalue(), str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# -- whose checkpoint it is --------------------------------------------------------------------------------------------


FEW_STEPS = {
    "train__steps": 6, "batch__global_size": 100, "probe__enabled": False, "checkpoint__every_steps": 2,
    "checkpoint__keep": 2,
}  # fmt: skip


def test_other_things_beside_checkpoints_change_nothing(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(whole, **FEW_STEPS)
    shutil.copytree(whole, out)
    cut_after(out, 4)
    folder = out / "checkpoints"
    shutil.copytree(folder / "step_00000004", folder / "step_00000004_1")
    shutil.copytree(folder / "step_00000004", folder / "step_00000006.bak")
    (folder / ".DS.part").write_text("mine")
    (folder / "step_00000006").mkdir()
    (folder / "step_00000006" / "mine.txt").write_text("mine")
    with pytest.raises(
        UsageError, match=r"step_00000006 is there, .*; the one of step 4 is complete: move it away, then"
    ):
        train(out, resume=True, **FEW_STEPS)
    assert (folder / "step_00000006" / "mine.txt").read_text() == "mine"
    (folder / "step_00000006").rename(folder / "mine")
    train(out, resume=True, **FEW_STEPS)
    assert timeless(out) == timeless(whole)
    assert [*checkpoint.checkpoints_by_step(folder)] == [4, 6]
    assert all(torch.equal(weight, weights(out)[name]) for name, weight in weights(whole).items())
    assert {path.name for path in folder.iterdir()} == {
        "step_00000004", "step_00000004_1", "step_00000006", "step_00000006.bak", ".DS.part", "mine"
    }  # fmt: skip


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    runs = {name: tmp_path / name for name in ("a", "b", "rate", "copied")}
    train(runs["a"], **FEW_STEPS)
    train(runs["b"], seed=1, **FEW_STEPS)
    shutil.copytree(runs["a"], runs["rate"])
    shutil.copytree(runs["a"], runs["copied"])
    cut_after(runs["copied"], 4)
    train(runs["copied"], resume=True, **FEW_STEPS)  # the copy of a run is that run
    shutil.rmtree(runs["a"] / "checkpoints" / "step_00000006")
    shutil.copytree(runs["b"] / "checkpoints" / "step_00000006", runs["a"] / "checkpoints" / "step_00000006")
    with pytest.raises(UsageError, match=r"step_00000006 is of another run \(run \w{32}\) than its folder"):
        train(runs["a"], resume=True, **FEW_STEPS)
    info = read_info(runs["rate"])
    config_then = info.config | {"optim": info.config["optim"] | {"lr": 0.5}}
    write_info(runs["rate"], info.with_fields(config=config_then))
    with pytest.raises(UsageError, match=r"optim.lr \(0.5\) was 0.02 when checkpoint .*step_00000006 was written"):
        train(runs["rate"], resume=True, optim__lr=0.5, **FEW_STEPS)


# -- asked to leave ---------------------------------------------------------------------------------------------------


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*words, **env):
    return subprocess.Popen([*map(str, words)], env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.02)


LONG_STEPS = 30
LONG = {
    "--model.name": slow_model.NAME, "--model.norm": "none",
    "--train.steps": LONG_STEPS, "--train.dtype": "float64", "--batch.global_size": 100, "--mlflow.enabled": "false",
    "--probe.enabled": "false", "--checkpoint.every_steps": 10, "--train.num_evals": 2,
}  # fmt: skip


def words(out, **more):
    return [word for pair in (LONG | more).items() for word in map(str, pair)] + ["--out", str(out)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = start_module("gengap_dist.train", *words(out), "--launch.num_processes", 2, cwd=out.parent, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "launcher"),
    thinned(
        [(number, launcher) for number in (signal.SIGTERM, signal.SIGINT) for launcher in ("local", "torchrun")],
        lambda number, launcher: number == signal.SIGTERM and launcher == "local",
    ),
)
def test_asked_to_leave_it_saves_and_says_so(uninterrupted, tmp_path, launcher, number):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    head = [sys.executable, "-m"] if launcher == "local" else [*torchrun, "--standalone", "-m"]
    ranks = ["--launch.num_processes", "2"] if launcher == "local" else []
    command = [*head, "gengap_dist.train", *words(out), *ranks]
    process = start(*command, **ONE_THREAD, **slow_model.slow_after(out, "checkpoints/step_*"))
    wait_for(lambda: list(out.glob("checkpoints/step_*")), process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].decode()
    info = read_info(out)
    assert info.status == "preempted", said
    done = f"preempted after step {info.result['num_steps']}; checkpoint saved"
    assert f"{done}. Continue with --resume --out {out}." in said
    assert 0 < info.result["num_steps"] < LONG_STEPS
    assert max(checkpoint.checkpoints_by_step(out / "checkpoints")) == info.result["num_steps"]
    if launcher == "local":
        assert process.returncode == 75
    again = start_module(*command[2:], "--resume", cwd=tmp_path, env=ONE_THREAD)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in read_metrics(out)] == [*range(LONG_STEPS + 1)]
    assert all(torch.equal(weight, weights(out)[name]) for name, weight in weights(uninterrupted).items())


def test_one_rank_that_is_asked_takes_the_others_along(crews, tmp_path):
    out = tmp_path / "run"
    prepare_folder(out, "run.json", resume=False)
    ends = crews[3](leave_when_rank_two_is_asked, out)
    assert len(set(ends)) == 1
    assert 5 <= ends[0] <= 7
    assert [*checkpoint.checkpoints_by_step(out / "checkpoints")] == [ends[0]]


def leave_when_rank_two_is_asked(world, out):
    asked = False

    def progress(done, total, note):
        nonlocal asked
        asked = world.rank == 2 and done == 5

    try:
        run(config(train__steps=20), out, world=world, progress=progress, preemption_requested=lambda: asked)
    except Preempted as error:
        return error.step


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_not_all_ranks_see_is_refused(crews, tmp_path):
    for name in ("node0", "node1"):
        prepare_folder(tmp_path / name, "run.json", resume=False)
    for said in crews[3](run_on_node, tmp_path):
        assert "is not the same folder for rank 1, 2 as for rank 0: give a folder on storage that all" in said


def run_on_node(world, folder):
    from gengap_dist.training import setup, trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "SHARED_SECONDS", 0.3)
        with pytest.raises(UsageError) as refused:
            trainer.run(config(train__steps=1), folder / f"node{min(world.rank, 1)}", world=world)
    return str(refused.value)


def test_rank_0_decides_whether_to_resume(crews, tmp_path):
    """A node that joins a launch late may not know that the others were started again."""
    settings = SETTINGS | {"train__steps": 10}
    train(tmp_path / "run", **settings)
    cut_after(tmp_path / "run", 8)
    assert crews[2](resume_if_rank_is, 0, config(**settings), tmp_path / "run") == [10, 10]
    assert len(read_info(tmp_path / "run").resumed) == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [*range(11)]


def resume_if_rank_is(world, rank, run_config, out):
    return run(run_config, out, resume=world.rank == rank, world=world)["num_steps"]


def test_more_ranks_than_samples_are_refused(crews, tmp_path):
    prepare_folder(tmp_path / "run", "run.json", resume=False)
    (said, _) = crews[2](run_with_one_sample, tmp_path / "run")
    assert said == (
        "batch.global_size (1) leaves 1 of 2 ranks without a sample: choose at least 2, or start fewer ranks"
    )


def run_with_one_sample(world, out):

    try:
        run(config(batch__global_size=1), out, world=world)
    except UsageError as error:
        return str(error)


TINY = {"model__name": "mlp", "model__widths": (16,), "data__image_size": 8, "batch__global_size": 1294}


def test_a_run_becomes_longer_as_if_it_had_been_so_from_the_start(tmp_path):
    for name, epochs, resume in (("run", 2, False), ("run", 4, True), ("whole", 4, False)):
        train(tmp_path / name, resume=resume, train__epochs=epochs, **TINY)
    assert read_info(tmp_path / "run").result["num_steps"] == 4
    whole, run_then = (weights(tmp_path / name) for name in ("whole", "run"))
    assert all(torch.equal(weight, run_then[name]) for name, weight in whole.items())
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ({}, {"train.epochs": 1}, r"train.epochs \(1\) was 2 when the run in"),
        ({}, {"train.steps": 9}, r"train.steps \(9\) was None when the run in"),
        (
            {"optim__schedule": "cosine"},
            {"train.epochs": 9},
            r"was 2, and optim.schedule \(cosine\) follows the length",
        ),
        (
            {"algorithm__weight_averaging": "swa", "algorithm__average_start": 0.1},
            {"train.epochs": 9},
            r"weight_averaging \(swa\) follows the length",
        ),
    ],
)
def test_a_length_that_cannot_change_is_refused_before_ranks_start(tmp_path, monkeypatch, was, now, says):
    train(tmp_path / "run", train__epochs=2, **TINY, **was)
    monkeypatch.setattr(launchers, "choose", lambda *args, **kwargs: pytest.fail("ranks were started"))
    words = [word for name, value in now.items() for word in (f"--{name}", str(value))]
    with pytest.raises(UsageError, match=says):
        train_command(["--out", "run", "--resume", *words])
