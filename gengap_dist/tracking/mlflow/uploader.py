"""Uploads a run folder or a study folder to MLflow runs.

A study is a parent run, its arms are children, their seeds grandchildren. `mlflow.json` beside each run.json, in the
folder of each arm and beside study.json stores what has been sent, so nothing is sent twice. `MlflowUploader.sync` may
be interrupted at any point and called again.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.identity import declared_effect, treatment
from gengap_dist.config.loading import flat
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import UsageError
from gengap_dist.runs.run_folder import (
    DIVERGED,
    FAILED,
    FINISHED,
    KILLED,
    PREEMPTED,
    RUNNING,
    SeedRun,
    read_info,
    read_lines,
    read_metrics,
    read_metrics_table,
    write_atomically,
)
from gengap_dist.tracking.mlflow.names import mlflow_name, name_tags

if TYPE_CHECKING:  # numpy, which the command that starts the uploader does not need
    from gengap_dist.runs.metrics_table import MetricsTable

MAX_REQUEST = 1000  # metrics that MLflow accepts in one request
STATUS = {
    RUNNING: "KILLED",  # at the end: its driver was lost
    FINISHED: "FINISHED",
    DIVERGED: "FINISHED",
    FAILED: "FAILED",
    KILLED: "KILLED",
    PREEMPTED: "KILLED",
}
ENDED = (FINISHED, DIVERGED, FAILED)  # final statuses, of successful and failed runs
WORST_FIRST = (RUNNING, KILLED, PREEMPTED, FAILED, DIVERGED)
UNKNOWN_END = "lost"  # end time of a run whose folder has none
ARTIFACTS = ("run.json", "study.json", "config.yaml", "spectra", "figures", "report.html")
MODEL_NAME = "model"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # the UI shows runs and charts first, not prompts
CLIENT_DEFAULTS = {  # a dead server must be detected in seconds; with MLflow's defaults it takes minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

Line = dict[str, Any]
State = dict[str, Any]
Runs = Mapping[Path, Line]
"""Folder to run.json."""
Tags = dict[str, Any]
UploadProgress = Callable[[str, int, int], None]
"""Called with a run's name, the last step sent and the last step recorded."""


class UploadCallbacks(NamedTuple):
    """Functions of other packages that compute additional content for MLflow."""

    aggregate_seeds: Callable[[Sequence[SeedRun], Sequence[SeedRun]], list[Line]]
    """Aggregate the runs of an arm, and of the baseline, into lines of metrics."""
    export_model: Callable[..., None]
    """Export a finished run's model: `export_model(folder, info, to, model_id=..., run_id=...)`."""
    prepare_export: Callable[[], object]
    """Import the dependencies of `export_model`, which takes seconds."""


def store_uri(configured: str | None) -> str:
    """The MLflow store to use: the configured one, MLFLOW_TRACKING_URI, or a file in the current folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def comparison_path(folder: Path) -> str:
    """Path, after the host, of the UI's comparison of a study's arms; empty if there are no arms yet."""
    paths = (folder / "runs" / arm / "mlflow.json" for arm in read_info(folder / "study.json")["arms"])
    states = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not states:
        return ""
    runs, experiments = ([*dict.fromkeys(s[key] for s in states)] for key in ("run_id", "experiment_id"))
    return f"#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps(experiments))}"


def import_client() -> Callable[..., Any]:
    """Import MLflow, which takes seconds; returns its client class."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    with fast_imports():
        from mlflow import MlflowClient
    return MlflowClient


def connect_client(uri: str) -> Any:
    """An MLflow client that gives up on a dead server within seconds."""
    client = import_client()
    with fast_imports():  # it imports the store's dependencies, and creates a file store
        return client(tracking_uri=uri)


