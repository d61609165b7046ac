"""One MLflow run: of a run folder, of an arm or of a study. mlflow.json in the folder stores what has been sent."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.identity import declared_effect
from gengap_dist.config.loading import flat
from gengap_dist.config.study import StudyConfig
from gengap_dist.runs.metrics_tail import Position, read_after
from gengap_dist.runs.run_folder import last_step, read_from, write_atomically
from gengap_dist.runs.schema import RunInfo, RunStatus, StudyInfo
from gengap_dist.tracking.mlflow.model_files import write_model_files
from gengap_dist.tracking.mlflow.names import mlflow_name, name_tags

MAX_REQUEST = 1000  # metrics that MLflow accepts in one request
STATUS = {
    RunStatus.RUNNING: "KILLED",  # at the end: its driver was lost
    RunStatus.FINISHED: "FINISHED",
    RunStatus.DIVERGED: "FINISHED",
    RunStatus.FAILED: "FAILED",
    RunStatus.KILLED: "KILLED",
    RunStatus.PREEMPTED: "KILLED",
}
UNKNOWN_END = "lost"  # end time of a run whose folder has none
ARTIFACTS = ("run.json", "study.json", "config.yaml", "test_correct.npy", "spectra", "figures", "report.html")
MODEL_NAME = "model"

Line = dict[str, Any]
Tags = dict[str, Any]
UploadProgress = Callable[[str, int, int], None]
"""Called with a run's name, the last step sent and the last step recorded."""


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
            ValueError: if it does not say when it started.
        """
        if info.started is None:
            raise ValueError(f"{info.file_name} does not say when it started: MLflow needs that")
        data = info.data if isinstance(info, RunInfo) else None
        return cls(info.status, info.started, info.ended, info.config, data)


class MlflowRun:
    """The MLflow run of a folder. Every method may be interrupted at any point and called again."""

    def __init__(self, client: Any, uri: str, experiment: str, folder: Path) -> None:
        """The run that `folder` has in the store `uri`; it is created by `open`."""
        self.client, self.experiment, self.folder = client, experiment, folder
        path = folder / "mlflow.json"
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.state: dict[str, Any] = state if state.get("uri") == uri else {"uri": uri, "last_step": -1}

    @property
    def id(self) -> str:
        """MLflow's id of the run."""
        return self.state["run_id"]

    def save(self, **news: Any) -> None:
        """Store what has been sent."""
        self.state |= news
        write_atomically(self.folder / "mlflow.json", json.dumps(self.state, indent=1))

    def open(self, described: Described, tags: Tags) -> None:
        """Create the run at the first call, reopen it after a resume, and set its tags."""
        if "run_id" not in self.state:
            initial = _tag_strings({"mlflow.source.name": "gengap_dist", "folder": self.folder, **tags})
            run = self.client.create_run(self.experiment, start_time=millis(described.started), tags=initial)
            self.save(run_id=run.info.run_id, experiment_id=self.experiment, tags=initial)
        self.set_tags(tags)
        if not self.state.get("described"):
            self._log_params_and_data(described)
            self.save(described=True)
        if described.status == RunStatus.RUNNING and self.state.get("closed"):
            self.client.update_run(self.id, status="RUNNING")
            self.save(closed=None)

    def replace(self, described: Described) -> None:
        """Start a new run with the tags of the old one, which is deleted: MLflow cannot replace values."""
        old, tags = self.id, self.client.get_run(self.id).data.tags
        new = self.client.create_run(self.experiment, start_time=millis(described.started), tags=tags)
        self.save(run_id=new.info.run_id, described=False, closed=None)
        self.client.delete_run(old)
        self.open(described, self.state["tags"])

    def set_tags(self, tags: Tags) -> None:
        """Set the tags that are new or have changed."""
        from mlflow.entities import RunTag

        known = self.state.get("tags", {})
        if changed := dict(_tag_strings(tags).items() - known.items()):
            entities = [RunTag(key, value) for key, value in changed.items()]
            for at in range(0, len(entities), 100):
                self.client.log_batch(self.id, tags=entities[at : at + 100])
            self.save(tags=known | changed)

    def _log_params_and_data(self, described: Described) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        settings = flat(described.config)
        final = {  # params cannot change
            key: value for key, value in settings.items() if declared_effect(key, StudyConfig) != "runtime"
        }
        params = [Param(mlflow_name(key), str(value)[:6000]) for key, value in final.items()]
        for at in range(0, len(params), 100):
            self.client.log_batch(self.id, params=params[at : at + 100])
        if data := described.data:
            dataset = Dataset(
                name=data["name"],
                digest=data["digest"],
                source_type="local" if data["root"] else "code",
                source=json.dumps({"uri": data["root"] or "gengap_dist/data/digits.npz"}),
                profile=json.dumps({key: data[key] for key in ("num_train", "num_val", "num_test", "num_classes")}),
            )
            context = InputTag(key="mlflow.data.context", value="training")
            self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, tags=[context])])

    # -- metrics ------------------------------------------------------------------------------------------------------

    def send_lines(self, lines: Iterable[Line], started: str) -> None:
        """Send lines of metrics, at the times at which they were recorded."""
        from mlflow.entities import Metric

        start = millis(started)
        self.send_points([
            Metric(mlflow_name(name), value, start + round(line["seconds"] * 1000), line["step"])
            for line in lines
            for name, value in _metric_values(line).items()
        ])  # fmt: skip

    def send_points(self, points: list[Any]) -> None:
        """Send MLflow's metrics."""
        for at in range(0, len(points), MAX_REQUEST):
            self.client.log_batch(self.id, metrics=points[at : at + MAX_REQUEST])

    def send_metrics(self, started: str, progress: UploadProgress) -> None:
        """Send the lines of metrics.jsonl after the last step sent, in requests of whole lines.

        `in_flight`, the last step of a request, is written to disk before the request is sent: after a crash, MLflow is
        asked for the lines up to it before they are sent again.
        """
        path, state = self.folder / "metrics.jsonl", self.state
        new_lines = read_after(path, Position(*state.get("position", ())))
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
        name = mlflow_name(list(_metric_values(line))[-1])
        return any(metric.step == line["step"] for metric in self.client.get_metric_history(self.id, name))

    def send_system(self) -> None:
        """Send system metrics of the nodes; the step is the sample's number, so a sample sent twice is one point."""
        from mlflow.entities import Metric

        for path in sorted(self.folder.glob("system*.jsonl")):
            sent = self.state.get("samples", {})
            number, end = sent.get(path.name, (0, 0))
            prefix = "/".join(filter(None, ("system", path.stem.removeprefix("system").lstrip("_"))))
            points = []
            for sample, after in read_from(path, end):
                time, end = sample.pop("time"), after
                points += [Metric(mlflow_name(f"{prefix}/{name}"), sample[name], time, number) for name in sample]
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

        if "model_id" not in self.state:
            logged = self.client.create_logged_model(self.experiment, MODEL_NAME, self.id)
            self.save(model_id=logged.model_id)
        model_id = self.state["model_id"]
        with tempfile.TemporaryDirectory() as temporary:
            files = Path(temporary) / MODEL_NAME
            write_model_files(self.folder / model.file, model, info.versions["python"], files, model_id, self.id)
            self.client.log_model_artifacts(model_id, str(files))
        self.client.finalize_logged_model(model_id, "READY")
        self.client.log_outputs(self.id, [LoggedModelOutput(model_id, info.result["num_steps"])])
        self.save(model_logged=True)

    def close(self, described: Described) -> None:
        """Send artifacts and the final status; a run whose status is still `running` has lost its driver."""
        for name in ARTIFACTS:
            path = self.folder / name
            if path.is_dir():
                self.client.log_artifacts(self.id, str(path), name)
            elif path.exists():
                self.client.log_artifact(self.id, str(path))
        end = None if described.ended is None else millis(described.ended)
        self.client.set_terminated(self.id, STATUS[described.status], end)
        self.save(closed=described.ended or UNKNOWN_END)

    def is_closed(self, ended: str | None) -> bool:
        """Whether everything of a run that ended at `ended` was sent."""
        return self.state.get("closed") == (ended or UNKNOWN_END)


