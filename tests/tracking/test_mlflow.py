"""The mirror against real stores: sqlite, a real server, a dead port, a server that hangs."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from gengap_dist.cli.train import command as train_command
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.runs.run_folder import RunRecorder, prepare_folder, read_metrics
from gengap_dist.tracking.mlflow.process import sync_now
from gengap_dist.tracking.mlflow.uploader import MlflowUploader
from gengap_dist.training import trainer as run_module
from tests.conftest import FULL, ROOT, config, train
from tests.tracking.servers import mlflow_server

SMALL = {"train__steps": 12, "batch__global_size": 50, "train__num_evals": 3, "probe__num_samples": 64}
WORDS = ["--train.steps", "12", "--batch.global_size", "50", "--train.num_evals", "3", "--probe.num_samples", "64"]
NOBODY = lambda *_: None  # noqa: E731

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("default")]  # what MLflow warns of is not ours to mend


def logged(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def recorded(out) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(out):
        for name, value in line.items():
            if name not in ("step", "seconds"):
                values.setdefault(name, []).append((line["step"], value))
    return values


def state(out) -> dict:
    return json.loads((out / "mlflow.json").read_text())


def same(a, b) -> bool:
    """Equal to the digits that a database keeps."""
    return a.keys() == b.keys() and all(
        [s for s, _ in a[k]] == [s for s, _ in b[k]]
        and all(math.isclose(x, y, rel_tol=1e-9) for (_, x), (_, y) in zip(a[k], b[k], strict=True))
        for k in a
    )


@pytest.fixture
def server(tmp_path, mlflow_db):
    with mlflow_server(f"sqlite:///{mlflow_db}", tmp_path) as uri:
        yield uri


def test_a_command_mirrors_itself_to_a_real_server(tmp_path, server, gengap):
    out = tmp_path / "run"
    done = gengap("train", *WORDS, "--out", out, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    assert server in done.stdout
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    kept = state(out)
    run = client.get_run(kept["run_id"])
    assert run.info.status == "FINISHED"
    assert same(logged(server, kept["run_id"]), recorded(out))
    assert run.data.params["batch.global_size"] == "50"
    assert run.data.tags["world_size"] == "1"
    assert run.data.tags["status"] == "finished"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    assert dataset.dataset.digest == json.loads((out / "run.json").read_text())["data"]["digest"]
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"run.json", "config.yaml", "report.html", "figures", "spectra"} <= names
    assert client.list_artifacts(run.info.run_id, "figures")


def test_a_dead_server_delays_nothing_and_is_caught_up_later(tmp_path, mlflow_db, gengap):
    out = tmp_path / "run"
    dead = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    done = gengap("train", *WORDS, "--mlflow.flush_timeout_seconds", "5", "--out", out, MLFLOW_TRACKING_URI=dead)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert f"gengap report sync {out}" in done.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    later = f"sqlite:///{mlflow_db}"
    assert gengap("report", "sync", out, "--tracking_uri", later).returncode == 0
    assert same(logged(later, state(out)["run_id"]), recorded(out))
    unreachable = gengap("report", "sync", out, "--tracking_uri", dead)
    assert unreachable.returncode == 2
    assert "cannot be reached" in unreachable.stderr


def test_a_hanging_server_does_not_hold_up_the_steps(tmp_path, gengap):
    with socket.socket() as deaf:  # takes connections, never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        out = tmp_path / "run"
        done = gengap("train", *WORDS, "--mlflow.flush_timeout_seconds", "1", "--out", out, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0
    assert "slower than mlflow.flush_timeout_seconds (1)" in done.stderr
    assert json.loads((out / "run.json").read_text())["seconds"] < 30


def test_nothing_is_sent_twice(tmp_path, mlflow_db):
    uri = f"sqlite:///{mlflow_db}"
    out = tmp_path / "run"
    train(out, **SMALL)
    for _ in range(3):
        sync_now(out, uri, NOBODY)
    assert same(logged(uri, state(out)["run_id"]), recorded(out))


@pytest.mark.parametrize("arrived", [True, False])
def test_a_request_whose_answer_was_lost_is_looked_up(tmp_path, mlflow_db, monkeypatch, arrived):
    """The mirror dies after (or before) the store took a request, and before it noted so."""
    uri = f"sqlite:///{mlflow_db}"
    out = tmp_path / "run"
    train(out, **SMALL)
    mirror = MlflowUploader(out, uri, "e")
    send = mirror.client.log_batch
    requests = 0

    def lossy(run_id, metrics=(), params=(), tags=()):
        nonlocal requests
        requests += bool(metrics)
        if not metrics or arrived or requests != 2:
            send(run_id, metrics=metrics, params=params, tags=tags)
        if metrics and requests == 2:
            raise ConnectionError

    monkeypatch.setattr(mirror.client, "log_batch", lossy)
    with pytest.raises(ConnectionError):
        mirror.sync(closing=True)
    assert state(out)["in_flight"] is not None
    MlflowUploader(out, uri, "e").sync(closing=True)
    values = logged(uri, state(out)["run_id"])
    assert same(values, recorded(out))
    assert all(count == 1 for points in values.values() for count in Counter(step for step, _ in points).values())


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path, mlflow_db, monkeypatch):
    uri = f"sqlite:///{mlflow_db}"
    out = tmp_path / "run"
    original = run_module.Trainer.result
    monkeypatch.setattr(run_module.Trainer, "result", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(out, **SMALL)
    MlflowUploader(out, uri, "e").sync(closing=True)  # the driver is gone: the run is closed as killed
    from mlflow import MlflowClient

    first = state(out)["run_id"]
    found = MlflowClient(uri).get_run(first)
    assert found.info.status == "KILLED"
    assert found.data.tags["launcher"] == "local"
    monkeypatch.setattr(run_module.Trainer, "result", original)
    run_module.run(config(**SMALL), out, resume=True, context=RuntimeContext("torchrun"))
    MlflowUploader(out, uri, "e").sync(closing=True)
    assert state(out)["run_id"] == first
    found = MlflowClient(uri).get_run(first)
    assert found.info.status == "FINISHED"
    assert found.data.tags["launcher"] == "torchrun"
    assert same(logged(uri, first), recorded(out))


def book(out, steps, *, seconds: float = 0.0) -> RunRecorder:
    """The record of a run that has done these steps, the first of which a checkpoint may have had."""
    out.mkdir(exist_ok=True)
    recorder = RunRecorder(out)
    recorder.start(config(), {"launcher": "local"})
    recorder.resume(steps[0], seconds, {})
    for step in steps:
        recorder.log(step, 0.0, {"x": step / 3})
    recorder.flush()
    return recorder


def sent_steps(uploader, out) -> list[int]:
    uploader.sync()
    return [step for step, _ in logged(uploader.uri, state(out)["run_id"])["x"]]


def test_an_upload_reads_only_the_lines_that_are_new(tmp_path, mlflow_db):
    out = tmp_path / "run"
    recorder, lines = book(out, range(100)), out / "metrics.jsonl"
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    assert sent_steps(uploader, out) == [*range(100)]
    start, end, step = state(out)["position"]
    assert (end, step) == (lines.stat().st_size, 99)
    lines.write_bytes(b"#" * start + lines.read_bytes()[start:])  # whoever reads this finds that it is damaged
    recorder.log(100, 0.0, {"x": 0.5})
    recorder.flush()
    assert sent_steps(uploader, out) == [*range(101)]


def test_a_record_that_a_resumed_run_writes_again_is_sent_once(tmp_path, mlflow_db):
    out = tmp_path / "run"
    book(out, range(20))
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    assert sent_steps(uploader, out) == [*range(20)]
    recorder = book(out, range(8, 12), seconds=1e6)  # lines of another length
    assert sent_steps(uploader, out) == [*range(20)]
    assert state(out)["position"][2] == 11
    for step in range(12, 25):
        recorder.log(step, 0.0, {"x": step / 3})
        recorder.flush()
        assert sent_steps(uploader, out) == [*range(max(20, step + 1))]
    assert same(logged(uploader.uri, state(out)["run_id"]), recorded(out))


def test_what_an_earlier_version_has_sent_is_not_sent_again(tmp_path, mlflow_db):
    """Its mlflow.json has the last step and no position."""
    out = tmp_path / "run"
    recorder = book(out, range(10))
    (out / "system.jsonl").write_text('{"time": 1000, "cpu": 1.0}\n{"time": 2000, "cpu": 2.0}\n')
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    assert sent_steps(uploader, out) == [*range(10)]
    old = {key: value for key, value in state(out).items() if key not in ("position", "samples")}
    (out / "mlflow.json").write_text(json.dumps(old | {"system": {"system.jsonl": 2}}))
    recorder.log(10, 0.0, {"x": 0.5})
    recorder.flush()
    assert sent_steps(uploader, out) == [*range(11)]
    history = uploader.client.get_metric_history(state(out)["run_id"], "system/cpu")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 2.0)]


def test_a_first_line_whose_answer_was_lost_is_looked_up(tmp_path, mlflow_db, monkeypatch):
    out = tmp_path / "run"
    book(out, [0])
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    send = uploader.client.log_batch

    def lossy(run_id, metrics=(), params=(), tags=()):
        send(run_id, metrics=metrics, params=params, tags=tags)
        if metrics:
            raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(uploader.client, "log_batch", lossy)
        with pytest.raises(ConnectionError):
            uploader.sync()
    assert state(out)["in_flight"] == 0
    assert sent_steps(uploader, out) == [0]


def test_a_fresh_sqlite_store_survives_several_first_users(tmp_path):
    uri = f"sqlite:///{tmp_path}/fresh.db"
    code = (
        "import sys; from pathlib import Path; from gengap_dist.tracking.mlflow.uploader import MlflowUploader; "
        "MlflowUploader(Path('.'), sys.argv[1], 'e')"
    )
    users = [subprocess.Popen([sys.executable, "-c", code, uri]) for _ in range(3 if FULL else 2)]
    assert {user.wait() for user in users} == {0}


def test_threads_do_not_outlive_a_command(tmp_path, mlflow_db, monkeypatch):
    before = threading.active_count()
    prepare_folder(tmp_path / "x", "run.json", resume=False)
    (tmp_path / "x").rmdir()
    uri = f"sqlite:///{mlflow_db}"
    words = [*WORDS, "--config", str(ROOT / "configs/demo_train.yaml"), "--mlflow.tracking_uri", uri]
    assert train_command([*words, "--out", str(tmp_path / "x")]) == 0
    assert threading.active_count() == before