class MlflowUploader:
    """Uploads one folder, of a run or of a study."""

    def __init__(self, folder: Path, uri: str, experiment: str, callbacks: UploadCallbacks) -> None:
        """Connect, and create the experiment if it does not exist.

        Raises:
            Exception: any error of the MLflow client.
        """
        self.folder, self.uri, self.callbacks = folder, uri, callbacks
        with _exclusive_lock(uri):
            self.client = connect_client(uri)
            existing = self.client.get_experiment_by_name(experiment)
            self.experiment = (
                existing.experiment_id
                if existing
                else self.client.create_experiment(experiment, _artifact_location(uri), EXPERIMENT_TAGS)
            )

    def sync(self, *, closing: bool = False, progress: UploadProgress = lambda name, done, total: None) -> None:
        """Send what is new; with `closing`, also artifacts and final status, which a study's runs get when they end."""
        if (self.folder / "run.json").exists():
            self._sync_run(self.folder, read_info(self.folder), {"mlflow.runName": self.folder.name}, closing, progress)
        if (self.folder / "study.json").exists():
            self._sync_study(read_info(self.folder / "study.json"), closing, progress)

    # -- a study, its arms, its runs ----------------------------------------------------------------------------------

    def _sync_study(self, study: Line, closing: bool, progress: UploadProgress) -> None:
        tune = study["config"]["study"].get("tune") or {}
        shared = {"study": study["name"], "tuned": ",".join(tune.get("space", ())) or None}
        # with the time, because names of studies need not be unique
        name = f"{study['name']} {datetime.fromisoformat(study['started']):%Y-%m-%d %H:%M:%S}"
        own = {"mlflow.runName": name, "level": "study", "status": study["status"]}
        parent = self._open_run(self.folder, study, shared | own)
        shared["study_run_id"] = parent["run_id"]
        arms = {arm: self._arm_runs(arm, study["seeds"], closing) for arm in study["arms"]}
        baseline = arms.get(study["baseline"], {})
        reference = next((_flat_config(info) for info in baseline.values()), None)
        for arm, runs in arms.items():
            if not runs:
                continue
            first = next(iter(runs.values()))
            tags = shared | {
                "arm": arm,
                "role": "baseline" if runs is baseline else "arm",
                "batch.global_size": first["config"]["batch"]["global_size"],
                "treatment": treatment(_flat_config(first), reference) if reference else None,
            }
            arm_run_id = self._sync_arm(runs, None if runs is baseline else baseline, study, tags, closing)
            for path, info in runs.items():
                own = {"mlflow.runName": f"{arm}/{path.name}", "mlflow.parentRunId": arm_run_id, "level": "seed"}
                self._sync_run(path, info, tags | own, closing or info["status"] != RUNNING, progress)
        self._set_tags(self.folder, parent, {"mlflow.note.content": _study_note(study, comparison_path(self.folder))})
        if closing:
            self._send_headline(parent, study)
            self._close_run(self.folder, parent, study)

    def _arm_runs(self, arm: str, seeds: Sequence[int], closing: bool) -> dict[Path, Line]:
        """Folder to run.json of the arm's runs; an unreadable one is skipped, with a message in the log."""
        out: dict[Path, Line] = {}
        for path in sorted((self.folder / "runs" / arm).glob("*/run.json")):
            try:
                info = read_info(path.parent)
                if info["config"]["seed"] in seeds:  # otherwise the study no longer contains it
                    out[path.parent] = info
            except UsageError as error:
                if closing:
                    print(error, flush=True)
        return out

    def _sync_arm(self, runs: Runs, baseline: Runs | None, study: Line, tags: Tags, closing: bool) -> str:
        """Send the aggregate over an arm's seeds once all have ended; returns the id of the arm's MLflow run.

        MLflow keeps the history of sent values, so they cannot be replaced. If seeds change later, the arm gets a new
        MLflow run with the old one's tags, and the old run is deleted (moved to MLflow's trash).
        """
        num_seeds, ended = len(study["seeds"]), _all_ended(runs, len(study["seeds"]))
        over = ended or closing or study["status"] != RUNNING
        counts = Counter(info["status"] for info in runs.values())
        worst = next((status for status in WORST_FIRST if counts[status]), FINISHED)
        path, first = next(iter(runs.items()))
        folder = path.parent
        info = {
            "status": RUNNING if not over else KILLED if len(runs) < num_seeds else worst,
            "started": min(info["started"] for info in runs.values()),
            "ended": max(info.get("ended", "") for info in runs.values()),
            "config": {key: value for key, value in first["config"].items() if key != "seed"},
            "data": first["data"],
        }
        counts["not started"] = num_seeds - len(runs)
        own = {
            "mlflow.runName": folder.name,
            "mlflow.parentRunId": tags["study_run_id"],
            "level": "arm",
            "status": info["status"],
            "runs": ", ".join(f"{number} {status}" for status, number in sorted(counts.items()) if number > 0),
        }
        state = self._open_run(folder, info, {**tags, **own})
        if ended and (closing or baseline is None or _all_ended(baseline, num_seeds)):
            baseline_runs = baseline or {}
            made_of = {
                str(p.relative_to(folder.parent)): i["ended"]
                for p, i in {**baseline_runs, **runs}.items()
                if "ended" in i
            }
            if state.get("made_of", made_of) != made_of:
                state = self._replace_run(folder, state, info)
            if state.get("made_of") != made_of:
                self._save_state(folder, state, made_of=made_of, summed=False)
            if not state["summed"]:
                arm, against = (
                    [SeedRun(info, _history(path, info)) for path, info in of.items()] for of in (runs, baseline_runs)
                )
                self._log_metrics(state["run_id"], _mlflow_metrics(self.callbacks.aggregate_seeds(arm, against), info))
                self._save_state(folder, state, summed=True)
        if over and state.get("closed") != (info["ended"] or UNKNOWN_END):
            self._close_run(folder, state, info)
        return state["run_id"]

    def _replace_run(self, folder: Path, state: State, info: Line) -> State:
        old, tags = state["run_id"], self.client.get_run(state["run_id"]).data.tags
        new = self.client.create_run(self.experiment, start_time=_millis(info["started"]), tags=tags)
        self._save_state(folder, state, run_id=new.info.run_id, described=False, closed=None)
        self.client.delete_run(old)
        return self._open_run(folder, info, state["tags"])

    def _send_headline(self, parent: State, study: Line) -> None:
        """Send the study's own metrics; MLflow shows the last value sent."""
        from mlflow.entities import Metric

        metrics = {mlflow_name(name): value for name, value in (study.get("metrics") or {}).items()}
        before = parent.get("metrics", {})
        timestamp = _millis(study["ended"]) if "ended" in study else 0
        self._log_metrics(
            parent["run_id"], [Metric(k, v, timestamp, 0) for k, v in metrics.items() if before.get(k) != v]
        )
        self._save_state(self.folder, parent, metrics=metrics)

    def _sync_run(self, folder: Path, info: Line, tags: Tags, closing: bool, progress: UploadProgress) -> None:
        state = self._open_run(folder, info, {"level": "run"} | _run_tags(info) | tags)
        if info["status"] != RUNNING and state.get("closed") == info["ended"]:
            return
        self._send_metrics(folder, state, list(read_metrics(folder)), info, progress)
        self._send_system(folder, state)
        self._send_model(folder, state, info)
        if closing:
            self._close_run(folder, state, info)

    # -- one MLflow run -----------------------------------------------------------------------------------------------

    def _read_state(self, folder: Path) -> State:
        path = folder / "mlflow.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        return state if state.get("uri") == self.uri else {"uri": self.uri, "last_step": -1}

    def _save_state(self, folder: Path, state: State, **news: Any) -> None:
        state |= news
        write_atomically(folder / "mlflow.json", json.dumps(state, indent=1))

    def _open_run(self, folder: Path, info: Line, tags: Tags) -> State:
        """The state of the folder's MLflow run, which is created at the first call and reopened after a resume."""
        state = self._read_state(folder)
        if "run_id" not in state:
            initial = _tag_strings({"mlflow.source.name": "gengap_dist", "folder": folder, **tags})
            run = self.client.create_run(self.experiment, start_time=_millis(info["started"]), tags=initial)
            self._save_state(folder, state, run_id=run.info.run_id, experiment_id=self.experiment, tags=initial)
        self._set_tags(folder, state, tags)
        if not state.get("described"):
            self._log_params_and_data(state["run_id"], info)
            self._save_state(folder, state, described=True)
        if info["status"] == RUNNING and state.get("closed"):
            self.client.update_run(state["run_id"], status="RUNNING")
            self._save_state(folder, state, closed=None)
        return state

    def _set_tags(self, folder: Path, state: State, tags: Tags) -> None:
        """Set the tags that are new or have changed."""
        from mlflow.entities import RunTag

        known = state.get("tags", {})
        if changed := dict(_tag_strings(tags).items() - known.items()):
            entities = [RunTag(key, value) for key, value in changed.items()]
            for at in range(0, len(entities), 100):
                self.client.log_batch(state["run_id"], tags=entities[at : at + 100])
            self._save_state(folder, state, tags=known | changed)

    def _log_params_and_data(self, run_id: str, info: Line) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        settings = flat(info["config"])
        final = {  # params cannot change
            key: value for key, value in settings.items() if declared_effect(key, StudyConfig) != "runtime"
        }
        params = [Param(mlflow_name(key), str(value)[:6000]) for key, value in final.items()]
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

    def _send_metrics(
        self, folder: Path, state: State, lines: list[Line], info: Line, progress: UploadProgress
    ) -> None:
        """Send the lines after the last step sent, in requests of whole lines.

        `in_flight` is written to disk before a request is sent: after a crash, MLflow is asked for these lines before
        they are sent again.
        """
        for request in _requests(line for line in lines if line["step"] > state["last_step"]):
            last_step, uncertain = request[-1]["step"], state.get("in_flight") or -1
            unsent = [
                line for line in request if line["step"] > uncertain or not self._was_received(state["run_id"], line)
            ]
            self._set_tags(folder, state, name_tags({name for line in request for name in _metric_values(line)}))
            self._save_state(folder, state, in_flight=last_step)
            self._log_metrics(state["run_id"], _mlflow_metrics(unsent, info))
            self._save_state(folder, state, last_step=last_step, in_flight=None)
            progress(folder.name, last_step, lines[-1]["step"])

    def _was_received(self, run_id: str, line: Line) -> bool:
        name = mlflow_name(list(_metric_values(line))[-1])
        return any(metric.step == line["step"] for metric in self.client.get_metric_history(run_id, name))

    def _send_system(self, folder: Path, state: State) -> None:
        """Send system metrics of the nodes; the step is the sample's number, so a sample sent twice is one point."""
        from mlflow.entities import Metric

        for path in sorted(folder.glob("system*.jsonl")):
            done, lines = state.get("system", {}), list(read_lines(path))
            prefix = "/".join(filter(None, ("system", path.stem.removeprefix("system").lstrip("_"))))
            points = [
                Metric(mlflow_name(f"{prefix}/{name}"), value, line["time"], step)
                for step, line in enumerate(lines)
                if step >= done.get(path.name, 0)
                for name, value in line.items()
                if name != "time"
            ]
            if points:
                self._log_metrics(state["run_id"], points)
                self._save_state(folder, state, system=done | {path.name: len(lines)})

    def _log_metrics(self, run_id: str, points: list[Any]) -> None:
        for at in range(0, len(points), MAX_REQUEST):
            self.client.log_batch(run_id, metrics=points[at : at + MAX_REQUEST])

    def _send_model(self, folder: Path, state: State, info: Line) -> None:
        """Log the final model of a finished run; if the export fails, the upload continues."""
        trained = info["status"] == FINISHED and info["launcher"] != "probe"
        if not trained or not info["config"]["mlflow"].get("log_model") or state.get("model_logged"):
            return
        from mlflow.entities import LoggedModelOutput

        if "model_id" not in state:
            logged = self.client.create_logged_model(self.experiment, MODEL_NAME, state["run_id"])
            self._save_state(folder, state, model_id=logged.model_id)
        model_id = state["model_id"]
        with tempfile.TemporaryDirectory() as temporary:
            files = Path(temporary) / MODEL_NAME
            try:
                self.callbacks.export_model(folder, info, files, model_id=model_id, run_id=state["run_id"])
            except Exception as error:  # with a user's own model torch.export may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: the model of {folder} could not be exported: {reason}", flush=True)
                self._set_tags(folder, state, {"model": f"not logged: {reason[:400]}"})
                self.client.finalize_logged_model(model_id, "FAILED")
            else:
                self.client.log_model_artifacts(model_id, str(files))
                self.client.finalize_logged_model(model_id, "READY")
                output = LoggedModelOutput(model_id, info["result"]["num_steps"])
                self.client.log_outputs(state["run_id"], [output])
        self._save_state(folder, state, model_logged=True)

    def _close_run(self, folder: Path, state: State, info: Line) -> None:
        """Send artifacts and the final status; a run whose status is still `running` has lost its driver."""
        run_id = state["run_id"]
        for name in ARTIFACTS:
            path = folder / name
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), name)
            elif path.exists():
                self.client.log_artifact(run_id, str(path))
        ended = info.get("ended")
        self.client.set_terminated(run_id, STATUS[info["status"]], _millis(ended) if ended else None)
        self._save_state(folder, state, closed=ended or UNKNOWN_END)


