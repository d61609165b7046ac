"""The mirror against real stores: sqlite, a real server, a dead port, a server that hangs."""

import contextlib
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from gengap_dist.cli.train import command as train_command
from gengap_dist.config.sections import MlflowConfig
from gengap_dist.distributed.runtime_context import RuntimeContext
from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.errors import UsageError
from gengap_dist.runs.appended_file import append_lines
from gengap_dist.runs.run_folder import RunRecorder, prepare_folder, read_info, read_metrics, write_info
from gengap_dist.runs.schema import RunStatus
from gengap_dist.tracking.mlflow.mlflow_run import Described, MlflowRun
from gengap_dist.tracking.mlflow.process import UploaderProcess, sync_now, upload_until_closed
from gengap_dist.tracking.mlflow.uploader import MlflowUploader
from gengap_dist.training import trainer as run_module
from tests.conftest import FULL, ROOT, config, train
from tests.ray_cluster import until
from tests.tracking.servers import guarded, losing_answers, mlflow_server, uploaders_of

SMALL = {"train__steps": 12, "batch__global_size": 50, "train__num_evals": 3, "probe__num_samples": 64}
WORDS = ["--train.steps", "12", "--batch.global_size", "50", "--train.num_evals", "3", "--probe.num_samples", "64"]
NOBODY = lambda *_: None  # noqa: E731
PASSWORD = "hunter2-s3cret"

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


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def text(path: Path) -> str:
    return path.read_bytes().decode("latin-1")


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


def test_a_command_mirrors_itself_to_a_real_server_with_a_password(tmp_path, server, mlflow_db, gengap, monkeypatch):
    """Of which nobody learns; nor can anybody else connect to the ranks."""
    out, commands, listening = tmp_path / "run", set[str](), set[str]()

    def look() -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                commands.add(" ".join(process.cmdline()))
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                connections = process.net_connections("inet")
                listening.update(each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN)

    with guarded(server, f"me:{PASSWORD}", look) as address:
        words = [
            *WORDS,
            "--launch.num_processes",
            "2",
            "--launch.device",
            "cpu",
            "--mlflow.metrics",
            "all",
            "--out",
            out,
        ]
        done = gengap("train", *words, MLFLOW_TRACKING_URI=(login := address.replace("//", f"//me:{PASSWORD}@")))
        assert done.returncode == 0, done.stderr
        for name, value in {"USERNAME": "me", "PASSWORD": PASSWORD}.items():
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        for same_server in (address, f"{login}/"):
            sync_now(out, same_server, NOBODY)
    assert f"open {address}\n" in done.stdout
    assert f"run     {address}/#/experiments/{state(out)['experiment_id']}/runs/{state(out)['run_id']}\n" in done.stdout
    assert state(out)["uri"] == address
    assert any("gengap_dist.tracking.mlflow.process" in command for command in commands)
    assert PASSWORD not in "".join([done.stdout, done.stderr, *commands, *map(text, files_in(out))])
    assert listening == {"127.0.0.1"}
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    kept = state(out)
    run = client.get_run(kept["run_id"])
    assert run.info.status == "FINISHED"
    assert same(logged(server, kept["run_id"]), recorded(out))
    assert run.data.params["batch.global_size"] == "50"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["status"] == "finished"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    assert dataset.dataset.digest == json.loads((out / "run.json").read_text())["data"]["digest"]
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"run.json", "config.yaml", "report.html", "figures", "spectra"} <= names
    assert client.list_artifacts(run.info.run_id, "figures")
    assert PASSWORD.encode() not in mlflow_db.read_bytes()
    assert [found.info.run_id for found in client.search_runs([run.info.experiment_id])] == [kept["run_id"]]


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
    assert gengap("report", "sync", out, "--mlflow.tracking_uri", later).returncode == 0
    sent = logged(later, state(out)["run_id"])
    assert len(sent) < 25
    assert {"train/loss", "val/accuracy", "test/accuracy", "near_rank_loss/fc2/centred/rel_1e-2"} <= sent.keys()
    assert same(sent, {name: points for name, points in recorded(out).items() if name in sent})
    unreachable = gengap("report", "sync", out, "--mlflow.tracking_uri", dead)
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
    for _ in range(2):
        sync_now(out, uri, NOBODY)
    few = state(out)["run_id"]
    points = recorded(out)
    assert same(logged(uri, few), {name: points[name] for name in logged(uri, few)})
    for _ in range(2):  # all is wanted later: a new run replaces the one that has less
        sync_now(out, uri, NOBODY, "all")
    assert same(logged(uri, state(out)["run_id"]), points)
    sync_now(out, uri, NOBODY, "essential")  # and keeps what it has
    (run,) = MlflowUploader(out, uri, "gengap_dist").client.search_runs([state(out)["experiment_id"]])
    assert (run.info.run_id, run.info.status) == (state(out)["run_id"], "FINISHED")


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


