"""One MLflow run: of a run folder, of an arm or of a study. mlflow.json in the folder stores what has been sent."""

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gengap_dist.config.identity import declared_effect
from gengap_dist.config.loading import flat
from gengap_dist.config.study import StudyConfig
from gengap_dist.credentials import without_logins
from gengap_dist.errors import UsageError
from gengap_dist.runs.json_lines import SYSTEM, last_step, read_from
from gengap_dist.runs.metrics_tail import Position, read_after
from gengap_dist.runs.run_folder import write_atomically
from gengap_dist.runs.schema import RunInfo, RunStatus, StudyInfo, to_time
from gengap_dist.runs.upload_state import FILE_NAME, read_upload_state
from gengap_dist.tracking.mlflow.client import is_refusal, store_key
from gengap_dist.tracking.mlflow.essential import essential
from gengap_dist.tracking.mlflow.model_files import write_model_files
from gengap_dist.tracking.mlflow.names import mlflow_name, name_tags

MAX_REQUEST = {"metrics": 1000, "params": 100, "tags": 100}  # that MLflow accepts in one request
KEY_TAG = "gengap_key"  # of the run: see MlflowRun
STATUS = {
    RunStatus.RUNNING: "KILLED",  # at the end: its driver was lost
    RunStatus.FINISHED: "FINISHED",
    RunStatus.DIVERGED: "FINISHED",
    RunStatus.FAILED: "FAILED",
    RunStatus.KILLED: "KILLED",
    RunStatus.PREEMPTED: "KILLED",
}
SIZES = ("num_train", "num_val", "num_test", "num_classes")  # of a data set
UNKNOWN_END = "lost"  # end time of a run whose folder has none
ARTIFACTS = ("run.json", "study.json", "config.yaml", "report.html")
ALL_ARTIFACTS = ("test_correct.npy", "spectra", "figures")  # sent as well with `mlflow.metrics=all`
MODEL_NAME = "model"

Line = dict[str, Any]
Metrics = Literal["essential", "all"]
"""`mlflow.metrics`."""
Tags = dict[str, Any]
UploadProgress = Callable[[str, int, int], None]
"""Called with a run's name, the last step sent and the last step recorded."""
LeftOut = Callable[[str, Exception], object]
"""Called with the name of something that is not sent, since it is damaged or MLflow refuses it, and with the reason."""


class Described(NamedTuple):
    """What an MLflow run says about itself."""

    status: RunStatus
    started: str
    ended: str | None
    config: Mapping[str, Any]
    data: Mapping[str, Any] | None

    @classmethod
    def of(cls, info: RunInfo | StudyInfo) -> "Described":
        """The description of a run or a study.

        Raises:
            UsageError: if it does not say when it started.
        """
        if info.started is None:
            raise UsageError(f"{info.file_name} does not say when it started, which MLflow needs: add started")
        data = info.data if isinstance(info, RunInfo) else None
        return cls(info.status, info.started, info.ended, info.config, data)