def _run_tags(info: Line) -> dict[str, object]:
    """Tags that describe this start of a run; a later start may have other ranks."""
    names = ("status", "world_size", "launcher", "strategy", "device", "seed", "norm_size")
    return {name: info.get(name) for name in names} | {
        "mlflow.source.git.commit": (info.get("git") or {}).get("commit"),
        "batch.global_size": info["config"]["batch"]["global_size"],
    }


def _flat_config(info: Line) -> dict[str, Any]:
    return flat(info["config"])


def _tag_strings(tags: Tags) -> dict[str, str]:
    """Tags as strings, without those that are None."""
    return {key: str(value) for key, value in tags.items() if value is not None}


def _all_ended(runs: Runs, num_seeds: int) -> bool:
    return len(runs) >= num_seeds and all(info["status"] in ENDED for info in runs.values())


def _history(folder: Path, info: Line) -> "MetricsTable":
    from gengap_dist.runs.metrics_table import to_table

    return read_metrics_table(folder) if info["status"] == FINISHED else to_table(())


def _study_note(study: Line, link: str) -> str:
    """The description of a study in the UI, in Markdown: question, verdicts, and link to the comparison of arms."""
    verdicts = "\n".join(f"- {sentence}" for sentence in study.get("verdicts", []))
    compared = f"[Compare the arms]({link})" if link else ""
    return "\n\n".join(filter(None, (study["question"], verdicts, compared)))


