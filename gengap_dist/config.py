"""Every setting of a run and of a study: typed, documented, checked, frozen.

A setting's docstring is its `--help` text. Values come from the defaults below, then from YAML files (`extends` names
the files a file builds on), then from the command line; `resolve` puts the three together. Nothing heavy is imported
here, so that `--help` answers at once.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

C = TypeVar("C", bound=BaseModel)

MACHINERY = ("launch.", "mlflow.", "checkpoint.", "batch.micro_size", "data.root", "data.download", "data.memory_gib")
"""Settings that say how and where a run is computed, not what it computes: they may change when it is resumed."""


class UsageError(ValueError):
    """Something the user gave is wrong: one sentence with name, value, rule and remedy. Commands exit with 2 on it."""


def _one_or_many(value: Any) -> Any:
    """A single number where a list may stand."""
    return value if isinstance(value, list | tuple) else (value,)


class Section(BaseModel):
    """What all sections share: frozen, unknown keys refused, docstrings under fields are their help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class DataConfig(Section):
    """Which images, and how they are split."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder"] = "digits"
    """Data set. `digits` ships with the package; the others are read from data.root."""
    root: Path = Path("data")
    """Folder that holds the data set's files (not used by digits)."""
    download: bool = False
    """Let torchvision download missing files into data.root."""
    image_size: PositiveInt = 32
    """Side of the square images: smaller sets are zero-padded to it, imagefolder pictures are resized to it."""
    val_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the training images held out for validation; 0 holds none out."""
    split_seed: NonNegativeInt = 0
    """Seed of the train/validation split and of the probe set: the same for all seeds and arms of a study."""
    shuffle_labels: bool = False
    """Give the training images each other's labels: what a network learns then is memory, not classes (a control)."""
    augment: tuple[Literal["crop", "flip"], ...] = ()
    """Training augmentations: crop (4 pixels of padding) and flip (left-right)."""
    memory_gib: PositiveFloat = 8.0
    """Largest data set that is held in memory, in GiB per rank."""


class ModelConfig(Section):
    """Which network."""

    name: str = "lenet5"
    """lenet5, mlp, torchvision:NAME, timm:NAME, or module.path:factory of your own, called with num_classes and
    in_channels."""
    widths: tuple[PositiveInt, ...] = (512, 512, 512, 512, 512)
    """Hidden widths of the mlp."""


