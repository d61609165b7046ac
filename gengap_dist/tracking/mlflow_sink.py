"""Mirrors run folders to MLflow. The folders are the truth; what a slow or dead server missed is sent later.

It runs in a process of its own (`python -m gengap_dist.tracking.mlflow_sink FOLDER ...`), tails the folder of a run or
of a study, and ends when its standard input closes. So no server can ever hold up a training step, and a training rank
never imports mlflow. How far it came is kept in `mlflow.json` beside each run.json: nothing is sent twice.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from gengap_dist.config import MACHINERY, MlflowConfig, UsageError, flat
from gengap_dist.tracking.record import read_info, read_metrics, write_atomically

MAX_REQUEST = 1000  # metrics that MLflow takes at once
POLL_SECONDS = 1.0
REST = 20  # times as long as a look at the folder took: a long record is read again at every look
LONGEST_WAIT = 60.0  # between tries to reach a server that refuses
STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "preempted": "KILLED",
}
ARTIFACTS = ("run.json", "study.json", "config.yaml", "spectra", "figures", "report.html")
DONE = b"done"
CLIENT_DEFAULTS = {  # a dead server must be noticed in seconds; MLflow's own defaults take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Line = dict[str, Any]
State = dict[str, Any]
Sent = Callable[[str, int, int], None]
"""Called with a run's name, the last step sent and the last step there is."""


