"""Every setting of a run and of a study: typed, documented, checked, frozen.

A setting's docstring is its `--help` text. Values come from the defaults below, then from YAML files (`extends` names
the files a file builds on), then from the command line; `resolve` puts the three together. Nothing heavy is imported
here, so that `--help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
    WrapValidator,
    model_validator,
)


def _one_or_many(value: Any) -> Any:
    """A single number where a list may stand."""
    return value if isinstance(value, list | tuple) else (value,)


def _number_or_auto(value: Any, check: Callable[[Any], int | Literal["auto"]]) -> int | Literal["auto"]:
    """One sentence where each side of the union would have its own."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            f"batch.micro_size ({value}) is no whole number greater than 0, and not auto: choose a number of samples, "
            "or auto"
        ) from None


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
    augment: tuple[Literal["crop", "flip", "cutout"], ...] = ()
    """Training augmentations, in this order: crop (a shift, zeros come in), flip (left-right), cutout (a square of
    mean grey; DeVries & Taylor 2017)."""
    crop_padding: PositiveInt = 4
    """Most pixels by which crop shifts a picture."""
    cutout_size: PositiveInt = 16
    """Side of cutout's square, in pixels."""
    memory_gib: PositiveFloat = 8.0
    """Largest data set that is held in memory, in GiB per rank."""
    streaming: bool = False
    """imagefolder: read pictures when a step needs them, not all before the first: for folders larger than memory."""
    workers: PositiveInt = 4
    """Threads of a rank that read pictures ahead when data.streaming is set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the images are while GPUs train: cuda, in the memory of each GPU; cpu, in the machine's, from which they
    are gathered ahead and copied through pinned memory; auto: cuda, if they take at most half of what is free there."""

    @model_validator(mode="after")
    def _augmentations_fit(self) -> Self:
        if "cutout" in self.augment and self.cutout_size > self.image_size:
            raise ValueError(
                f"data.cutout_size ({self.cutout_size}) is larger than the pictures of data.image_size "
                f"({self.image_size}): choose at most {self.image_size}"
            )
        if "crop" in self.augment and self.crop_padding >= self.image_size:
            raise ValueError(
                f"data.crop_padding ({self.crop_padding}) can shift a picture of {self.image_size} pixels out of "
                f"sight: choose less than {self.image_size}"
            )
        if self.streaming and self.device == "cuda":
            raise ValueError(
                "data.device (cuda) keeps all images in a GPU's memory, and data.streaming (true) leaves them on disk: "
                "set data.device=auto, or data.streaming=false"
            )
        if self.streaming and self.name != "imagefolder":
            raise ValueError(
                f"data.streaming (true) reads image folders, and {self.name} is held in memory: "
                "set data.streaming=false, or data.name=imagefolder"
            )
        return self


class ModelConfig(Section):
    """Which network."""

    name: str = "lenet5"
    """lenet5, vgg16, resnet20, resnet44, resnet56, resnet110, f1, c1, mlp, torchvision:NAME, timm:NAME, or
    module.path:factory of your own, called with num_classes and in_channels."""
    widths: tuple[PositiveInt, ...] = (512, 512, 512, 512, 512)
    """Hidden widths of the mlp."""
    activation: Literal["relu", "linear"] = "relu"
    """Non-linearity of lenet5 and of the mlp; linear has none, a control."""
    norm: Literal["local", "ghost", "sync", "group", "none"] | None = None
    """What becomes of the network's batch norm. local: statistics of each rank's micro-batch, so the result depends on
    the number of ranks and on batch.micro_size; ghost: of batch.ghost_size consecutive samples of the global batch;
    sync: of the whole global batch; group: group norm instead, of each sample; none: left out. null: ghost if
    batch.ghost_size is set, else local."""