class MlflowRun:
    """The MLflow run of a folder. Every method may be interrupted at any point and called again.

    mlflow.json gets a random key before the run is created with it as a tag. By this key the run is found if the answer
    to the request was lost, or the process was killed before it had saved the id. A folder may come from anywhere: a
    run is changed or deleted only if it has the folder's key, and taken over or deleted unseen only if it is empty.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        experiment: str,
        folder: Path,
        left_out: LeftOut,
        keys: dict[str, str],
        metrics: Metrics = "all",
    ) -> None:
        """The run that `folder` has in an experiment of the store `uri`; it is created by `open`.

        Args:
            client: MLflow client of the store.
            uri: its address.
            experiment: id of the experiment.
            folder: folder of the run, arm or study.
            left_out: see `LeftOut`.
            keys: keys of MLflow runs by their ids, as far as the store was asked; filled here.
            metrics: what to send of a run that is created, or has less so far; another one keeps what it has.
        """
        self.client, self.experiment, self.folder, self.left_out = client, experiment, folder, left_out
        self._keys = keys
        self.state = _state_of(read_upload_state(folder), uri, experiment)
        self._has_less = self.state.get("sending") == "essential" and metrics == "all"
        self.state.setdefault("sending", "all" if "run_id" in self.state else metrics)  # earlier versions sent all

    @property
    def id(self) -> str:
        """MLflow's id of the run."""
        return self.state["run_id"]

    @property
    def sends_all(self) -> bool:
        """Whether every metric is sent, and more files, see `mlflow.metrics`."""
        return self.state["sending"] == "all"

    def save(self, **news: Any) -> None:
        """Store what has been sent."""
        self.state |= news
        write_atomically(self.folder / FILE_NAME, json.dumps(self.state, indent=1))

    def open(self, described: Described, tags: Tags) -> None:
        """Create the run at the first call, reopen it after a resume, and set its tags."""
        for name in ("run_id", "replaces"):
            if run_id := self.state.get(name):
                self._check_own(run_id)
        if self._has_less:
            self._begin_again()
        if "run_id" not in self.state:
            self._create(described, _tag_strings(tags))
        if old := self.state.get("replaces"):
            self.client.delete_run(old)
            self.save(replaces=None)
        self.set_tags({"mlflow.source.name": "gengap_dist", "folder": self.folder, **tags})
        if not self.state.get("described"):
            self._log_params_and_data(described)
            self.save(described=True)
        if described.status == RunStatus.RUNNING and self.state.get("closed"):
            self.client.update_run(self.id, status="RUNNING")
            self.save(closed=None)

    def _check_own(self, run_id: str) -> None:
        if run_id not in self._keys:
            self._keys[run_id] = self.client.get_run(run_id).data.tags.get(KEY_TAG, "")
        if not self._keys[run_id] or self._keys[run_id] != self.state.get("key"):
            raise UsageError(
                f"{self.folder / FILE_NAME} names the MLflow run {run_id}, which was not created for this folder: "
                "remove the file, and everything is sent again as a new MLflow run"
            )

    def _create(self, described: Described, tags: dict[str, str]) -> None:
        """Create the run, unless an earlier attempt has. Other tags follow: one that is refused must not prevent it."""
        found = self._empty_runs_with_key()
        if not found:
            self.save(key=self.state.get("key") or uuid.uuid4().hex)
            if old := self.state.get("replaces"):
                tags = self.client.get_run(old).data.tags
            else:
                tags = {name: tags[name] for name in ("mlflow.runName", "mlflow.parentRunId") if name in tags}
            tags = {**tags, KEY_TAG: self.state["key"]}
            found = [self.client.create_run(self.experiment, start_time=millis(described.started), tags=tags)]
        self.save(run_id=found[0].info.run_id, tags=dict(found[0].data.tags))

    def _empty_runs_with_key(self) -> list[Any]:
        """Runs to which nothing was sent since they were created; the client repeats a request that gets no answer."""
        if "key" not in self.state:
            return []
        found = self.client.search_runs([self.experiment], f"tags.`{KEY_TAG}` = '{self.state['key']}'")
        named = (self.state.get("run_id"), self.state.get("replaces"))
        return [run for run in found if run.info.run_id not in named and not run.data.params and not run.data.metrics]

    def replace(self, described: Described) -> None:
        """Start a new run with the tags of the old one, which is deleted: MLflow cannot replace values."""
        old = self.state.pop("run_id")
        self.save(replaces=old, described=False, closed=None)
        self.open(described, {})

    def _begin_again(self) -> None:
        """Start a new run of which all is sent, as `replace`."""
        kept = {name: self.state.get(name) for name in ("store", "experiment_id", "uri", "elsewhere", "key")}
        old = self.state.get("run_id")
        self.state, self._has_less = {**kept, "last_step": -1, "sending": "all"}, False
        self.save(replaces=old)

    def set_tags(self, tags: Tags) -> None:
        """Set the tags that are new or have changed."""
        from mlflow.entities import RunTag

        known = self.state.get("tags", {})
        if changed := dict(_tag_strings(tags).items() - known.items()):
            self._log("tags", [RunTag(key, value) for key, value in changed.items()])
            self.save(tags=known | changed)

    def _log(self, kind: Literal["metrics", "params", "tags"], entities: Sequence[Any]) -> None:
        """Send metrics, params or tags; those that the store refuses are left out."""
        size = MAX_REQUEST[kind]
        for at in range(0, len(entities), size):
            self._log_request(kind, entities[at : at + size])

    def _log_request(self, kind: str, entities: Sequence[Any]) -> None:
        """Send one request; if it is refused, its halves, down to the single value that is refused."""
        try:
            self.client.log_batch(self.id, **{kind: entities})
        except Exception as error:
            self._raise_unless_refused(error)
            if (half := len(entities) // 2) == 0:
                self.left_out(f"{kind} {entities[0].key} of {self.folder}", error)
            else:
                self._log_request(kind, entities[:half])
                self._log_request(kind, entities[half:])

    def _raise_unless_refused(self, error: Exception) -> None:
        """Return if the store refuses a value, and not everything because the run was deleted."""
        if not is_refusal(error) or self.client.get_run(self.id).info.lifecycle_stage != "active":
            raise error

    def _log_params_and_data(self, described: Described) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        settings = flat(described.config)
        final = {  # params cannot change
            key: value for key, value in settings.items() if declared_effect(key, StudyConfig) != "runtime"
        }
        self._log("params", [Param(mlflow_name(key), str(value)[:6000]) for key, value in final.items()])
        if data := described.data:
            name = data.get("name") or "unknown"
            dataset = Dataset(
                name=name,
                digest=data.get("digest") or "unknown",
                source_type="local" if data.get("root") else "code",
                source=json.dumps(
                    {"uri": data.get("root") or ("gengap_dist/data/digits.npz" if name == "digits" else name)}
                ),
                profile=json.dumps({key: data.get(key) for key in SIZES}),
            )
            context = InputTag(key="mlflow.data.context", value="training")
            try:
                self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, tags=[context])])
            except Exception as error:
                self._raise_unless_refused(error)
                self.left_out(f"the data set of {self.folder}", error)

    # -- metrics ------------------------------------------------------------------------------------------------------

    def send_lines(self, lines: Iterable[Line], started: str) -> None:
        """Send lines of metrics, at the times at which they were recorded."""
        from mlflow.entities import Metric

        start = millis(started)
        self.send_points([
            Metric(mlflow_name(name), value, start + round(line.get("seconds", 0.0) * 1000), line["step"])
            for line in map(self._chosen, lines)
            for name, value in _metric_values(line).items()
        ])  # fmt: skip

    def _chosen(self, line: Line) -> Line:
        """The part of a line that is sent."""
        kept = {"step", "seconds", *(line if self.sends_all else essential(_metric_values(line)))}
        return {name: value for name, value in line.items() if name in kept}

    def send_points(self, points: list[Any]) -> None:
        """Send MLflow's metrics."""
        self._log("metrics", points)

    def send_metrics(self, started: str, progress: UploadProgress) -> None:
        """Send the lines of metrics.jsonl after the last step sent, in requests of whole lines.

        `in_flight`, the last step of a request, is written to disk before the request is sent: after a crash, MLflow is
        asked for the lines up to it before they are sent again.
        """
        path, state = self.folder / "metrics.jsonl", self.state
        new_lines = ((self._chosen(line), at) for line, at in read_after(path, Position(*state.get("position", ()))))
        for lines, position in _requests(new_lines, sent=state["last_step"]):
            if lines:
                last, in_flight = lines[-1]["step"], state.get("in_flight")
                uncertain = -1 if in_flight is None else in_flight
                unsent = [line for line in lines if line["step"] > uncertain or not self._was_received(line)]
                self.set_tags(name_tags({name for line in lines for name in _metric_values(line)}))
                self.save(in_flight=max(last, uncertain))
                self.send_lines(unsent, started)
                self.save(last_step=last, in_flight=uncertain if uncertain > last else None, position=position)
                progress(self.folder.name, last, last_step(path) or last)
            else:  # a resumed run has written again what was sent before
                self.save(position=position)

    def _was_received(self, line: Line) -> bool:
        values = [*_metric_values(line)]
        if not values:
            return True
        name = mlflow_name(values[-1])
        return any(metric.step == line["step"] for metric in self.client.get_metric_history(self.id, name))

    def send_system(self) -> None:
        """Send system metrics of the nodes, if all is sent; the step is its number, so that it is sent once."""
        from mlflow.entities import Metric

        for path in sorted(self.folder.glob("system*.jsonl")) if self.sends_all else ():
            sent = self.state.get("samples", {})
            number, end = sent.get(path.name, (0, 0))
            prefix = "/".join(filter(None, ("system", path.stem.removeprefix("system").lstrip("_"))))
            points = []
            damaged = partial(self.left_out, f"a line of {path}")
            for sample, after in read_from(path, end, damaged, kind=SYSTEM):
                timestamp, end = sample.pop("time"), after
                points += [Metric(mlflow_name(f"{prefix}/{name}"), sample[name], timestamp, number) for name in sample]
                number += 1
            if points:
                self.send_points(points)
                self.save(samples=sent | {path.name: (number, end)})

    # -- model and end ------------------------------------------------------------------------------------------------

    def send_model(self, info: RunInfo) -> None:
        """Upload the exported model of a run; without one, a tag says why."""
        if self.state.get("model_logged"):
            return
        model, reason = info.model, info.model_error
        if model and not (self.folder / model.file).exists():
            model, reason = None, f"{model.file} is missing"
        if reason:
            self.set_tags({"model": f"not logged: {reason[:400]}"})
        if model is None:
            return
        from mlflow.entities import LoggedModelOutput

        model_id = self._create_model()
        with tempfile.TemporaryDirectory() as temporary:
            files = Path(temporary) / MODEL_NAME
            write_model_files(
                self.folder / model.file, model, info.versions.get("python", "3"), files, model_id, self.id
            )
            self.client.log_model_artifacts(model_id, str(files))
        self.client.finalize_logged_model(model_id, "READY")
        outputs = self.client.get_run(self.id).outputs
        if not outputs or model_id not in {output.model_id for output in outputs.model_outputs}:
            self.client.log_outputs(self.id, [LoggedModelOutput(model_id, info.result.get("num_steps") or 0)])
        self.save(model_id=model_id, model_logged=True)

    def _create_model(self) -> str:
        """Create the model of the run, unless an earlier attempt has; returns its id."""
        query = f"name = '{MODEL_NAME}' AND source_run_id = '{self.id}'"
        models = partial(self.client.search_logged_models, [self.experiment], query)
        if not models():
            self.client.create_logged_model(self.experiment, MODEL_NAME, self.id)
        first, *others = models()
        for other in others:  # the client repeats a request that gets no answer
            self.client.delete_logged_model(other.model_id)
        return first.model_id

    def terminate(self, described: Described) -> None:
        """Set the final status; a run whose status is still `running` has lost its driver."""
        for other in self._empty_runs_with_key():
            self.client.delete_run(other.info.run_id)
        end = round(time.time() * 1000) if described.ended is None else millis(described.ended)
        end = max(end, millis(described.started))  # the clock may have been set back
        self.client.set_terminated(self.id, STATUS[described.status], end)

    def send_files(self) -> None:
        """Send the files that MLflow shows with the run."""
        for name in (*ARTIFACTS, *(ALL_ARTIFACTS if self.sends_all else ())):
            path = self.folder / name
            if path.is_dir():
                self.client.log_artifacts(self.id, str(path), name)
            elif path.exists():
                self.client.log_artifact(self.id, str(path))

    def mark_closed(self, described: Described) -> None:
        """Note that everything was sent, see `is_closed`."""
        self.save(closed=described.ended or UNKNOWN_END)

    def is_closed(self, ended: str | None) -> bool:
        """Whether everything of a run that ended at `ended` was sent."""
        return self.state.get("closed") == (ended or UNKNOWN_END)


