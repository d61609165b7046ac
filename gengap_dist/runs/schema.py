"""What run.json and study.json contain: versioned models, checked when a file is read.

Schema 1 lacks `metric` and `model`, and is read as schema 2, which is written. A newer schema is refused. Fields that
are not listed here are kept. Whatever a reader takes from a file has a type here: a folder may come from anywhere, and
a damaged file costs one sentence with the file, the field and its rule.
"""

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from gengap_dist.config.file_names import file_name_problem
from gengap_dist.config.regular_file import read_regular
from gengap_dist.errors import UsageError
from gengap_dist.runs.metric import ACCURACY, MetricDescription

SCHEMA = 2
REMEDY = "restore it, or remove its folder"  # of a damaged file
OF_STUDY = ("runs", "match", "tune")  # folders of a study with ARM/RUN
MAX_DEPTH = 40  # of nested JSON values; those that this package writes have fewer than ten
YEARS = range(1980, 9000)  # of times: in these, any of our durations may be added

StrictInt = Annotated[int, Strict()]
Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+_-]*$")]
"""Of Python or torch: it becomes a line of requirements that pip reads."""
Count = Annotated[int, Field(ge=0, le=2**53)]


def to_time(text: str) -> datetime:
    """A recorded time; without an offset it is UTC.

    >>> to_time("2026-01-02T08:00:00+02:00") == to_time("2026-01-02T06:00:00")
    True
    """
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def section(settings: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """A section of the settings of a run or study; empty where it is missing, or that of another program.

    >>> section({"study": ["a"], "train": {"steps": 2}}, "study"), section({"train": {"steps": 2}}, "train")
    ({}, {'steps': 2})
    """
    found = (settings or {}).get(name)
    return found if isinstance(found, Mapping) else {}


def _check_time(text: str) -> str:
    if to_time(text).year not in YEARS:
        raise ValueError(f"the year must be from {YEARS.start} to {YEARS.stop - 1}")
    return text


Time = Annotated[str, AfterValidator(_check_time)]
"""ISO 8601."""


def _check_inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or any(map(file_name_problem, path.parts)):
        raise ValueError("the path must be inside of the folder")
    return text


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

    dtype: str = Field(pattern=r"^(bool|bfloat16|(u?int|float)(8|16|32|64))$")
    """numpy's name."""
    shape: list[int]
    """-1: any size."""


class ExportedModel(_Part):
    """A network written by torch.export; see `training/export.py`."""

    file: Annotated[str, AfterValidator(_check_inside)]
    """Path in the run folder."""
    torch: Version
    """Version of torch that wrote it."""
    input: TensorDescription
    output: TensorDescription
    metadata: dict[str, str]
    """What input and output mean, for people."""


class StudyMember(_Part):
    """A run that `gengap compare` has put into an arm."""

    arm: str
    folder: str


class _Versions(_Part):
    python: Version | None = None


class _Git(_Part):
    commit: str
    dirty: bool


class _Data(_Part):
    """Of `datasets.summary`: what is read again. An earlier version wrote less, another program may write nothing."""

    name: str | None = None
    root: str | None = None
    digest: str | None = None
    num_train: Count | None = None
    num_val: Count | None = None
    num_test: Count | None = None
    num_classes: Count | None = None
    target_digests: dict[str, str] | None = None


class _Batch(_Part):
    global_size: Annotated[int, Field(ge=1, le=2**53), Strict()] | None = None


class _Train(_Part):
    target_accuracy: FiniteFloat | None = None
    target_loss: FiniteFloat | None = None


class _Probe(_Part):
    max_time_fraction: FiniteFloat | None = None


class _StudySettings(_Part):
    tolerance: FiniteFloat | None = None
    looks: Annotated[list[PositiveInt], Field(max_length=2)] | None = None
    may_extend: bool | None = None
    tune: dict[str, Any] | None = None
    match: dict[str, Any] | None = None


class _Settings(_Part):
    """The settings that are read of runs and studies. Those of a run of another program have any names."""

    batch: _Batch = _Batch()
    train: _Train = _Train()
    probe: _Probe = _Probe()
    study: _StudySettings = _StudySettings()
    across: list[str] = []


class _Counts(_Part):
    num_steps: Count | None = None
    num_test: Count | None = None
    updates_to_target: Count | None = None
    train_test_gap: float | None = None
    samples_per_second: float | None = None
    images_per_second: float | None = None
    probe_left_out: list[int] | None = None


class _Trial(_Part):
    setting: dict[str, Any] | None = None


class _Search(_Part):
    trials: list[_Trial] | None = None
    best: dict[str, Any] | None = None
    edge: list[str] | None = None
    shared: list[str] | None = None
    to: str | None = None
    problem: str | None = None
    target: float | None = None
    tolerance: float | None = None


class _Strength(_Search):
    best: dict[str, float] | None = None


class _Registration(_Part):
    sha256: str
    overridden: list[str] | None = None
    commit: str | None = None
    committed: Time | None = None
    later: list["_Registration"] | None = None


_METRICS = TypeAdapter(dict[str, float | None])
_SEARCHES, _STRENGTHS = TypeAdapter(dict[str, _Search]), TypeAdapter(dict[str, _Strength])


class _Record(BaseModel):
    """A JSON file with a schema. Fields that are not set are not written."""

    model_config = ConfigDict(frozen=True, extra="allow")
    file_name: ClassVar[str]

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    status: RunStatus
    started: Time | None = None
    ended: Time | None = None
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
            tree = from_json(read_regular(path))
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}): give the folder of a run or study") from None
        except ValueError as error:
            raise UsageError(f"{path} is damaged: it is not JSON ({error}); {REMEDY}") from None
        if not isinstance(tree, dict):
            raise UsageError(f"{path} is damaged: it must be a JSON object, and is {tree!r:.40}; {REMEDY}")
        if problem := _odd_value(tree):
            raise UsageError(f"{path} is damaged: {problem}; {REMEDY}")
        _check_schema(path, tree)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UsageError(f"{path} is damaged: {first_error(error)}; {REMEDY}") from None

    @model_validator(mode="before")
    @classmethod
    def _as_schema_2(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**tree, "schema": SCHEMA}

    @field_validator("versions")
    @classmethod
    def _check_versions(cls, versions: dict[str, str]) -> dict[str, str]:
        return _checked(versions, _Versions)

    @field_validator("git")
    @classmethod
    def _check_git(cls, git: dict[str, Any] | None) -> dict[str, Any] | None:
        return git and _checked(git, _Git)

    @field_validator("config", check_fields=False)
    @classmethod
    def _check_settings(cls, config: dict[str, Any]) -> dict[str, Any]:
        sections = {name: value for name, value in config.items() if isinstance(value, Mapping) or name == "across"}
        _Settings.model_validate(sections)
        return config

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
    seconds: FiniteFloat | None = None
    """Duration, without the time between an end and a resume."""
    resumed: list[Time] = []
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
    steps_per_epoch: Count | None = None
    num_steps: Count | None = None
    """Planned optimizer steps."""
    num_parameters: Count | None = None
    num_probe_samples: Count | None = None
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

    @field_validator("data")
    @classmethod
    def _check_data(cls, data: dict[str, Any] | None) -> dict[str, Any] | None:
        return data and _checked(data, _Data)

    @field_validator("result")
    @classmethod
    def _check_result(cls, result: dict[str, Any]) -> dict[str, Any]:
        """Named with a slash are metrics; other results may be anything."""
        _METRICS.validate_python({name: value for name, value in result.items() if "/" in name})
        return _checked(result, _Counts)

    @property
    def global_size(self) -> int | None:
        """The global batch size; None if the settings, which may be those of another program, do not have it."""
        batch = self.config.get("batch")
        return batch.get("global_size") if isinstance(batch, Mapping) else None


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

    @field_validator("tuned", "matched")
    @classmethod
    def _check_searches(cls, searches: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        (_SEARCHES if info.field_name == "tuned" else _STRENGTHS).validate_python(searches)
        return searches

    @field_validator("declared")
    @classmethod
    def _check_declared(cls, declared: dict[str, Any] | None) -> dict[str, Any] | None:
        return declared and _checked(declared, _StudySettings)

    @field_validator("registration")
    @classmethod
    def _check_registration(cls, registration: dict[str, Any] | None) -> dict[str, Any] | None:
        return registration and _checked(registration, _Registration)

    @model_validator(mode="after")
    def _check_arms(self) -> Self:
        for arm in self.arms if self.members is None else ():
            if problem := file_name_problem(arm):
                raise ValueError(f"an arm ({arm!r:.60}) {problem}")
        if len({*self.arms}) < len(self.arms):
            raise ValueError("each arm must have a name of its own")
        if self.arms and self.baseline not in self.arms:
            raise ValueError(f"the baseline ({self.baseline!r:.60}) must be one of the arms")
        return self


def _checked(tree: dict[str, Any], part: type[_Part]) -> dict[str, Any]:
    """The same JSON values, whose fields are those of `part`; others are kept."""
    part.model_validate(tree)
    return tree


def _odd_value(value: Any, name: str = "", depth: int = 0) -> str:
    """A number that no float can hold, or a value nested too deeply, as a clause; empty: there is none."""
    if isinstance(value, int):
        return "" if abs(value) <= sys.float_info.max else f"{name} is a number of {len(str(value))} digits"
    if not isinstance(value, dict | list):
        return ""
    if depth == MAX_DEPTH:
        return f"{name:.60} is nested more than {MAX_DEPTH} levels deep"
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return next(filter(None, (_odd_value(each, f"{name}.{key}".lstrip("."), depth + 1) for key, each in parts)), "")


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


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, as a clause: a field, its value, and its rule."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name:.80} is missing"
    rule = str(first["ctx"]["error"]) if first["type"] == "value_error" and "ctx" in first else first["msg"]
    rule = rule[:1].lower() + rule[1:].partition(" or instance of ")[0]  # of a class of ours
    return f"{name:.80} ({first['input']!r:.60}) is not valid: {rule}" if name else rule