def store_uri(configured: str | None) -> str:
    """The MLflow store to use: the configured one, MLFLOW_TRACKING_URI, or a file in the current folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


class Mirror:
    """The MLflow side of one folder, of a run or of a study."""

    def __init__(self, folder: Path, uri: str, experiment: str) -> None:
        """Connect, and make the experiment if there is none.

        Raises:
            Exception: whatever the MLflow client meets on its way to the store.
        """
        for name, value in CLIENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # slow, and only this module needs it

        self.folder, self.uri = folder, uri
        with _alone(uri):
            self.client = MlflowClient(tracking_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            self.experiment = (
                found.experiment_id if found else self.client.create_experiment(experiment, _artifacts(uri))
            )

    def sync(self, *, closing: bool = False, sent: Sent = lambda name, done, total: None) -> None:
        """Send what is new; with `closing`, also artifacts and last status, which a study's runs get as they end."""
        if (self.folder / "run.json").exists():
            self._sync(self.folder, read_info(self.folder), {}, closing, sent)
        if not (self.folder / "study.json").exists():
            return
        study = read_info(self.folder / "study.json")
        parent = self._open(self.folder, study, {})
        for path in sorted(self.folder.glob("runs/*/*/run.json")):
            arm = path.parts[-3]
            tags = {
                "mlflow.runName": f"{arm}/{path.parts[-2]}",
                "mlflow.parentRunId": parent["run_id"],
                "study": study["name"],
                "arm": arm,
                "role": "baseline" if arm == study["baseline"] else "arm",
            }
            info = read_info(path.parent)
            self._sync(path.parent, info, tags, closing or info["status"] != "running", sent)
        if closing:
            lines = [{"step": 0, "seconds": 0.0, **study["metrics"]}] if study.get("metrics") else []
            self._send(self.folder, parent, lines, study, sent)
            self._close(self.folder, parent, study)

    def _sync(self, folder: Path, info: Line, tags: Mapping[str, str], closing: bool, sent: Sent) -> None:
        if info["status"] != "running" and self._state(folder).get("closed") == info["ended"]:
            return
        state = self._open(folder, info, tags)
        self._send(folder, state, list(read_metrics(folder)), info, sent)
        if closing:
            self._close(folder, state, info)

    # -- one MLflow run -----------------------------------------------------------------------------------------------

    def _state(self, folder: Path) -> State:
        path = folder / "mlflow.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        return state if state.get("uri") == self.uri else {"uri": self.uri, "last_step": -1}

    def _keep(self, folder: Path, state: State, **news: Any) -> None:
        state |= news
        write_atomically(folder / "mlflow.json", json.dumps(state, indent=1))

    def _open(self, folder: Path, info: Line, tags: Mapping[str, str]) -> State:
        """The state of the folder's MLflow run, made and described at the first call, reopened after a resume."""
        state = self._state(folder)
        if "run_id" not in state:
            tags = {"mlflow.runName": folder.name, "mlflow.source.name": "gengap_dist", **tags}
            run = self.client.create_run(self.experiment, start_time=_millis(info["started"]), tags=tags)
            self._keep(folder, state, run_id=run.info.run_id, experiment_id=self.experiment)
        if not state.get("described"):
            self._describe(state["run_id"], info)
            self._keep(folder, state, described=True)
        if state.get("tagged") != (starts := 1 + len(info.get("resumed", []))):
            self._tag(state["run_id"], info)
            self._keep(folder, state, tagged=starts)
        if info["status"] == "running" and state.get("closed"):
            self.client.update_run(state["run_id"], status="RUNNING")
            self._keep(folder, state, closed=None)
        return state

    def _describe(self, run_id: str, info: Line) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        settings = flat(info["config"])
        final = {key: value for key, value in settings.items() if not key.startswith(MACHINERY)}  # as params must be
        params = [Param(key, str(value)[:6000]) for key, value in final.items()]
        for at in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[at : at + 100])
        if data := info.get("data"):
            dataset = Dataset(
                name=data["name"],
                digest=data["digest"],
                source_type="local" if data["root"] else "code",
                source=json.dumps({"uri": data["root"] or "gengap_dist/data/digits.npz"}),
                profile=json.dumps({key: data[key] for key in ("num_train", "num_val", "num_test", "num_classes")}),
            )
            context = InputTag(key="mlflow.data.context", value="training")
            self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[context])])

    def _tag(self, run_id: str, info: Line) -> None:
        """Where this start of the run computes: another one may have other ranks."""
        from mlflow.entities import RunTag

        tags = {key: info.get(key) for key in ("world_size", "launcher", "strategy", "device", "seed", "norm_size")} | {
            "mlflow.source.git.commit": (info.get("git") or {}).get("commit"),
            "mlflow.note.content": info.get("question"),
            "batch.global_size": flat(info["config"]).get("batch.global_size"),
        }
        self.client.log_batch(
            run_id, tags=[RunTag(key, str(value)) for key, value in tags.items() if value is not None]
        )

    def _send(self, folder: Path, state: State, lines: list[Line], info: Line, sent: Sent) -> None:
        """Send the lines after the last step sent, in requests of whole lines.

        `in_flight` is on disk before a request leaves: after a crash, its lines are looked up before they are sent
        again.
        """
        from mlflow.entities import Metric

        start, run_id = _millis(info["started"]), state["run_id"]
        for request in _requests(line for line in lines if line["step"] > state["last_step"]):
            last_step, doubtful = request[-1]["step"], state.get("in_flight") or -1
            fresh = [line for line in request if line["step"] > doubtful or not self._arrived(run_id, line)]
            points = [
                Metric(name, value, start + round(line["seconds"] * 1000), line["step"])
                for line in fresh
                for name, value in _values(line).items()
            ]
            self._keep(folder, state, in_flight=last_step)
            for at in range(0, len(points), MAX_REQUEST):
                self.client.log_batch(run_id, metrics=points[at : at + MAX_REQUEST])
            self._keep(folder, state, last_step=last_step, in_flight=None)
            sent(folder.name, last_step, lines[-1]["step"])

    def _arrived(self, run_id: str, line: Line) -> bool:
        name = list(_values(line))[-1]
        return any(metric.step == line["step"] for metric in self.client.get_metric_history(run_id, name))

    def _close(self, folder: Path, state: State, info: Line) -> None:
        """Send artifacts and the final status; a run that still says `running` has lost its driver."""
        run_id = state["run_id"]
        for name in ARTIFACTS:
            path = folder / name
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), name)
            elif path.exists():
                self.client.log_artifact(run_id, str(path))
        self.client.set_tag(run_id, "status", info["status"])
        ended = info.get("ended")
        status = "KILLED" if info["status"] == "running" else STATUS[info["status"]]
        self.client.set_terminated(run_id, status, _millis(ended) if ended else None)
        self._keep(folder, state, closed=ended or "lost")


def _values(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "seconds")}