def _state_of(saved: dict[str, Any], uri: str, experiment: str) -> dict[str, Any]:
    """What was sent to an experiment of a store; what was sent elsewhere is kept in `elsewhere`.

    >>> first = _state_of({}, "http://localhost/", "1") | {"last_step": 7, "experiment_id": "1"}
    >>> second = _state_of(first, "http://example.com", "1")
    >>> second["last_step"], _state_of(second, "http://me@127.0.0.1:80", "1")["last_step"]
    (-1, 7)
    """
    place = {"store": store_key(uri), "experiment_id": experiment}
    states = [saved, *saved.pop("elsewhere", [])] if saved else []

    def is_here(state: Mapping[str, Any]) -> bool:
        store = state.get("store") or store_key(state["uri"])  # an earlier version wrote the URI alone
        return place == {"store": store, "experiment_id": state["experiment_id"]}

    here = next(filter(is_here, states), {"last_step": -1})
    elsewhere = [{**state, "uri": without_logins(state["uri"])} for state in states if state is not here]
    return {**here, **place, "uri": without_logins(uri), "elsewhere": elsewhere}


def _tag_strings(tags: Tags) -> dict[str, str]:
    """Tags as strings, without those that are None."""
    return {key: str(value) for key, value in tags.items() if value is not None}