def _mlflow_metrics(lines: Iterable[Line], info: Line) -> list[Any]:
    """MLflow metrics of lines of metrics.jsonl, with the time of recording."""
    from mlflow.entities import Metric

    start = _millis(info["started"])
    return [
        Metric(mlflow_name(name), value, start + round(line["seconds"] * 1000), line["step"])
        for line in lines
        for name, value in _metric_values(line).items()
    ]


def _metric_values(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "seconds")}


def _requests(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Group lines into requests of at most MAX_REQUEST values; a longer line is a group of its own.

    >>> [len(group) for group in _requests(iter([{"step": s, "seconds": 0, "a": 1, "b": 2} for s in range(1001)]))]
    [500, 500, 1]
    """
    group: list[Line] = []
    size = 0
    for line in lines:
        if group and size + len(_metric_values(line)) > MAX_REQUEST:
            yield group
            group, size = [], 0
        group.append(line)
        size += len(_metric_values(line))
    if group:
        yield group


def _millis(iso: str) -> int:
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


# -- a store in a file ------------------------------------------------------------------------------------------------


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str) -> str | None:
    """A folder beside a sqlite store, independent of the current folder; None: a server decides."""
    path = _sqlite_path(uri)
    return path.resolve().with_name("mlartifacts").as_uri() if path else None


@contextlib.contextmanager
def _exclusive_lock(uri: str) -> Iterator[None]:
    """Context in which only one process initializes a sqlite store: several at once would break it."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
