"""What run.json and study.json contain: versioned models, checked when a file is read.

Schema 1 lacks `metric` and `model`, and is read as schema 2, which is written. A newer schema is refused. Fields that
are not listed here are kept.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import from_json

from gengap_dist.config.file_names import file_name_problem
from gengap_dist.errors import UsageError
from gengap_dist.runs.metric import ACCURACY, MetricDescription

SCHEMA = 2

StrictInt = Annotated[int, Strict()]


class RunStatus(StrEnum):
    """The state of a run or of a study."""

    RUNNING = "running"
    """Started and not ended; also if it was lost without a word."""
    FINISHED = "finished"
    DIVERGED = "diverged"
    """A loss was not finite, which is a result."""
    FAILED = "failed"
    KILLED = "killed"
    PREEMPTED = "preempted"
    """Stopped by a signal before the end; saved and can be resumed."""

    @property
    def has_result(self) -> bool:
        """Whether the run is done and not repeated."""
        return self in (RunStatus.FINISHED, RunStatus.DIVERGED)

    @property
    def is_final(self) -> bool:
        """Whether the run came to its end; others go on, or were interrupted."""
        return self.has_result or self == RunStatus.FAILED


class NewerSchema(UsageError):
    """A file was written by a later version of this package: it is complete, and must not be changed."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class TensorDescription(_Part):
    """The input or output of an exported model."""

    dtype: str
    """numpy's name."""
    shape: list[int]
    """-1: any size."""


class ExportedModel(_Part):
    """A network written by torch.export; see `training/export.py`."""

    file: str
    """Path in the run folder."""
    torch: str
    """Version of torch that wrote it."""
    input: TensorDescription
    output: TensorDescription
    metadata: dict[str, str]
    """What input and output mean, for people."""


class StudyMember(_Part):
    """A run that `gengap compare` has put into an arm."""

    arm: str
    folder: str


class _Record(BaseModel):
    """A JSON file with a schema. Fields that are not set are not written."""

    model_config = ConfigDict(frozen=True, extra="allow")
    file_name: ClassVar[str]

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    status: RunStatus
    started: str | None = None
    """ISO 8601, UTC."""
    ended: str | None = None
    command: list[str] = []
    versions: dict[str, str] = {}
    git: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            NewerSchema: if a later version of this package wrote it.
            UsageError: if it is missing or damaged: one sentence with the field and its rule.
        """
        try:
            if path.exists() and not path.is_file():  # to open a named pipe would wait for whoever writes into it
                raise OSError("it is not a regular file")
            tree = from_json(path.read_bytes())  # unlike json, it refuses text that is not Unicode
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read ({error}): give the folder of a run or study") from None
        if not isinstance(tree, dict):
            raise UsageError(f"{path} is damaged: it must be a JSON object, and is {tree!r:.40}")
        _check_schema(path, tree)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UsageError(f"{path} is damaged: {_first_error(error)}; restore it, or remove its folder") from None

    @model_validator(mode="before")
    @classmethod
    def _as_schema_2(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**tree, "schema": SCHEMA}

    def content(self) -> dict[str, Any]:
        """The content of the file, as JSON values."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def with_fields(self, **fields: Any) -> Self:
        """A copy with some fields set."""
        return type(self).model_validate(self.content() | fields)