def _metric_values(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "seconds")}


def _requests(lines: Iterable[tuple[Line, Position]], sent: int) -> Iterator[tuple[list[Line], Position]]:
    """Group the lines after step `sent` into requests of at most 1,000 values, each with its last position.

    A longer line is a request of its own. The last one may be empty.

    >>> lines = [({"step": s, "seconds": 0, "a": 1, "b": 2}, Position(step=s)) for s in range(1001)]
    >>> [(len(group), at.step) for group, at in _requests(lines, sent=-1)]
    [(500, 499), (500, 999), (1, 1000)]
    >>> [(len(group), at.step) for group, at in _requests(lines[:10], sent=20)]
    [(0, 9)]
    """
    group: list[Line] = []
    size, position = 0, None
    try:
        for line, line_position in lines:
            if line["step"] > sent:
                num_values = len(_metric_values(line))
                if group and position and size + num_values > MAX_REQUEST["metrics"]:
                    yield group, position
                    group, size = [], 0
                group.append(line)
                size += num_values
            position = line_position
    except UsageError:  # a damaged line: those before it are sent
        if position:
            yield group, position
        raise
    if position:
        yield group, position


def millis(iso: str) -> int:
    """MLflow's form of a time."""
    return round(to_time(iso).timestamp() * 1000)