class BatchConfig(Section):
    """The global batch and how a rank cuts its part of it."""

    global_size: PositiveInt = 64
    """Samples behind one optimizer step, summed over all ranks. The gradient is their exact mean."""
    micro_size: Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto)] = 128
    """Most samples in one forward and backward pass of one rank: speed and memory. Small ones fit a CPU's cache; on a
    GPU choose the largest that fits, or let a run find the fastest that fits: auto measures some, takes the same on all
    ranks, and remembers it for this network on this machine. Only model.norm=local makes the result depend on it, and
    is refused with auto."""
    ghost_size: PositiveInt | None = None
    """Samples in a group of model.norm=ghost."""

    @property
    def max_micro_size(self) -> int:
        """`micro_size`, which is a number once a run has settled it (`planning.micro_size`)."""
        assert isinstance(self.micro_size, int), "batch.micro_size=auto is settled before anything asks for the number"
        return self.micro_size

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
            if self.micro_size != "auto" and self.micro_size < ghost:
                raise ValueError(
                    f"batch.micro_size ({self.micro_size}) is smaller than one ghost group of {ghost}: "
                    f"choose at least {ghost}, or a smaller batch.ghost_size"
                )
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """Optimizer: sgd (with momentum), adamw, or lars and lamb, which are sgd and adam with each layer's rate in
    proportion to the layer's weights."""
    lr: PositiveFloat = 0.02
    """Learning rate at optim.base_size when optim.scaling is set, else the rate itself."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum for sgd and lars."""
    momentum_correction: bool = True
    """When the rate changes, rescale what momentum remembers with it (Goyal et al. 2017, remark 2); false: the
    gradients it remembers keep the rates of their own steps. sgd and lars."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (sgd, lars) or decoupled decay (adamw, lamb). lars and lamb spare biases and norm parameters."""
    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of the global gradient: a longer one is scaled down to it."""
    scaling: Literal["none", "linear", "sqrt", "legw"] = "none"
    """How the rate follows the global batch, k = B / optim.base_size: lr * k (linear), lr * sqrt(k) (sqrt), or
    lr * sqrt(k) with k times the warm-up (legw)."""
    base_size: PositiveInt | None = None
    """Global batch at which optim.lr holds; needed when optim.scaling is not none, and by train.length_unit=updates."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the rate rises from near 0 to its full value."""
    schedule: Literal["constant", "step", "cosine", "polynomial", "grow"] = "constant"
    """What the rate does after warm-up: stays; is multiplied by optim.gamma at each milestone (step); falls to 0 at the
    last step, along a half cosine or as a power of what is left (polynomial); or stays while the global batch is
    divided by optim.gamma at each milestone (grow; Smith et al. 2018)."""
    milestones: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = (0.5, 0.75)
    """Shares of the run after which step and grow act."""
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What step multiplies the rate by, and grow divides the batch by."""
    power: PositiveFloat = 2.0
    """Of polynomial: rate * (1 - t)^power, t the share of the steps after warm-up that are done."""

    @model_validator(mode="after")
    def _rules_have_what_they_need(self) -> Self:
        if self.scaling != "none" and self.base_size is None:
            raise ValueError(
                f"optim.scaling ({self.scaling}) needs the batch at which optim.lr holds: set optim.base_size, "
                "for example to the baseline's batch.global_size"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov (true) needs momentum: set optim.momentum above 0")
        if not self.momentum_correction and self.name not in ("sgd", "lars"):
            raise ValueError(
                f"optim.momentum_correction (false) is for sgd and lars, not for {self.name}: leave it true"
            )
        if not self.momentum_correction and self.nesterov:
            raise ValueError(
                "optim.nesterov (true) looks ahead by the momentum that optim.momentum_correction (false) changes: "
                "set one of them the other way"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones ({list(self.milestones)}) do not rise: list each share once, in order")
        if self.schedule == "grow" and abs(1 / self.gamma - round(1 / self.gamma)) > 1e-9:
            raise ValueError(
                f"optim.gamma ({self.gamma}) makes the batch grow by {1 / self.gamma:.3g}, which is no whole number: "
                "choose 0.5, 0.2, 0.1 or the like"
            )
        return self


class TrainConfig(Section):
    """How long and in which precision."""

    epochs: PositiveInt = 5
    """Passes over the training images."""
    length_unit: Literal["epochs", "updates"] = "epochs"
    """What train.epochs grants: so many passes, or the number of updates that a global batch of optim.base_size would
    make in them (regime adaptation; Hoffer et al. 2017), warm-up epochs counting likewise."""
    steps: PositiveInt | None = None
    """Optimizer steps; when set, train.epochs is not used."""
    target_accuracy: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Validation accuracy to reach: the result says after how many updates and epochs it was."""
    stop_at_target: bool = False
    """End the run there."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of parameters, activations and gradients."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Precision of matrix products and convolutions in training, if not train.dtype; parameters keep theirs. float16
    (GPU only) scales the loss so that small gradients survive."""
    tf32: bool = False
    """Let GPUs round the inputs of float32 matrix products and convolutions to 10 bits of mantissa (TF32): faster, but
    ranks and micro-batches then change the result by about 1e-3. Probes never do."""
    channels_last: bool | Literal["auto"] = False
    """Keep images and convolutions in NHWC order, which some hardware computes faster; auto measures both orders and
    remembers the answer for this network on this machine."""
    compile: bool = False
    """Compile the network with torch.compile; a CPU needs a C++ compiler for that."""
    activation_checkpointing: bool = False
    """Forget activations inside blocks and compute them again in the backward pass: less memory, a third more time."""
    deterministic: bool = False
    """Allow only operations that give the same bits every time; CPUs do so anyway."""
    num_evals: PositiveInt = 20
    """Validation passes, spread evenly over the run: as many for every arm, so that picking the best is fair."""
    log_every: PositiveInt = 1
    """Record every k-th step's loss, accuracy, learning rate and gradient norm."""


