"""Reads runs from MLflow, including runs of other programs, and writes them as run folders.

A comparison needs a run's batch size, seed, accuracy and diagnostics. Runs that were uploaded by this package have them
under its own names; for other runs the caller gives the names.
"""

import ast
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import from_json

from gengap_dist.config.loading import nested
from gengap_dist.errors import UsageError, did_you_mean
from gengap_dist.runs.run_folder import json_line, write_atomically, write_info
from gengap_dist.runs.schema import RunInfo, RunStatus, first_error
from gengap_dist.tracking.mlflow.client import describe, is_outage
from gengap_dist.tracking.mlflow.names import own_name

PAGE = 100  # runs in an answer of the server, whose size is bounded
RESULTS = ("train_full/", "test/", "train_test_gap")  # metrics of our runs that are results
STATUS = {
    "FINISHED": RunStatus.FINISHED,
    "FAILED": RunStatus.FAILED,
    "KILLED": RunStatus.KILLED,
    "RUNNING": RunStatus.RUNNING,
    "SCHEDULED": RunStatus.RUNNING,
}


class SourceNames(NamedTuple):
    """Names of the required values in the MLflow runs."""

    accuracy: str = "test/accuracy"
    """Metric: accuracy on the test images at the end."""
    global_size: str = "batch.global_size"
    """Parameter: the global batch size."""
    seed: str = "seed"
    """Parameter: the seed."""
    num_updates: str = "num_steps"
    """Metric or parameter: the number of optimizer steps."""
    percent: bool = False
    """Whether the accuracy is given in percent."""


def find_runs(client: Any, source: str) -> Iterator[Any]:
    """The MLflow runs of `runs:/ID` or `experiments:/NAME`; parent runs are replaced by their descendants.

    Raises:
        UsageError: if there is none.
        Exception: any error of the MLflow client, if the store cannot be reached.
    """
    kind, _, name = source.partition(":/")
    if kind == "runs":
        try:
            run = client.get_run(name)
        except Exception as error:
            if is_outage(error):
                raise
            reason = describe(error)[:200]
            raise UsageError(f"{source} is not a run in this store ({reason}): give the id that MLflow shows") from None
        descendants = list(_descendants(client, run))
        yield from descendants or _without_groups([run])
        return
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [experiment.name for experiment in client.search_experiments()]
        raise UsageError(
            f"{source} is not an experiment in this store{did_you_mean(name, known)}: choose one of {', '.join(known)}"
        )
    runs = _search(client, experiment.experiment_id)
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    yield from _without_groups(run for run in runs if run.info.run_id not in parents)


def _without_groups(runs: Iterable[Any]) -> Iterator[Any]:
    """The runs without our studies and arms that have no descendants."""
    yield from (run for run in runs if run.data.tags.get("level") not in ("study", "arm"))