class RunInfo(_Record):
    """run.json. A run of another program may have only the fields without a default."""

    file_name = "run.json"

    id: str | None = None
    """Random, of the first start; checkpoints name the run that they belong to. None: an earlier version started it."""
    seed: StrictInt
    config: dict[str, Any]
    """The settings; those of a run of another program have any names."""
    metric: MetricDescription
    seconds: float | None = None
    """Duration, without the time between an end and a resume."""
    resumed: list[str] = []
    """Times of later starts."""
    data: dict[str, Any] | None = None
    """See `datasets.summary`."""
    world_size: int | None = None
    device: str | None = None
    threads_per_rank: int | None = None
    threads_source: str | None = None
    """What limits the threads: see `distributed.cores`."""
    cpu_wait_share: float | None = None
    """Share of its time that rank 0 was ready to run and waited for a core; see `distributed.cpu_wait`."""
    launcher: str | None = None
    launch_id: str | None = None
    strategy: str | None = None
    steps_per_epoch: int | None = None
    num_steps: int | None = None
    """Planned optimizer steps."""
    num_parameters: int | None = None
    num_probe_samples: int | None = None
    samples_per_unit: dict[str, float] = {}
    """N / D of the probe set by layer key, see `config.metric_key`: rows of the matrix for each of its columns."""
    last_hidden_layer: str | None = None
    """Name of the last measured layer before the output of the network."""
    norm_size: Any = None
    """Sizes of the groups of samples that batch norm uses."""
    unused_parameters: list[str] = []
    """Trainable parameters that got no gradient in a pass before the first step."""
    depends_on_ranks: list[str] = []
    """Modules with random numbers of a micro-batch, and buffers that each pass changes: with them the result depends on
    the number of ranks and micro-batches, which it does not otherwise."""
    small_size: float | None = None
    """The small batch of the noise scale."""
    rank_images: int | None = None
    """Images of each step from which the rank penalty takes the covariance."""
    micro_size: int | None = None
    micro_size_auto: dict[str, Any] | None = None
    """How `auto` chose it."""
    channels_last: bool | None = None
    channels_last_auto: dict[str, Any] | None = None
    result: dict[str, Any] = {}
    error: str | None = None
    model: ExportedModel | None = None
    """The exported model, if there is one."""
    model_error: str | None = None
    """Why there is none."""

    @model_validator(mode="before")
    @classmethod
    def _with_metric(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"metric": _accuracy(tree.get("data")), **tree}


class StudyInfo(_Record):
    """study.json, of a study or of a comparison of runs."""

    file_name = "study.json"

    name: str
    question: str
    baseline: str
    arms: list[str]
    seeds: list[StrictInt]
    config: dict[str, Any] = {}
    """The settings of a study; where the runs of a comparison come from."""
    twins: dict[str, str] = {}
    """Arms that are not run, because another one has the same settings."""
    tuned: dict[str, Any] = {}
    """Trials and best setting by arm; see `tuning.summary`."""
    matched: dict[str, Any] = {}
    """Runs and strength found by arm; see `matching.Search.summary`."""
    metrics: dict[str, float] = {}
    """The headline, for MLflow."""
    verdicts: list[str] = []
    judged: list[list[StrictInt]] = []
    """The seeds at each look: lists that differ, in the order of the looks."""
    declared: dict[str, Any] | None = None
    """`looks` and `may_extend` as they were when the study was first judged."""
    registration: dict[str, Any] | None = None
    """Commit and digest of the configuration; see `study/registration.py`."""
    members: list[StudyMember] | None = None
    """The runs of a comparison, which are not in its folder."""
    not_judged: str = ""
    """Why nothing is judged by a comparison, as a sentence; empty if it is judged."""

    @model_validator(mode="after")
    def _check_names_of_folders(self) -> Self:
        for arm in self.arms if self.members is None else ():
            if problem := file_name_problem(arm):
                raise ValueError(f"an arm ({arm!r:.60}) {problem}")
        return self


def _accuracy(data: Any) -> MetricDescription:
    """The metric of runs that name none."""
    num_classes = data.get("num_classes") if isinstance(data, Mapping) else None
    chance = 1 / num_classes if isinstance(num_classes, int) and num_classes > 0 else None
    return ACCURACY.model_copy(update={"chance": chance})


def _check_schema(path: Path, tree: Mapping[str, Any]) -> None:
    schema = tree.get("schema", 1)
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise UsageError(f"{path} is damaged: schema ({schema!r:.40}) must be an integer, at least 1")
    if schema > SCHEMA:
        versions = tree.get("versions")
        version = versions.get("gengap_dist") if isinstance(versions, Mapping) else None
        needed = f"gengap_dist {version}" if version else "the version of gengap_dist that wrote it"
        raise NewerSchema(
            f"{path} has schema {schema}, and this version of gengap_dist reads up to {SCHEMA}: "
            f"install {needed}, or a later one"
        )


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "value_error" and "ctx" in first:  # of a validator here: a whole sentence
        return str(first["ctx"]["error"])
    return f"{name} ({first['input']!r:.60}) is not valid: {first['msg'][0].lower()}{first['msg'][1:]}"