class AlgorithmConfig(Section):
    """What is added to plain training to win the accuracy of small batches back, or to test what costs it."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target that is spread over all classes."""
    sam_rho: PositiveFloat | None = None
    """Take the gradient at w + rho g / |g|, g the global batch's (SAM; Foret et al. 2021): two passes a step."""
    gradient_penalty: PositiveFloat | None = None
    """Add c/2 times the mean of |g_b|^2 over groups of algorithm.penalty_size samples to the loss (Geiping et al. 2022;
    Novack et al. 2023), by forward difference: two passes a step."""
    penalty_size: PositiveInt | None = None
    """Consecutive samples of the global batch behind one g_b of the gradient penalty."""
    rank_penalty: PositiveFloat | None = None
    """Add this times algorithm.rank_measure, summed over algorithm.rank_layers, to the loss: it raises the rank of
    their activations over the global batch directly, which tells cause from correlation. One more forward pass a
    step."""
    rank_measure: Literal["logdet", "spread"] = "logdet"
    """Of the eigenvalues of the activations' D x D covariance, divided by their mean: minus the mean log (logdet), or
    the variance (spread)."""
    rank_layers: tuple[str, ...] = ("auto",)
    """Layers that the rank penalty holds for, as in probe.layers; convolutions by channel."""
    weight_averaging: Literal["ema", "swa"] | None = None
    """Evaluate and probe an average of the weights: exponential (ema), or of all since algorithm.average_start
    (swa)."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    """What a step keeps of the exponential average."""
    average_start: float = Field(default=0.75, ge=0.0, lt=1.0)
    """Share of the run before swa begins to average."""
    local_sgd: Literal["post_local_sgd", "swap"] | None = None
    """In the last part of the run algorithm.workers networks step on their own, with an equal share of the global batch
    each. post_local_sgd (Lin et al. 2020) averages them every algorithm.local_steps; swap (Gupta et al. 2020) gives
    each an order of its own, and the rate that optim.scaling has for its share, and never puts them together. Their
    average is what is evaluated."""
    workers: Annotated[int, Field(ge=2)] = 4
    """Networks of algorithm.local_sgd, whatever the number of ranks."""
    local_start: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of the run before algorithm.local_sgd begins."""
    local_steps: PositiveInt = 8
    """Steps between two averages of post_local_sgd."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.gradient_penalty is None) != (self.penalty_size is None):
            given, needed = ("gradient_penalty", "penalty_size")[:: 1 if self.gradient_penalty else -1]
            raise ValueError(f"algorithm.{given} ({getattr(self, given)}) needs algorithm.{needed}: set both, or none")
        directions = [
            name for name in ("sam_rho", "gradient_penalty", "rank_penalty") if getattr(self, name) is not None
        ]
        if "gradient_penalty" in directions and len(directions) > 1:
            other = next(name for name in directions if name != "gradient_penalty")
            raise ValueError(
                f"algorithm.gradient_penalty and algorithm.{other} both say how a step's gradient is made: choose one"
            )
        if self.weight_averaging and self.local_sgd:
            raise ValueError(
                f"algorithm.weight_averaging ({self.weight_averaging}) and algorithm.local_sgd "
                f"({self.local_sgd}) both say which network is evaluated: choose one"
            )
        return self


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
    max_time_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.05
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
    diagnostics: tuple[Literal["noise_scale", "norms", "weights", "neural_collapse", "hessian", "keskar"], ...] = (
        "noise_scale", "norms", "weights", "neural_collapse",
    )  # fmt: skip
    """Other explanations to measure beside it: noise_scale (of the gradient), norms (distance from initialisation,
    update), weights (their spectra), neural_collapse (NC1); and, many times as dear as the probe itself, hessian (top
    eigenvalues and trace) and keskar (sharpness)."""


class LaunchConfig(Section):
    """Where the ranks come from."""

    launcher: Literal["auto", "local", "torchrun", "ray"] = "auto"
    """local starts the ranks itself; torchrun joins those already started (by torchrun, deepspeed or the like); ray
    asks a Ray cluster for them; auto looks at the environment (ray under `ray job submit`)."""
    num_processes: PositiveInt = 1
    """Ranks that local or ray start (torchrun decides for itself)."""
    max_processes: PositiveInt | None = None
    """ray: any number of ranks from launch.num_processes to this one will do, as the cluster has room; the global batch
    stays."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo), cuda (NCCL, one GPU a rank), or auto: cuda when every local rank can have one; under ray, when the
    nodes that are there at the start have one for each of launch.num_processes ranks."""
    strategy: Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"] = "auto"
    """How gradients become one update: single (one rank), ddp, DeepSpeed's ZeRO stages, or torch's FSDP2, which shards
    parameters too; auto is single on one rank and ddp on more."""
    timeout_seconds: PositiveInt = 600
    """How long a rank waits for the others before it gives up."""
    stall_report_seconds: PositiveFloat = 60.0
    """How long a rank waits before it says which rank it waits for, and where that one is."""
    memory_snapshot: bool = False
    """On a GPU: record allocations, and when memory runs out write OUT/memory/rank<R>.pickle, which
    pytorch.org/memory_viz shows."""
    ray_address: str | None = None
    """ray: the cluster, host:port or ray://host:port; null takes RAY_ADDRESS, a cluster that is here, or starts one."""
    resources_per_rank: dict[str, PositiveFloat] = {}
    """ray: what a rank takes, such as {CPU: 4}; beside what it names one CPU, and a GPU for ranks that compute on one.
    Naming GPU makes cuda of launch.device=auto."""
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
    flush_timeout_seconds: NonNegativeFloat = 60.0
    """How long a finished command waits for a slow server before it leaves the rest to `gengap report sync`."""
    log_model: bool = True
    """Log the final network of a finished run, with its signature, as a model that MLflow loads and serves."""
    system_seconds: PositiveFloat | None = 10.0
    """Seconds between two samples of a node's CPU, memory, disk, network and GPUs; null takes none."""