class BatchConfig(Section):
    """The global batch and how a rank cuts its part of it."""

    global_size: PositiveInt = 64
    """Samples behind one optimizer step, summed over all ranks. The gradient is their exact mean."""
    micro_size: PositiveInt = 128
    """Most samples in one forward and backward pass of one rank: speed and memory. Small ones fit a CPU's cache; on a
    GPU choose the largest that fits. Only plain batch norm's statistics are changed by it (see ghost_size)."""
    ghost_size: PositiveInt | None = None
    """Batch-norm statistics over groups of this many consecutive samples of the global batch; null: per micro-batch."""

    @model_validator(mode="after")
    def _ghosts_fit(self) -> Self:
        ghost = self.ghost_size
        if ghost is not None:
            if ghost < 2:
                raise ValueError("batch.ghost_size (1) gives batch norm one sample to estimate from: choose at least 2")
            if self.global_size % ghost:
                raise ValueError(
                    f"batch.global_size ({self.global_size}) cannot be split into ghost groups of {ghost}: "
                    f"choose a multiple of {ghost}, or batch.ghost_size=null"
                )
            if self.micro_size < ghost:
                raise ValueError(
                    f"batch.micro_size ({self.micro_size}) is smaller than one ghost group of {ghost}: "
                    f"choose at least {ghost}, or a smaller batch.ghost_size"
                )
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """Optimizer: sgd (with momentum), lars (sgd whose rate follows each layer's norms) or adamw."""
    lr: PositiveFloat = 0.02
    """Learning rate at optim.base_size when optim.scaling is set, else the rate itself."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum for sgd and lars."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (sgd, lars) or decoupled decay (adamw)."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the rate follows the global batch: lr * B/B0 (linear) or lr * sqrt(B/B0) (sqrt), B0 = optim.base_size."""
    base_size: PositiveInt | None = None
    """Global batch at which optim.lr holds; needed when optim.scaling is not none."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the rate rises from near 0 to its full value."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the rate does after warm-up: stays, or falls to 0 along a half cosine at the last step."""

    @model_validator(mode="after")
    def _scaling_has_a_base(self) -> Self:
        if self.scaling != "none" and self.base_size is None:
            raise ValueError(
                f"optim.scaling ({self.scaling}) needs the batch at which optim.lr holds: set optim.base_size, "
                "for example to the baseline's batch.global_size"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov (true) needs momentum: set optim.momentum above 0")
        return self


class TrainConfig(Section):
    """How long and in which precision."""

    epochs: PositiveInt = 5
    """Passes over the training images."""
    steps: PositiveInt | None = None
    """Optimizer steps; when set, train.epochs is not used."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of parameters, activations and gradients."""
    autocast: Literal["bfloat16"] | None = None
    """Precision of matrix products and convolutions in training, if not train.dtype; parameters keep theirs."""
    num_evals: PositiveInt = 20
    """Validation passes, spread evenly over the run: as many for every arm, so that picking the best is fair."""
    log_every: PositiveInt = 1
    """Record every k-th step's loss, accuracy, learning rate and gradient norm."""


class ProbeConfig(Section):
    """The near-rank-loss probe."""

    enabled: bool = True
    """Measure activation spectra while training."""
    num_samples: Annotated[
        tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_one_or_many), Field(min_length=1)
    ] = (1024,)
    """Training images in the fixed probe set. Of several numbers the largest is the probe set; the first and the last
    measurement repeat it with each of the others, to tell rank from sample size."""
    own_batch: bool = False
    """At the first and the last measurement, also probe with batch.global_size images: the paper's own matrix, whose
    singular values shrink as the batch grows even in an untrained network."""
    per_decade: PositiveInt | None = 3
    """Measurements per factor of ten in steps; step 0 and the last step are always measured."""
    every: PositiveInt | None = None
    """Measure every so many steps, too."""
    at_epochs: tuple[NonNegativeFloat, ...] = ()
    """Measure at these epochs, too; 0.5 is half-way through the first."""
    budget: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.05
    """Largest share of the run's time for probes: where the cadence would exceed it, measurements between the first and
    the last are thinned out, and the result says which; null: measure them all."""
    layers: tuple[str, ...] = ("auto",)
    """`auto` (outputs of every non-linearity, and of residual blocks) or layer names; globs such as `features.*` are
    welcome."""
    views: tuple[Literal["channel", "token", "pool", "flatten"], ...] = ("channel", "token", "pool")
    """How [N, C, H, W] becomes a matrix: channel (N H W) x C, pool N x C (mean over H, W), flatten N x (C H W); of
    tokens [N, T, D]: token (N T) x D, pool, flatten."""
    method: Literal["gram", "tsqr"] = "gram"
    """gram (fast; singular values below 6e-8 of the largest are noise) or tsqr (slower; 1e-14, for float64)."""
    memory_mib: PositiveInt = 512
    """Most memory of a rank that the probe may take, in MiB; wide layers take several passes over the images if need
    be."""
    rivals: tuple[Literal["noise_scale", "norms", "weights", "neural_collapse", "hessian", "keskar"], ...] = (
        "noise_scale", "norms", "weights", "neural_collapse",
    )  # fmt: skip
    """Other explanations to measure beside it: noise_scale (of the gradient), norms (distance from initialisation,
    update), weights (their spectra), neural_collapse (NC1); and, many times as dear as the probe itself, hessian (top
    eigenvalues and trace) and keskar (sharpness)."""