def all_runs(uploader: MlflowUploader) -> list[Any]:
    return uploader.client.search_runs([uploader.experiment])


@pytest.mark.parametrize("num_created", [0, 1, 2])
def test_a_run_whose_creation_was_not_answered_is_adopted(tmp_path, mlflow_db, monkeypatch, num_created):
    """The client repeats a request that is not answered, so that there may be two runs."""
    out = tmp_path / "run"
    recorder = book(out, range(3))
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "gengap_dist")
    create = uploader.client.create_run

    def lossy(*words, **named):
        for _ in range(num_created):
            create(*words, **named)
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(uploader.client, "create_run", lossy)
        with pytest.raises(ConnectionError):
            uploader.sync()
    assert len(all_runs(uploader)) == num_created
    assert sent_steps(uploader, out) == [0, 1, 2]
    recorder.finish(RunStatus.FINISHED, {"num_steps": 2})
    sync_now(out, f"sqlite:///{mlflow_db.parent}/../{mlflow_db.parent.name}/{mlflow_db.name}", NOBODY)
    (run,) = all_runs(uploader)
    assert (run.info.run_id, run.info.status) == (state(out)["run_id"], "FINISHED")
    assert (run.info.run_name, run.data.tags["folder"]) == ("run", str(out))


@pytest.mark.full  # else: a client that gets no answer, above
def test_a_server_whose_answers_are_lost_gets_all_once(tmp_path, server):
    train(tmp_path / "run", **SMALL | {"mlflow__enabled": True})
    for path, number in ("/runs/create", 1), ("/runs/create", 2), ("/logged-models", 1):  # the client asks twice
        experiment = f"{number}{path.replace('/', '-')}"
        out = Path(shutil.copytree(tmp_path / "run", tmp_path / experiment))
        with losing_answers(server, path, number) as uri:
            for _ in range(number):
                with contextlib.suppress(Exception):
                    MlflowUploader(out, uri, experiment).sync(closing=True)
            uploader = MlflowUploader(out, uri, experiment)
            uploader.sync(closing=True)
            (run,) = all_runs(uploader)
            (model,) = uploader.client.search_logged_models([uploader.experiment])
        assert (run.info.run_id, run.info.status, model.status) == (state(out)["run_id"], "FINISHED", "READY"), path
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
        assert same(logged(server, run.info.run_id), recorded(out))


def test_a_run_that_replaces_another_is_adopted(tmp_path, mlflow_db, monkeypatch):
    out = tmp_path / "run"
    book(out, range(3))
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    uploader.sync()
    uploader.client.set_tag(state(out)["run_id"], "seen_by", "a reviewer")
    described = Described.of(read_info(out))
    create = uploader.client.create_run

    def lossy(*words, **named):
        create(*words, **named)
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(uploader.client, "create_run", lossy)
        with pytest.raises(ConnectionError):
            run_in(uploader).replace(described)
    run_in(uploader).open(described, {})
    (run,) = all_runs(uploader)
    assert run.info.run_id == state(out)["run_id"]
    assert run.data.tags["seen_by"] == "a reviewer"


def run_in(uploader: MlflowUploader) -> MlflowRun:
    return MlflowRun(uploader.client, uploader.uri, uploader.experiment, uploader.folder, NOBODY, {})