def _descendants(client: Any, run: Any) -> Iterator[Any]:
    for child in _search(client, run.info.experiment_id, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"):
        yield from list(_descendants(client, child)) or _without_groups([child])


def _search(client: Any, experiment_id: str, query: str = "") -> list[Any]:
    """Runs sorted by start time, then by name."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=PAGE, page_token=token)
        runs += page
        if not (token := page.token):
            return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_name or ""))


def save_as_run_folder(
    client: Any, run: Any, folder: Path, names: SourceNames, is_wanted: Callable[[str], bool]
) -> None:
    """Write one MLflow run as a run folder: run.json, and metrics.jsonl of the metrics whose names are wanted.

    Args:
        client: MLflow client of the store.
        run: the MLflow run.
        folder: folder to write; created if it does not exist.
        names: names of the required values in the run.
        is_wanted: whether to fetch the whole history of a metric; it is given the name in our run folders.

    Raises:
        UsageError: if a parameter is missing or not a number, or the accuracy is not between 0 and 1.
    """
    params, metrics = dict(run.data.params), dict(run.data.metrics)
    size = _integer(run, names.global_size, params.get(names.global_size, run.data.tags.get(names.global_size)), None)
    seed = _integer(run, names.seed, params.get(names.seed, run.data.tags.get(names.seed)), 0)
    result: dict[str, Any] = {}
    if (accuracy := metrics.get(names.accuracy)) is not None and math.isfinite(accuracy):
        accuracy = accuracy / 100 if names.percent else accuracy
        if not 0 <= accuracy <= 1:
            raise UsageError(
                f"{names.accuracy} of {_title(run)} ({accuracy:g}) is not between 0 and 1: add --percent if it is in "
                "percent, or choose another --accuracy"
            )
        result["test/accuracy"] = accuracy
    lines: dict[int, dict[str, float]] = {}
    ours = run.data.tags.get("mlflow.source.name") == "gengap_dist"
    for sent_name in metrics:
        name = own_name(sent_name, run.data.tags) if ours else sent_name
        if ours and name.startswith(RESULTS):
            result[name] = metrics[sent_name]
        elif is_wanted(name):
            for point in client.get_metric_history(run.info.run_id, sent_name):
                lines.setdefault(point.step, {})[name] = point.value
    counted = metrics.get(names.num_updates, params.get(names.num_updates, max(lines, default=0) if ours else 0))
    num_steps = _integer(run, names.num_updates, str(counted), None)
    result["num_steps"] = num_steps
    if "updates_to_target" in metrics:
        result["updates_to_target"] = int(metrics["updates_to_target"])
    status = STATUS.get(run.info.status, RunStatus.FINISHED)
    settings = nested(
        {name: _parse_value(text) for name, text in params.items() if name not in (names.global_size, names.seed)}
    )
    settings = settings | {"batch": {**_dict_or_empty(settings.get("batch")), "global_size": size}, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    described = _described(run.data.tags) if ours else {}
    content = {
        **described,
        "status": run.data.tags.get("status", status) if ours else status,
        "seed": seed,
        "config": settings,
        "num_steps": num_steps,
        "result": result,
        "seconds": ((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000,
        "mlflow": {"run_id": run.info.run_id, "name": run.info.run_name},
    }  # fmt: skip
    try:
        info = RunInfo.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{_title(run)} cannot be read as a run: {first_error(error)}; correct it in MLflow") from None
    write_info(folder, info)
    rows = [
        {"step": step, "epoch": values.pop("epoch", 0.0), "seconds": 0.0} | dict(sorted(values.items()))
        for step, values in sorted(lines.items())
    ]
    write_atomically(folder / "metrics.jsonl", "".join(json_line(row) + "\n" for row in rows))


def _described(tags: Mapping[str, str]) -> dict[str, Any]:
    """What the tags of a run of ours say that its metrics do not; empty for runs of earlier versions."""
    try:
        found = {name: from_json(tags[name]) for name in ("metric", "num_probe_samples") if name in tags}
    except ValueError:  # a tag that someone has changed
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _integer(run: Any, name: str, text: str | None, missing: int | None) -> int:
    if text is None and missing is not None:
        return missing
    try:
        return int(float(text or ""))
    except (ValueError, OverflowError):
        known = [*run.data.params]
        has = "has no parameter or tag" if text is None else f"has {text} as"
        raise UsageError(
            f"{_title(run)} {has} {name}{did_you_mean(name, known)}: give the name in these runs "
            f"(they have {', '.join(sorted(known)[:12]) or 'no parameters'})"
        ) from None


def _parse_value(text: str) -> Any:
    """The logged value of a parameter; the text itself if it is not a literal.

    >>> [_parse_value(text) for text in ("0.1", "None", "True", "sgd", "['a']")]
    [0.1, None, True, 'sgd', ['a']]
    """
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if value is None or isinstance(value, bool | int | float | list) else text


def _title(run: Any) -> str:
    return f"MLflow run {run.info.run_name or run.info.run_id} ({run.info.run_id})"