class LaunchConfig(Section):
    """Where the ranks come from."""

    backend: Literal["auto", "local", "torchrun", "ray"] = "auto"
    """local starts the ranks itself; torchrun joins those already started (by torchrun, deepspeed or the like); ray
    asks a Ray cluster for them; auto looks at the environment (ray under `ray job submit`)."""
    num_processes: PositiveInt = 1
    """Ranks that local or ray start (torchrun decides for itself)."""
    max_processes: PositiveInt | None = None
    """ray: any number of ranks from launch.num_processes to this one will do, as the cluster has room; the global batch
    stays."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo), cuda (NCCL, one GPU a rank), or auto: cuda when every local rank can have one."""
    strategy: Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"] = "auto"
    """How gradients become one update: single (one rank), ddp, DeepSpeed's ZeRO stages, or torch's FSDP2, which shards
    parameters too; auto is single on one rank and ddp on more."""
    timeout_seconds: PositiveInt = 600
    """How long a rank waits for the others before it gives up."""
    hang_seconds: PositiveFloat = 60.0
    """How long a rank waits before it says which rank it waits for, and where that one is."""
    ray_address: str | None = None
    """ray: the cluster, host:port or ray://host:port; null takes RAY_ADDRESS, a cluster that is here, or starts one."""
    resources_per_rank: dict[str, PositiveFloat] = {}
    """ray: what a rank takes, such as {CPU: 4, GPU: 1}; without it one CPU, and a GPU if launch.device is cuda."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """ray: whether ranks share nodes or spread over them."""
    max_failures: NonNegativeInt = 3
    """ray: how often ranks that died are started again, from the last checkpoint."""

    @model_validator(mode="after")
    def _range_of_processes(self) -> Self:
        if self.max_processes is not None and self.max_processes < self.num_processes:
            raise ValueError(
                f"launch.max_processes ({self.max_processes}) is below launch.num_processes ({self.num_processes}): "
                "give the smaller number as launch.num_processes"
            )
        return self


class CheckpointConfig(Section):
    """When the run saves itself, and how much of that it keeps."""

    every_seconds: NonNegativeFloat = 60.0
    """Save at the first log point after this many seconds; the end of a run is always saved."""
    every_steps: PositiveInt | None = None
    """Save after every so many steps, too."""
    keep: PositiveInt = 2
    """Checkpoints kept; each holds the best weights so far as well."""


class MlflowConfig(Section):
    """Where the run is mirrored for review."""

    enabled: bool = True
    """Mirror the run folder to MLflow while it grows."""
    tracking_uri: str | None = None
    """MLflow store; null takes MLFLOW_TRACKING_URI, and without it sqlite:///mlflow.db in the current folder."""
    experiment: str = "gengap_dist"
    """MLflow experiment."""
    wait_seconds: NonNegativeFloat = 60.0
    """How long a finished command waits for a slow server before it leaves the rest to `gengap report sync`."""


class RunConfig(Section):
    """One training run."""

    seed: NonNegativeInt = 0
    """Seed of initialisation, sample order and augmentation."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    probe: ProbeConfig = ProbeConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mlflow: MlflowConfig = MlflowConfig()


class Arm(Section):
    """One column of a study: a name, and what differs from the base."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    """Short name; it becomes a folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of this arm, nested or dotted: {batch.global_size: 512}."""


class StudySection(Section):
    """Arms x seeds."""

    name: str = "study"
    """Title of the study."""
    question: str = ""
    """What the study is meant to answer; printed at the head of its report."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds; every arm is run with each, and arms are compared seed by seed."""
    baseline: str = ""
    """Name of the arm the others are compared with (empty: the first)."""
    arms: tuple[Arm, ...] = Field(default=(), min_length=1)
    """The arms: a list of {name, set}."""


class StudyConfig(RunConfig):
    """A study: the settings of a run, and what varies over its arms."""

    study: StudySection

    @model_validator(mode="after")
    def _arms_are_runs(self) -> Self:
        names = [arm.name for arm in self.study.arms]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"study.arms names {doubled[0]} more than once: give every arm its own name")
        if len(set(self.study.seeds)) < len(self.study.seeds):
            raise ValueError(f"study.seeds ({list(self.study.seeds)}) holds a seed twice: list each once")
        if self.study.baseline and self.study.baseline not in names:
            raise ValueError(
                f"study.baseline ({self.study.baseline}) is no arm: choose one of {', '.join(names)}"
                + did_you_mean(self.study.baseline, names)
            )
        return self

    @property
    def baseline(self) -> str:
        """Name of the baseline arm."""
        return self.study.baseline or self.study.arms[0].name

    def run_config(self, arm: Arm, seed: int) -> RunConfig:
        """The settings of one run of the study.

        Raises:
            UsageError: if the arm's overrides are not settings of a run.
        """
        base = self.model_dump(mode="json", exclude={"study"})
        try:
            return validate(RunConfig, merge(merge(base, nested(arm.set)), {"seed": seed}))
        except UsageError as error:
            raise UsageError(f"study arm {arm.name}: {error}") from None