def _requests(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Whole lines in groups of at most MAX_REQUEST values; a longer line is a group of its own.

    >>> [len(group) for group in _requests(iter([{"step": s, "seconds": 0, "a": 1, "b": 2} for s in range(1001)]))]
    [500, 500, 1]
    """
    group: list[Line] = []
    size = 0
    for line in lines:
        if group and size + len(_values(line)) > MAX_REQUEST:
            yield group
            group, size = [], 0
        group.append(line)
        size += len(_values(line))
    if group:
        yield group


def _millis(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifacts(uri: str) -> str | None:
    """Beside a sqlite store, not in whatever folder a command was started from; a server decides for itself."""
    path = _sqlite_path(uri)
    return path.resolve().with_name("mlartifacts").as_uri() if path else None


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """A fresh sqlite store is built by one process at a time: several at once would break it."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- the process ------------------------------------------------------------------------------------------------------


class Follower:
    """A mirror that runs beside a command, from `start` to `finish`.

    It is no child of the command for long: `ray job stop` kills a job's whole tree within 3 s, and the mirror still has
    to say that the run was killed. It ends when its standard input closes, however the command ends.
    """

    def __init__(self, folder: Path, config: MlflowConfig) -> None:
        """Start mirroring `folder` in a process of its own."""
        self.folder, self.config, self.uri = folder, config, store_uri(config.tracking_uri)
        with (folder / "mlflow.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder), self.uri, config.experiment],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,  # only for its last word
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the command, and the command ends this
            )

    def finish(self) -> str | None:
        """Let it send the rest; None if all is there, else one sentence on what to do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with self._process.stdout as stdout:
            over, _, _ = select.select([stdout], [], [], self.config.wait_seconds)
            if not over:
                os.killpg(self._process.pid, signal.SIGKILL)
            last_word = stdout.read()
        self._process.wait()
        if over and last_word == DONE:
            return None
        reason = (self.folder / "mlflow.log").read_text().strip().splitlines()[-1:] or ["it gave no reason"]
        if not over:
            reason = [f"it is slower than mlflow.wait_seconds ({self.config.wait_seconds:g})"]
        return (
            f"MLflow at {self.uri} did not take everything ({reason[0][:200]}); nothing is lost: "
            f"send the rest later with `gengap report sync {self.folder}`"
        )


def follow(folder: Path, uri: str, experiment: str, *, pause: Callable[[float], bool]) -> None:
    """Mirror until `pause(seconds)` says that the command is over, then once more, to the end.

    Raises:
        Exception: what the last try met, if it failed.
    """
    mirror, wait, over = None, POLL_SECONDS, False
    while not ((folder / "run.json").exists() or (folder / "study.json").exists()):
        if pause(POLL_SECONDS):
            return  # the command found something wrong before it began
    while True:
        try:
            mirror = mirror or Mirror(folder, uri, experiment)
            began = time.monotonic()
            mirror.sync(closing=over)
            wait = min(LONGEST_WAIT, max(POLL_SECONDS, REST * (time.monotonic() - began)))
        except Exception as error:
            if over:
                raise
            print(f"{type(error).__name__}: {error}", flush=True)
            wait = min(LONGEST_WAIT, 2 * wait)
        if over:
            return
        over = pause(wait)


def _stdin_closes_within(seconds: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Mirror a run or study folder to MLflow until standard input closes.")
    for name in ("folder", "uri", "experiment"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    if os.fork():  # the command's child ends here, see Follower
        os._exit(0)
    last_word = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what MLflow prints goes to the log
    fcntl.flock(sys.stderr.fileno(), fcntl.LOCK_EX)  # mlflow.log: the follower of a killed command may still be sending
    os.nice(10)  # training comes first
    try:
        follow(Path(arguments.folder), arguments.uri, arguments.experiment, pause=_stdin_closes_within)
        os.write(last_word, DONE)
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text}", flush=True)


def sync_now(folder: Path, uri: str | None, sent: Sent) -> str:
    """Send everything a folder holds that its MLflow store has not seen; the store's address.

    Raises:
        UsageError: if the folder is no run or study, or the store cannot be reached.
    """
    info = read_info(folder / "study.json" if (folder / "study.json").exists() else folder)
    config = MlflowConfig.model_validate(info["config"]["mlflow"])
    kept = folder / "mlflow.json"
    known = json.loads(kept.read_text())["uri"] if kept.exists() else None
    target: str = uri or os.environ.get("MLFLOW_TRACKING_URI") or known or store_uri(config.tracking_uri)
    try:
        Mirror(folder, target, config.experiment).sync(closing=True, sent=sent)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"MLflow at {target} cannot be reached ({text}): check the address, or start the server"
        ) from None
    return target


if __name__ == "__main__":
    _main()
