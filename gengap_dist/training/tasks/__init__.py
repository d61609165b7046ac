"""What a network learns. A task of your own is a subclass of `Task`: `task.name=module.path:Class`."""

from typing import Any

from torch import Tensor

from gengap_dist.config.own_code import call_own, load_own
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError, did_you_mean
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.training.tasks.base import Task
from gengap_dist.training.tasks.classification import Classification
from gengap_dist.training.tasks.language_modeling import LanguageModeling

__all__ = ["Classification", "LanguageModeling", "MetricDescription", "Task", "build_task", "described_metric"]

OWN = ("classification", "language_modeling")  # tasks of this package


def build_task(config: RunConfig, spec: DataSpec) -> Task:
    """The task of a run on samples as in `spec`.

    Raises:
        UsageError: if it does not exist, or does not fit the samples or the settings.
    """
    name, smoothing = config.task.name, config.algorithm.label_smoothing
    if name == "classification":
        return Classification(spec, smoothing)
    cls = LanguageModeling if name == "language_modeling" else _own_class(name)
    if smoothing:
        raise UsageError(
            f"algorithm.label_smoothing ({smoothing}) changes the targets of classification, and task.name is {name}: "
            "set algorithm.label_smoothing=0"
        )
    task = call_own("task.name", name, cls, spec)
    target = config.train.target_accuracy
    if target is not None and task.metric.name != "accuracy":
        raise UsageError(
            f"train.target_accuracy ({target}) needs a task with accuracy, and {name} measures {task.metric.name}: "
            "set train.target_loss in its place, or null"
        )
    return task


def described_metric(task: Task, targets: Tensor) -> dict[str, Any]:
    """The metric of a run for run.json, with its chance level on training `targets` [N, ...]."""
    return task.metric.model_copy(update={"chance": task.chance(targets)}).model_dump()


def _own_class(name: str) -> type[Task]:
    if ":" not in name:
        raise UsageError(
            f"task.name ({name}) is not a task{did_you_mean(name, OWN)}: choose {' or '.join(OWN)}, or your "
            "own module.path:Class"
        )
    cls = load_own("task.name", name, "Class")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UsageError(
            f"task.name ({name}) is a {type(cls).__name__}, needs a subclass of gengap_dist.training.tasks.Task: "
            "derive your class from it"
        )
    return cls