def did_you_mean(given: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint that names the nearest known word, or nothing.

    >>> did_you_mean("batch.globl_size", ["batch.global_size", "optim.lr"])
    ' (did you mean batch.global_size?)'
    """
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys opened into nested mappings; already nested ones stay.

    >>> nested({"batch.global_size": 8, "optim": {"lr": 0.1}})
    {'batch': {'global_size': 8}, 'optim': {'lr': 0.1}}
    """
    out: dict[str, Any] = {}
    for key, value in flat.items():
        head, _, tail = key.partition(".")
        if tail:
            value = nested({tail: value})
        elif isinstance(value, Mapping):
            value = nested(value)
        out = merge(out, {head: value})
    return out


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both hold a value, `high` wins.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def flat(config: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted names and JSON values.

    >>> flat({"optim": {"lr": 0.1}, "seed": 0})
    {'optim.lr': 0.1, 'seed': 0}
    """
    tree = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def differences(before: Mapping[str, Any], after: BaseModel) -> str:
    """The settings that make two runs different experiments, as a clause of a sentence; empty if there are none.

    >>> differences(RunConfig().model_dump(mode="json"), RunConfig(seed=3, optim=OptimConfig(lr=1.0)))
    'seed (3) was 0 and optim.lr (1.0) was 0.02'
    """
    old, new = flat(before), flat(after)
    names = [name for name in {**new, **old} if old.get(name) != new.get(name) and not name.startswith(MACHINERY)]
    return " and ".join(f"{name} ({new.get(name)}) was {old.get(name)}" for name in names)


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a model, sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from field_names(info.annotation, f"{prefix}{name}.")


def load_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as nested settings, on top of the files its `extends` names (relative to itself).

    Raises:
        UsageError: if a file is missing, is not YAML, is not a mapping, or extends itself.
    """
    path = path.resolve()
    if path in _chain:
        raise UsageError(f"--config: {path} extends itself by way of {_chain[-1]}: break the circle")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UsageError(f"--config ({path}) cannot be read: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "it is no text"
        raise UsageError(f"--config ({path}) is not YAML{where}: {what}; mend that line") from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config ({path}) holds a {type(tree).__name__}, needs settings such as `batch: ...`")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    below: dict[str, Any] = {}
    for parent in parents:
        below = merge(below, load_yaml(path.parent / parent, (*_chain, path)))
    return merge(below, nested({str(key): value for key, value in tree.items()}))


def validate(model: type[C], tree: Mapping[str, Any]) -> C:
    """Nested settings as a checked config.

    Raises:
        UsageError: one sentence on the first thing that is wrong, with the nearest known name for an unknown key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_sentence(model, error)) from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    first, *more = error.errors()
    *path, last = first["loc"] or ("",)
    name = ".".join(map(str, path if isinstance(last, int) else [*path, last]))  # the list, not its first element
    rest = f" ({len(more)} more to mend)" if more else ""
    match first["type"]:
        case "extra_forbidden":
            return f"{name} is no setting{did_you_mean(name, [*field_names(model)])}: see --help for all of them{rest}"
        case "value_error":  # our own validators already speak in whole sentences
            return str(first["ctx"]["error"]) + rest if "ctx" in first else first["msg"]
        case "missing":
            return f"{name} is not set and has no default: add it to the config{rest}"
        case "too_short" if name == "study.arms":
            return f"study.arms is empty: list at least one arm as {{name: ..., set: {{...}}}}{rest}"
    rule = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} ({first['input']}) is not valid: {rule}{rest}"


def resolve(model: type[C], files: list[Path], overrides: Mapping[str, Any]) -> C:
    """Defaults, then YAML files in order, then overrides, as one checked config.

    Raises:
        UsageError: see `load_yaml` and `validate`.
    """
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, load_yaml(file))
    return validate(model, merge(tree, overrides))


def to_yaml(config: BaseModel) -> str:
    """The config as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