def test_a_folder_changes_and_deletes_no_run_of_others(tmp_path, mlflow_db):
    """It may come from anywhere, with the id or the key of another run in its mlflow.json."""
    out, store = tmp_path / "run", f"sqlite:///{mlflow_db}"
    for folder in (tmp_path / "victim", out):
        book(folder, range(3)).finish(RunStatus.FINISHED, {"num_steps": 2})
        uploader = MlflowUploader(folder, store, "e")
        uploader.sync(closing=True)
    own, other = state(out), state(tmp_path / "victim")
    del own["closed"]
    without_key = {name: own[name] for name in own if name != "key"}
    before = uploader.client.get_run(other["run_id"]).to_dictionary()
    for content in (
        own | {"run_id": other["run_id"]},
        without_key | {"run_id": other["run_id"]},
        own | {"replaces": other["run_id"]},
        own | {"key": other["key"]},
    ):
        (out / "mlflow.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"mlflow\.json names the MLflow run \w+, which was not created for this"):
            MlflowUploader(out, store, "e").sync(closing=True)
        assert uploader.client.get_run(other["run_id"]).to_dictionary() == before
    only_key = {name: other[name] for name in ("uri", "store", "experiment_id", "key")}
    (out / "mlflow.json").write_text(json.dumps(only_key | {"last_step": -1}))
    MlflowUploader(out, store, "e").sync(closing=True)
    assert state(out)["run_id"] not in (own["run_id"], other["run_id"])
    assert uploader.client.get_run(other["run_id"]).to_dictionary() == before


def test_stores_do_not_get_again_what_they_have(tmp_path, mlflow_db):
    out = tmp_path / "run"
    recorder = book(out, range(3))
    here, there = (MlflowUploader(out, f"sqlite:///{mlflow_db}", name) for name in ("e", "f"))
    assert sent_steps(here, out) == sent_steps(there, out) == [0, 1, 2]
    recorder.log(3, 0.0, {"x": 1.0})
    recorder.flush()
    assert sent_steps(here, out) == sent_steps(there, out) == [0, 1, 2, 3]
    assert [len(all_runs(uploader)) for uploader in (here, there)] == [1, 1]


def test_a_value_that_is_refused_does_not_hold_up_others(tmp_path, mlflow_db, monkeypatch, capsys):
    out = tmp_path / "run"
    recorder = book(out, range(1500))
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    send = uploader.client.log_batch

    def refuses(run_id, metrics=(), params=(), tags=()):
        if any(metric.step % 1000 == 5 for metric in metrics):
            raise MlflowException("a bad number", INVALID_PARAMETER_VALUE)
        send(run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(uploader.client, "log_batch", refuses)
    assert sent_steps(uploader, out) == [step for step in range(1500) if step not in (5, 1005)]
    run = run_in(uploader)
    settings = {"seed": 7, "later": 1}  # a param cannot change
    run.save(described=False)
    run.open(Described.of(read_info(out))._replace(config=settings), {"k" * 300: "too long", "good": "tag"})
    data = uploader.client.get_run(run.id).data
    assert (data.params["later"], data.params["seed"], data.tags["good"]) == ("1", "0", "tag")
    said = [f"metrics {name} of {out} is left out: a bad number" for name in ("epoch", "x")]
    assert capsys.readouterr().out.splitlines() == said

    recorder.log(1500, 0.0, {"x": 1.0})
    recorder.flush()
    uploader.client.delete_run(run.id)
    with pytest.raises(MlflowException, match="must be in the 'active' state"):  # all values are refused
        uploader.sync()
    uploader.client.restore_run(run.id)
    assert sent_steps(uploader, out)[-1] == 1500


def test_a_damaged_line_does_not_hold_up_others(tmp_path, mlflow_db, capsys):
    out = tmp_path / "run"
    recorder = book(out, range(3))
    recorder.finish(RunStatus.FINISHED, {"num_steps": 2})
    (out / "system.jsonl").write_text('{"time": 1000, "cpu": 1.0}\n{"time": 2000, "c{"time": 3000, "cpu": 3.0}\n')
    append_lines(out / "system.jsonl", '{"time": 4000, "cpu": 4.0}\n')
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "gengap_dist")
    uploader.sync(closing=True)
    history = uploader.client.get_metric_history(state(out)["run_id"], "system/cpu")
    assert [point.value for point in history] == [1.0, 4.0]
    assert capsys.readouterr().out.startswith(f"a line of {out}/system.jsonl is left out")

    recorder = book(out, range(3, 5))
    append_lines(out / "metrics.jsonl", "damaged\n")
    recorder.finish(RunStatus.FAILED, {})
    write_info(out, read_info(out).with_fields(ended="2100-01-01T00:00:00+00:00"))  # not in the second of the first end
    for _ in range(2):
        with pytest.raises(UsageError, match=r"did not receive everything .*metrics.jsonl is damaged in line"):
            sync_now(out, uploader.uri, NOBODY)
    assert uploader.client.get_run(state(out)["run_id"]).info.status == "FAILED"
    assert [step for step, _ in logged(uploader.uri, state(out)["run_id"])["x"]] == [*range(5)]


def test_a_clock_that_was_set_back_ends_no_run_before_its_start(tmp_path, mlflow_db):
    out = tmp_path / "run"
    book(out, range(3)).finish(RunStatus.FINISHED, {"num_steps": 2})
    write_info(out, read_info(out).with_fields(ended="2020-01-01T00:00:00+00:00"))  # by an earlier version
    uploader = MlflowUploader(out, f"sqlite:///{mlflow_db}", "e")
    uploader.sync(closing=True)
    (run,) = all_runs(uploader)
    assert run.info.end_time == run.info.start_time


def test_a_run_that_begins_and_ends_at_once_is_sent(tmp_path, mlflow_db):
    out = tmp_path / "run"

    def trains(_: float) -> bool:
        book(out, range(3))
        return True

    upload_until_closed(out, f"sqlite:///{mlflow_db}", "e", trains)
    assert state(out)["last_step"] == 2


@pytest.mark.parametrize("created", [False, True])
def test_an_uploader_that_was_killed_is_said(tmp_path, mlflow_db, created):
    out = tmp_path / "run"
    book(out, range(3))
    uploader = UploaderProcess(out, MlflowConfig(tracking_uri=f"sqlite:///{mlflow_db}"))
    while created and not (out / "mlflow.json").exists():
        time.sleep(0.01)
    until(lambda: uploaders_of(out))  # a process that has just begun may have no command line yet
    (process,) = uploaders_of(out)
    process.kill()
    behind = uploader.finish()
    assert "its process was killed" in behind
    assert f"gengap report sync {out}" in behind
    sync_now(out, f"sqlite:///{mlflow_db}", NOBODY)
    (run,) = all_runs(MlflowUploader(out, f"sqlite:///{mlflow_db}", "gengap_dist"))
    assert run.info.status == "KILLED"


def test_a_run_that_fails_says_what_mlflow_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module.Trainer, "result", lambda self: 1 / 0)
    words = ["--mlflow.tracking_uri", f"http://127.0.0.1:{free_port()}", "--mlflow.flush_timeout_seconds", "0"]
    with pytest.raises(ZeroDivisionError):
        train_command([*WORDS, *words, "--out", str(tmp_path / "x")])
    assert f"gengap report sync {tmp_path / 'x'}" in capsys.readouterr().err


def test_a_fresh_sqlite_store_survives_several_first_users(tmp_path):
    uri = f"sqlite:///{tmp_path}/fresh.db"
    code = (
        "import sys; from pathlib import Path; from gengap_dist.tracking.mlflow.uploader import MlflowUploader; "
        "MlflowUploader(Path('.'), sys.argv[1], 'e')"
    )
    users = [subprocess.Popen([sys.executable, "-c", code, uri]) for _ in range(3 if FULL else 2)]
    assert {user.wait() for user in users} == {0}


@pytest.mark.usefixtures("few_figures")
def test_threads_do_not_outlive_a_command(tmp_path, mlflow_db, monkeypatch):
    before = threading.active_count()
    prepare_folder(tmp_path / "x", "run.json", resume=False)
    (tmp_path / "x").rmdir()
    uri = f"sqlite:///{mlflow_db}"
    words = [*WORDS, "--config", str(ROOT / "configs/demo_train.yaml"), "--mlflow.tracking_uri", uri]
    assert train_command([*words, "--out", str(tmp_path / "x")]) == 0
    assert threading.active_count() == before