def _tag_strings(tags: Tags) -> dict[str, str]:
    """Tags as strings, without those that are None."""
    return {key: str(value) for key, value in tags.items() if value is not None}


def _metric_values(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "seconds")}


def _requests(lines: Iterable[tuple[Line, Position]], sent: int) -> Iterator[tuple[list[Line], Position]]:
    """Group the lines after step `sent` into requests of at most MAX_REQUEST values, each with its last position.

    A longer line is a request of its own. The last one may be empty.

    >>> lines = [({"step": s, "seconds": 0, "a": 1, "b": 2}, Position(step=s)) for s in range(1001)]
    >>> [(len(group), at.step) for group, at in _requests(lines, sent=-1)]
    [(500, 499), (500, 999), (1, 1000)]
    >>> [(len(group), at.step) for group, at in _requests(lines[:10], sent=20)]
    [(0, 9)]
    """
    group: list[Line] = []
    size, position = 0, None
    for line, line_position in lines:
        if line["step"] > sent:
            num_values = len(_metric_values(line))
            if group and position and size + num_values > MAX_REQUEST:
                yield group, position
                group, size = [], 0
            group.append(line)
            size += num_values
        position = line_position
    if position:
        yield group, position


def millis(iso: str) -> int:
    """MLflow's form of a time."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000)
