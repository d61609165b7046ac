"""Reads runs from MLflow, also runs that were never a run folder of ours, and writes them as run folders.

What a comparison needs of a run: its batch, its seed, its accuracy, and whatever explanations it measured. Runs that
our mirror sent carry all of it under our own names; of others the caller says what theirs are called.
"""

import ast
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gengap_dist.config.loading import nested
from gengap_dist.errors import UsageError, did_you_mean
from gengap_dist.runs.run_folder import write_atomically

STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed", "RUNNING": "running", "SCHEDULED": "running"}


class SourceNames(NamedTuple):
    """What the runs call things."""

    accuracy: str = "test/accuracy"
    """Metric: accuracy on the test images at the end."""
    global_size: str = "batch.global_size"
    """Parameter: the global batch."""
    seed: str = "seed"
    """Parameter: the seed."""
    num_updates: str = "num_steps"
    """Metric or parameter: the number of optimizer steps."""
    percent: bool = False
    """Whether the accuracy is in percent."""


def find_runs(client: Any, source: str) -> Iterator[Any]:
    """The MLflow runs that `runs:/ID` or `experiments:/NAME` names; of parent runs, the runs below them.

    Raises:
        UsageError: if there is none.
    """
    kind, _, name = source.partition(":/")
    if kind == "runs":
        try:
            run = client.get_run(name)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"{source} is not a run there ({text}): give the id that MLflow shows") from None
        below = list(_descendants(client, run))
        yield from below or _without_groups([run])
        return
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = [found.name for found in client.search_experiments()]
        raise UsageError(
            f"{source} is not an experiment there{did_you_mean(name, known)}: choose one of {', '.join(known)}"
        )
    runs = _search(client, experiment.experiment_id)
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs}
    yield from _without_groups(run for run in runs if run.info.run_id not in parents)


def _without_groups(found: Iterable[Any]) -> Iterator[Any]:
    """Without studies and arms of ours that have nothing below them."""
    yield from (run for run in found if run.data.tags.get("level") not in ("study", "arm"))


def _descendants(client: Any, run: Any) -> Iterator[Any]:
    for child in _search(client, run.info.experiment_id, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"):
        yield from list(_descendants(client, child)) or _without_groups([child])


def _search(client: Any, experiment_id: str, query: str = "") -> list[Any]:
    """Runs in the order in which they began, those of one moment by name."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], query, max_results=500, page_token=token)
        found += page
        if not (token := page.token):
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_name or ""))


def save_as_run_folder(client: Any, run: Any, folder: Path, names: SourceNames, metric_names: Iterable[str]) -> None:
    """Write one MLflow run as a run folder: run.json, and metrics.jsonl of the metrics that are wanted.

    Args:
        client: of the store.
        run: the run.
        folder: to write; made if need be.
        names: what the run calls things.
        wanted: names of metrics whose whole course is fetched.

    Raises:
        UsageError: if a parameter cannot be read as what it has to be, or the accuracy is not a share of 1.
    """
    params, metrics = dict(run.data.params), dict(run.data.metrics)
    size = _integer(run, names.global_size, params.get(names.global_size, run.data.tags.get(names.global_size)), None)
    seed = _integer(run, names.seed, params.get(names.seed, run.data.tags.get(names.seed)), 0)
    result: dict[str, Any] = {}
    if (accuracy := metrics.get(names.accuracy)) is not None and math.isfinite(accuracy):
        accuracy = accuracy / 100 if names.percent else accuracy
        if not 0 <= accuracy <= 1:
            raise UsageError(
                f"{names.accuracy} of {_title(run)} ({accuracy:g}) is not a share of 1: add --percent if it is in "
                "percent, or choose another --accuracy"
            )
        result["test/accuracy"] = accuracy
    lines: dict[int, dict[str, float]] = {}
    for name in metrics.keys() & set(metric_names):
        for point in client.get_metric_history(run.info.run_id, name):
            lines.setdefault(point.step, {})[name] = point.value
    ours = run.data.tags.get("mlflow.source.name") == "gengap_dist"
    counted = metrics.get(names.num_updates, params.get(names.num_updates, max(lines, default=0) if ours else 0))
    num_steps = _integer(run, names.num_updates, str(counted), None)
    result["num_steps"] = num_steps
    if "updates_to_target" in metrics:
        result["updates_to_target"] = int(metrics["updates_to_target"])
    status = run.data.tags.get("status", STATUS.get(run.info.status, "finished"))
    settings = nested(
        {name: _parse_value(text) for name, text in params.items() if name not in (names.global_size, names.seed)}
    )
    settings = settings | {"batch": {**_dict_or_empty(settings.get("batch")), "global_size": size}, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "schema": 1,
        "status": status,
        "seed": seed,
        "config": settings,
        "num_steps": num_steps,
        "result": result,
        "seconds": ((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000,
        "mlflow": {"run_id": run.info.run_id, "name": run.info.run_name},
    }
    write_atomically(folder / "run.json", json.dumps(info, indent=1))
    rows = [
        {"step": step, "epoch": values.pop("epoch", 0.0), "seconds": 0.0}
        | {name: value if math.isfinite(value) else str(value) for name, value in sorted(values.items())}
        for step, values in sorted(lines.items())
    ]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _integer(run: Any, name: str, text: str | None, missing: int | None) -> int:
    if text is None and missing is not None:
        return missing
    try:
        return int(float(text or ""))
    except ValueError:
        known = [*run.data.params]
        has = "has no parameter or tag" if text is None else f"has {text} as"
        raise UsageError(
            f"{_title(run)} {has} {name}{did_you_mean(name, known)}: say what its runs call it "
            f"(they have {', '.join(sorted(known)[:12]) or 'no parameters'})"
        ) from None


def _parse_value(text: str) -> Any:
    """A parameter as the value that was logged; text where it is none.

    >>> [_value(text) for text in ("0.1", "None", "True", "sgd", "['a']")]
    [0.1, None, True, 'sgd', ['a']]
    """
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError):
        return text
    return value if value is None or isinstance(value, bool | int | float | list) else text


def _title(run: Any) -> str:
    return f"MLflow run {run.info.run_name or run.info.run_id} ({run.info.run_id})"
