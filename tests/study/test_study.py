"""Whole studies, for real: ranks, report, MLflow, a second start."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from gengap_dist.analysis.study_data import read_study
from tests.conftest import FULL

pytestmark = pytest.mark.processes

STUDY = {
    "train": {"epochs": 1, "num_evals": 2},
    "probe": {"num_samples": 64, "per_decade": 1},
    "launch": {"num_processes": 2},
    "study": {
        "name": "tiny",
        "question": "Does <b>it</b> work?",
        "seeds": [0, 1],
        "baseline": "sb",  # wild has the smallest batch
        "arms": [
            {"name": "sb", "set": {"batch.global_size": 100}},
            {"name": "lb", "set": {"batch.global_size": 1294}},
            {"name": "wild", "set": {"optim.lr": 1e9}},
        ],
    },
}


@pytest.fixture(scope="module")
def done(empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(empty_store, folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    words = ["--config", "tiny.yaml", "--out", "out", "--mlflow.tracking_uri", f"sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, "-m", "gengap_dist", "study", *words]
    return folder, words, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def test_every_run_is_there(done):
    folder, _, process = done
    assert process.returncode == 0, process.stderr
    study = read_study(folder / "out")
    assert study.info["status"] == "finished"
    assert {(run.arm, run.seed, run.info["status"]) for run in study.runs} == {
        (arm, seed, "diverged" if arm == "wild" else "finished") for arm in ("sb", "lb", "wild") for seed in (0, 1)
    }
    assert {run.info["world_size"] for run in study.runs} == {1}  # packed: side by side, whatever launch says
    orders = {run.info["config"]["data"]["split_seed"] for run in study.runs}
    assert orders == {0}
    untrained = {(run.seed, run.untrained_and_trained("effective_rank/fc2")[0]) for run in study.runs}
    assert len(untrained) == 2  # arms of one seed start from the same network


def test_table_and_report_say_the_same(done):
    folder, _, process = done
    gap = read_study(folder / "out").gap("lb")
    assert sorted(gap.differences) == [0, 1]
    shown = f"{100 * gap.mean:+.2f}"
    assert shown in process.stdout
    assert "2 diverged" in process.stdout
    assert "mlflow ui --backend-store-uri" in process.stdout
    page = (folder / "out" / "report.html").read_text()
    assert shown in page
    assert "Does &lt;b&gt;it&lt;/b&gt; work?" in page
    assert "wild: 2 diverged" in page
    names = re.findall(r'<figure id="(\w+)">', page)
    assert names[0] == "test_values"
    assert {"test_values", "near_rank_change", "near_rank_loss_rel", "effective_rank", "spectra", "curves"} <= {*names}
    figures = {path.name for path in (folder / "out" / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in names for kind in ("svg", "csv")}
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "tiny.yaml" in page


@pytest.mark.filterwarnings("default")  # what MLflow warns of is not ours to mend
def test_mlflow_has_a_parent_with_the_gap_and_a_child_per_run(done):
    folder, _, _ = done
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "gengap_dist")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    arms, seeds = ([run for run in runs if run.data.tags["level"] == level] for level in ("arm", "seed"))
    assert len(parents) == 1
    assert len(arms) == 3
    assert len(seeds) == 6
    study = read_study(folder / "out")
    assert parents[0].data.metrics["sb_lb_gap/lb/mean"] == pytest.approx(study.gap("lb").mean)
    assert {run.data.tags["mlflow.parentRunId"] for run in arms} == {parents[0].info.run_id}
    assert {run.data.tags["mlflow.parentRunId"] for run in seeds} == {run.info.run_id for run in arms}
    assert study.comparison.claims[0].evidence in parents[0].data.tags["mlflow.note.content"]
    assert {(run.data.tags["arm"], run.data.tags["role"]) for run in (*arms, *seeds)} == {
        ("sb", "baseline"), ("lb", "arm"), ("wild", "arm"),
    }  # fmt: skip
    assert all(run.info.status == "FINISHED" for run in runs)
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)}


@pytest.mark.full  # else: test_restart.py, where a killed study goes on, and test_tuning.py
def test_a_second_start_runs_only_what_is_missing(done):
    folder, words, _ = done
    out = folder / "out"
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/run.json")}
    shutil.rmtree(out / "runs" / "lb" / "seed1")
    again = [sys.executable, "-m", "gengap_dist", "study", *words, "--mlflow.enabled", "false"]
    process = subprocess.run(again, cwd=folder, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    changed = {path for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert [path.parent.name for path in changed] == ["seed1"]
    assert process.stderr.count("already there") == 5
    other = subprocess.run([*again, "--optim.momentum", "0.5"], cwd=folder, capture_output=True, text=True, timeout=100)
    assert other.returncode == 2
    assert "optim.momentum (0.5) was 0.9 when sb/seed0 was run" in other.stderr


@pytest.mark.full  # else: test_ray_runner.py has such an arm one by one, too
def test_a_crashing_run_does_not_stop_the_others(tmp_path, gengap):
    (tmp_path / "moody.py").write_text(
        "from gengap_dist.models import lenet5\n"
        "def make(num_classes, in_channels):\n"
        "    model = lenet5(num_classes=num_classes, in_channels=in_channels)\n"
        "    def hook(module, args):\n"
        "        if module.training: raise ArithmeticError('no mood')\n"
        "    model.register_forward_pre_hook(hook)\n"
        "    return model\n"
    )
    arms = [{"name": "a", "set": {"model.name": "moody:make"}}, {"name": "b", "set": {}}]
    study = STUDY | {"train": {"steps": 3}, "launch": {"num_processes": 1}}
    study["study"] = STUDY["study"] | {"arms": arms, "seeds": [0], "baseline": "b"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    done = gengap("study", "--config", "s.yaml", "--out", "out", "--mlflow.enabled", "false")
    assert done.returncode == 1
    assert "1 run(s) failed" in done.stderr
    infos = {arm: json.loads((tmp_path / f"out/runs/{arm}/seed0/run.json").read_text()) for arm in "ab"}
    assert infos["a"]["status"] == "failed"
    assert "ArithmeticError: no mood" in infos["a"]["error"]
    assert infos["b"]["status"] == "finished"
    assert json.loads((tmp_path / "out/study.json").read_text())["status"] == "failed"


def test_progress_on_a_real_terminal(tmp_path):
    """Bars over runs and steps, drawn on a pseudo-terminal."""
    arms = STUDY["study"]["arms"] if FULL else STUDY["study"]["arms"][1:2]
    study = STUDY["study"] | {"arms": arms, "baseline": "sb" if FULL else "lb"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(STUDY | {"study": study}))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gengap_dist", "study", "--config", "s.yaml", "--out", "out"]
    more = ["--launch.num_processes", "2" if FULL else "1", "--mlflow.enabled", "false", "--train.steps", "40"]
    process = subprocess.Popen([*command, *more], cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # how a closed terminal ends on Linux
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    assert process.wait(200) == 0, drawn.decode()[-2000:]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(rf"runs +\S*━+\S* +[1-{2 * len(arms) - 1}]/{2 * len(arms)}", text)
    assert re.search(r"lb seed 1 +\S*━+\S* +\d+/40", text)


def test_a_study_under_torchrun(tmp_path):
    arms = [{"name": "a", "set": {"batch.global_size": 100}}, {"name": "b", "set": {"batch.global_size": 200}}]
    study = STUDY | {"train": {"steps": 3}, "mlflow": {"enabled": False}}
    study["study"] = STUDY["study"] | {"arms": arms, "baseline": "a", "seeds": [0]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "gengap_dist", "study"]
    done = subprocess.run(
        [*command, "--config", "s.yaml", "--out", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_study(tmp_path / "out")
    assert [run.info["launcher"] for run in found.runs] == ["torchrun", "torchrun"]
    assert found.gap("b").bootstrap is None
    assert "With one pair of seeds there is no interval" in (tmp_path / "out" / "report.html").read_text()