class RunConfig(Section):
    """One training run."""

    seed: NonNegativeInt = 0
    """Seed of initialisation, sample order and augmentation."""
    profile: bool = False
    """Trace a few steps of every rank, and say in OUT/profile where their time goes."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    probe: ProbeConfig = ProbeConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @property
    def norm(self) -> str:
        """`model.norm`, or what null stands for.

        >>> RunConfig().norm, RunConfig(batch=BatchConfig(ghost_size=32)).norm
        ('local', 'ghost')
        """
        return self.model.norm or ("ghost" if self.batch.ghost_size else "local")

    @model_validator(mode="after")
    def _norm_fits_batch(self) -> Self:
        if (self.norm == "ghost") != bool(self.batch.ghost_size):
            raise ValueError(
                "model.norm (ghost) needs the size of its groups: set batch.ghost_size, for example to the baseline's "
                "batch.global_size"
                if self.norm == "ghost"
                else f"batch.ghost_size ({self.batch.ghost_size}) is for model.norm=ghost, not for {self.norm}: set "
                "batch.ghost_size=null, or model.norm=ghost"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits_schedule(self) -> Self:
        train, optim = self.train, self.optim
        if train.length_unit == "updates" and (optim.base_size is None or train.steps):
            what = "is of no use beside train.steps" if train.steps else "needs the batch whose updates are counted"
            raise ValueError(
                f"train.length_unit (updates) {what}: set optim.base_size and train.epochs, not train.steps"
            )
        if optim.schedule == "grow" and (train.steps or train.length_unit == "updates"):
            raise ValueError(
                "optim.schedule (grow) changes how many updates an epoch has: set train.epochs, with "
                "train.length_unit=epochs and train.steps=null"
            )
        if train.stop_at_target and train.target_accuracy is None:
            raise ValueError("train.stop_at_target (true) needs a target: set train.target_accuracy")
        if (train.target_accuracy is not None) and not self.data.val_fraction:
            raise ValueError(
                f"train.target_accuracy ({train.target_accuracy}) is reached on validation images, and "
                "data.val_fraction is 0: hold some out"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits_batch(self) -> Self:
        algorithm, batch, size = self.algorithm, self.batch, self.algorithm.penalty_size
        too_small = size and batch.micro_size != "auto" and batch.micro_size < size
        if size and (batch.global_size % size or size % (batch.ghost_size or 1) or too_small):
            raise ValueError(
                f"algorithm.penalty_size ({size}) must divide batch.global_size ({batch.global_size}), be a multiple "
                f"of batch.ghost_size ({batch.ghost_size}) if that is set, and fit into batch.micro_size "
                f"({batch.micro_size}): choose another"
            )
        if size and self.norm == "sync":
            raise ValueError(
                "algorithm.gradient_penalty takes gradients of groups, and model.norm (sync) ties all samples together"
                f": choose model.norm=ghost with batch.ghost_size={size}, or another norm"
            )
        if algorithm.local_sgd and self.norm == "sync":
            raise ValueError(
                f"algorithm.local_sgd ({algorithm.local_sgd}) lets networks step on their own, and model.norm (sync) "
                "ties them together: choose model.norm=ghost, or another norm"
            )
        group = size or batch.ghost_size
        if algorithm.local_sgd and batch.global_size % (algorithm.workers * (group or 1)):
            raise ValueError(
                f"batch.global_size ({batch.global_size}) cannot be split evenly among algorithm.workers "
                f"({algorithm.workers})"
                + (
                    f" in groups of {'algorithm.penalty_size' if size else 'batch.ghost_size'} ({group})"
                    if group
                    else ""
                )
                + f": choose a multiple of {algorithm.workers * (group or 1)}"
            )
        if algorithm.local_sgd and self.optim.schedule == "grow":
            raise ValueError(
                f"algorithm.local_sgd ({algorithm.local_sgd}) has a fixed batch: choose another optim.schedule "
                "than grow"
            )
        return self
