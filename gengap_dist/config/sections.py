"""Every setting of a run and of a study: typed, documented, checked, frozen.

A setting's docstring is its `--help` text. Values come from the defaults below, then from YAML files (`extends` names
the files that a file builds on), then from the command line; `resolve` merges the three. This module imports no large
package, so `--help` is fast.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_serializer,
    model_validator,
)

from gengap_dist.config import batch_rules, measures
from gengap_dist.config.loading import merge, user_path
from gengap_dist.config.numbers import (
    Boolean,
    Integer,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
)
from gengap_dist.credentials import check_address, without_logins
from gengap_dist.errors import did_you_mean

DEFAULT_EPS = 1e-8
"""Of Adam."""
Beta = Annotated[Number, Field(ge=0.0, lt=1.0)]


def _not_empty(value: Any) -> Any:
    """What Path would take for the current folder is refused."""
    return user_path(value) if value == "" else value


UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(user_path)]
"""A path in a file or on the command line."""


def _one_or_many(value: Any) -> Any:
    """Accept a single value in place of a list."""
    return value if isinstance(value, list | tuple) else (value,)


def _number_or_auto(value: Any, check: Callable[[Any], int | Literal["auto"]]) -> int | Literal["auto"]:
    """Raise one error sentence in place of one for each member of the union."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            f"batch.micro_size ({value}) is not a positive integer and not auto: choose a number of samples, or auto"
        ) from None


def _size_or_auto(value: Any, check: Callable[[Any], int | Literal["auto"]]) -> int | Literal["auto"]:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            f"probe.num_samples ({value}) is not an integer of 2 or more and not auto: choose numbers of "
            "samples, or auto"
        ) from None


def _losses(value: Any) -> Any:
    """Accept a single value in place of a list; off, which is false in YAML, and null: no losses."""
    values = _one_or_many(value)
    return () if [*values] in (["off"], [False], [None]) else values


def _loss_or_auto(value: Any, check: Callable[[Any], float | Literal["auto"]]) -> float | Literal["auto"]:
    try:
        return check(value)
    except ValidationError:
        raise ValueError(
            f"probe.at_losses ({value}) is not a positive number, auto or off: choose losses such as [1, 0.1], or one "
            "of the words"
        ) from None


Effect = Literal["result", "observation", "runtime"]
"""result: what a run computes; observation: what is recorded about it; runtime: how and where it is executed."""


@dataclass(frozen=True)
class Affects:
    """Says in the annotation of a field what the setting affects, if that is not what its section affects."""

    effect: Effect


class FrozenModel(BaseModel):
    """Base class of settings, options and cached files: frozen, refuses unknown keys, numbers are finite.

    Docstrings of fields are help.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Section(FrozenModel):
    """Base class of all sections of a config. Each says what its settings affect; a field may differ by `Affects`.

    Nothing else decides what makes two runs the same experiment: `config/identity.py` derives all answers from it.
    """

    affects: ClassVar[Effect]

    def __init_subclass__(cls, *, affects: Effect | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if affects is not None:
            cls.affects = affects
        assert hasattr(cls, "affects"), f"class {cls.__name__} does not say what its settings affect: add affects=..."


class DataConfig(Section, affects="result"):
    """The data set, its split and its augmentation."""

    name: str = "digits"
    """digits (part of the package), mnist, fashion_mnist, cifar10, cifar100 or imagefolder (read from data.root); for
    language models stdlib (the .py files of Python's standard library), text (all UTF-8 files below data.root), both as
    bytes, or tokens (ids in data.root/train.npy and test.npy, or .bin); or your own module.path:factory, which returns
    {"train": ..., "val": ..., "test": ...}: data sets of torch or Hugging Face with inputs and targets in each sample,
    or pairs of arrays. Without val, data.val_fraction of train are held out; without test, a tenth."""
    root: Annotated[UserPath, Affects("runtime")] = Path("data")
    """Folder that holds the data set's files (not used by digits and stdlib)."""
    download: Annotated[Boolean, Affects("runtime")] = False
    """Let torchvision download missing files into data.root."""
    image_size: PositiveInt = 32
    """Height and width of the images, in pixels: imagefolder resizes to it, all others are padded with zeros."""
    context: Annotated[Integer, Field(ge=2)] = 128
    """stdlib, text and tokens: tokens in a sequence, which is one sample. Documents are packed: a sequence may hold
    several of them, or a part of one."""
    vocab_size: PositiveInt | None = None
    """tokens: number of different ids; bytes have 256, and one for the end of a document. Your own integer inputs: null
    is the largest plus one."""
    num_train: PositiveInt | None = None
    """Number of training samples that are used, drawn at random without replacement from those that are not held out
    for validation; null: all of them. Smaller numbers give subsets of larger ones. Of tokens, validation and test then
    have at most their share of this number. Default for stdlib: 2,048."""
    subset: Literal["fixed", "per_seed"] = "fixed"
    """What draws the images of data.num_train. fixed: data.split_seed, the same for all seeds; per_seed:
    data.split_seed and the seed of the run, so that all arms of a seed have the same images."""
    val_fraction: Number = Field(default=0.1, ge=0.0, lt=1.0)
    """Fraction of the training samples held out for validation (0 to 1); 0: no validation set. Text is held out by
    document, tokens at the end of their file."""
    split_seed: NonNegativeInt = 0
    """Seed of the train/validation split, the subset and the probe set: the same for all seeds and arms of a study."""
    shuffle_labels: Boolean = False
    """Permute the labels of the training images at random, as a control: the network can only memorize them."""
    augment: tuple[measures.Augmentation, ...] = ()
    """Training augmentations, applied in this order: resized_crop (a random part, enlarged; Szegedy et al. 2015) or
    crop (random shift with zero padding), flip (horizontal), rand_augment (random operators; Cubuk et al. 2019), cutout
    (a random square set to the mean; DeVries & Taylor 2017), and, for classification, mixup and cutmix (mixes with
    another training image; Zhang et al. 2018, Yun et al. 2019), of which each image gets one if both are named."""
    resized_crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Smallest and largest share of the area of an image that resized_crop takes (0 to 1)."""
    resized_crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a resized_crop."""
    rand_augment_ops: PositiveInt = 2
    """Number of operators that rand_augment applies to an image."""
    rand_augment_magnitude: Annotated[Integer, Field(ge=0, le=30)] = 9
    """Strength of the operators of rand_augment (0 to 30)."""
    mixup_alpha: PositiveFloat = 0.2
    """mixup takes the share lambda of an image, and 1 - lambda of the other: from Beta(alpha, alpha)."""
    cutmix_alpha: PositiveFloat = 1.0
    """cutmix replaces a box of the share 1 - lambda of an image: lambda from Beta(alpha, alpha)."""
    crop_padding: PositiveInt = 4
    """Largest shift of crop in each direction, in pixels."""
    cutout_size: PositiveInt = 16
    """Side of the square of cutout, in pixels."""
    memory_gib: Annotated[PositiveFloat, Affects("runtime")] = 8.0
    """Largest data set that is loaded into memory, in GiB per rank. A larger data set of your own is read during
    training, with the same result."""
    streaming: Boolean = False
    """imagefolder and your own data sets: read samples during training, not all before it: for those larger than
    memory."""
    workers: Annotated[PositiveInt, Affects("runtime")] = 4
    """Number of threads per rank that prefetch images when data.streaming is set; of processes, for your own data sets
    (at most one for each core)."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Affects("runtime")] = "auto"
    """Memory that holds the images when GPUs train: cuda, that of each GPU; cpu, that of the host, from which batches
    are prefetched and copied through pinned memory; auto: cuda if the images take at most half of its free memory, else
    cpu."""

    @property
    def is_own(self) -> bool:
        """Whether `name` is a user's own factory."""
        return ":" in self.name

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if not self.is_own and self.name not in measures.DATA_SETS:
            raise ValueError(
                f"data.name ({self.name}) is not a data set{did_you_mean(self.name, measures.DATA_SETS)}: choose one "
                f"of {', '.join(measures.DATA_SETS)}, or your own module.path:factory"
            )
        return self

    @property
    def is_tokens(self) -> bool:
        """Whether samples are sequences of tokens."""
        return self.name in measures.TOKEN_SETS

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if not self.is_own and (self.name == "tokens") != (self.vocab_size is not None):
            raise ValueError(
                "data.name (tokens) needs the number of different ids: set data.vocab_size"
                if self.name == "tokens"
                else f"data.vocab_size ({self.vocab_size}) is for data.name=tokens, not for {self.name}: set it to null"
            )
        if self.is_tokens and (self.augment or self.shuffle_labels):
            setting = "augment" if self.augment else "shuffle_labels"
            raise ValueError(
                f"data.{setting} has no effect on tokens, which {self.name} has: leave data.{setting} at its default"
            )
        return self

    @model_validator(mode="after")
    def _check_subset(self) -> Self:
        if self.subset != "fixed" and self.num_train is None:
            raise ValueError(
                f"data.subset ({self.subset}) needs the size of the subset: set data.num_train, or data.subset=fixed"
            )
        return self

    @model_validator(mode="after")
    def _check_augmentation_and_storage(self) -> Self:
        if "cutout" in self.augment and self.cutout_size > self.image_size:
            raise ValueError(
                f"data.cutout_size ({self.cutout_size}) is larger than the images of data.image_size "
                f"({self.image_size}): choose at most {self.image_size}"
            )
        if "crop" in self.augment and "resized_crop" in self.augment:
            raise ValueError("data.augment names crop and resized_crop, which both shift images: choose one of them")
        for name, largest in (("resized_crop_scale", 1.0), ("resized_crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not low <= high <= largest:
                raise ValueError(
                    f"data.{name} ([{low:g}, {high:g}]) is no range: give the smaller number first"
                    + (", and at most 1" if largest == 1.0 else "")
                )
        if "crop" in self.augment and self.crop_padding >= self.image_size:
            raise ValueError(
                f"data.crop_padding ({self.crop_padding}) can shift an image of {self.image_size} pixels out of "
                f"view: choose less than {self.image_size}"
            )
        if self.streaming and self.device == "cuda":
            raise ValueError(
                "data.device (cuda) keeps all images in a GPU's memory, and data.streaming (true) leaves them on disk: "
                "set data.device=auto, or data.streaming=false"
            )
        if self.streaming and self.name != "imagefolder" and not self.is_own:
            raise ValueError(
                f"data.streaming (true) reads image folders and your own data sets only, and {self.name} is loaded "
                "into memory: set data.streaming=false, or data.name=imagefolder"
            )
        return self


class TaskConfig(Section, affects="result"):
    """What the network learns: its loss, and the metric that runs are compared by."""

    name: str = "classification"
    """classification (cross-entropy, accuracy), language_modeling (the next token: cross-entropy, perplexity; the task
    of stdlib, text and tokens), or your own module.path:Class, a subclass of gengap_dist.training.tasks.Task."""


class ModelConfig(Section, affects="result"):
    """The network."""

    name: str = "lenet5"
    """lenet5, vgg16, resnet20, resnet44, resnet56, resnet110, f1, c1, mlp, gpt (for tokens), torchvision:NAME,
    timm:NAME, transformers:NAME (a model type, such as gpt2 or vit; random weights), or your own module.path:factory,
    which is called with those of input_shape, output_shape, widths, activation and options that it names, for images
    with classes also num_classes, in_channels and image_size."""
    options: dict[str, Any] = {}
    """Settings of the configuration of transformers:NAME, such as {n_layer: 2, n_embd: 64, n_head: 4}. Vocabulary,
    context, classes and image size are those of the data."""
    widths: tuple[PositiveInt, ...] = (512, 512, 512, 512, 512)
    """Units in each hidden layer of mlp."""
    depth: PositiveInt = 2
    """Blocks of gpt."""
    width: PositiveInt = 64
    """Units of the residual stream of gpt; its hidden layers have four times as many."""
    heads: PositiveInt = 4
    """Attention heads of gpt."""
    activation: Literal["relu", "linear"] = "relu"
    """Non-linearity of lenet5 and mlp; linear: none (a control)."""
    norm: measures.Norm | None = None
    """Statistics of the network's batch norm layers. local: of each rank's micro-batch, so the result depends on the
    number of ranks and on batch.micro_size; ghost: of batch.ghost_size consecutive samples of the global batch; sync:
    of the global batch; group: batch norm is replaced by group norm; none: it is removed. null: ghost if
    batch.ghost_size is set, else local."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"model.width ({self.width}) cannot be split into {self.heads} model.heads: choose a multiple of "
                f"{self.heads}, or another number of heads"
            )
        return self


class BatchChange(Section, affects="result"):
    """An entry of batch.schedule."""

    at: NonNegativeFloat
    """Where this size begins, in batch.schedule_unit."""
    size: PositiveInt
    """The global batch from there on, in samples."""


def _known_power(power: float) -> float:
    if power not in (0.0, 0.5, 0.6, 1.0):
        raise ValueError(f"batch.schedule_lr_power ({power:g}) is not known: choose 0, 0.5, 0.6 or 1")
    return power


def norm_rule(norm: object, ghost_size: object) -> str:
    """What `model.norm` amounts to: null is ghost with ghost groups, else local.

    >>> norm_rule(None, 64), norm_rule(None, None), norm_rule("sync", None)
    ('ghost', 'local', 'sync')
    """
    return str(norm or ("ghost" if ghost_size else "local"))


class BatchConfig(Section, affects="result"):
    """The global batch, and its split into micro-batches."""

    global_size: PositiveInt = 64
    """Samples per optimizer step, over all ranks. The gradient is the exact mean over them."""
    micro_size: Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto), Affects("runtime")] = 128
    """Largest number of samples in one forward and backward pass of one rank; sets speed and memory. On a CPU a small
    value fits the cache; on a GPU choose the largest that fits, or auto: it measures several sizes, takes the fastest
    for all ranks, and caches it for this network on this machine. The result depends on it only with model.norm=local,
    which refuses auto."""
    ghost_size: PositiveInt | None = None
    """Samples per group of model.norm=ghost."""
    schedule: tuple[BatchChange, ...] = ()
    """Global batches that follow one another, such as [{at: 0, size: 32}, {at: 100000, size: 64}]: each begins with the
    first step before which at least so much was done. The first is at 0, with batch.global_size, and sizes rise."""
    schedule_unit: Literal["samples", "steps", "epochs", "tokens"] = "samples"
    """Unit of batch.schedule: training samples, optimizer steps, passes over the training samples, or, for language
    models, tokens: data.context for each sequence, whether its targets are counted in the loss or not."""
    schedule_lr_power: Annotated[Number, AfterValidator(_known_power)] = 0.0
    """alpha (0, 0.5, 0.6 or 1): with batch.schedule the learning rate of a step is times (B / B0)^alpha, B its global
    batch and B0 the first."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """All global batches of the run, in order."""
        return tuple(change.size for change in self.schedule) or (self.global_size,)

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        ats, sizes = [change.at for change in self.schedule], self.sizes
        if ats and (ats[0] != 0 or sizes[0] != self.global_size):
            raise ValueError(
                f"batch.schedule begins at {ats[0]:g} with {sizes[0]}: begin at 0 with batch.global_size "
                f"({self.global_size})"
            )
        for before, after in zip(self.schedule, self.schedule[1:], strict=False):
            if after.at <= before.at:
                raise ValueError(
                    f"batch.schedule has {after.size} at {after.at:g} after {before.size} at {before.at:g}: list the "
                    "changes in order, each at a place of its own"
                )
            if after.size <= before.size:
                raise ValueError(
                    f"batch.schedule falls or stays, from {before.size} to {after.size} at {after.at:g}: choose sizes "
                    "that rise"
                )
        if self.schedule_unit != "epochs" and (parts := [at for at in ats if at % 1]):
            raise ValueError(
                f"batch.schedule has a change at {parts[0]:g} {self.schedule_unit}: choose whole numbers, or "
                "batch.schedule_unit=epochs"
            )
        return self

    @property
    def max_micro_size(self) -> int:
        """`micro_size` as a number, after `auto` is resolved."""
        assert isinstance(self.micro_size, int), "batch.micro_size=auto must be resolved before this is read"
        return self.micro_size

    @model_validator(mode="after")
    def _check_ghost_size(self) -> Self:
        ghost = self.ghost_size
        if ghost is not None:
            if ghost < 2:
                raise ValueError("batch.ghost_size (1) gives batch norm one sample for statistics: choose at least 2")
            if uneven := [size for size in self.sizes if size % ghost]:
                name = "batch.schedule" if self.schedule else "batch.global_size"
                raise ValueError(
                    f"{name} ({uneven[0]}) cannot be split into ghost groups of {ghost}: "
                    f"choose a multiple of {ghost}, or batch.ghost_size=null"
                )
            if self.micro_size != "auto" and self.micro_size < ghost:
                raise ValueError(
                    f"batch.micro_size ({self.micro_size}) is smaller than one ghost group of {ghost}: "
                    f"choose at least {ghost}, or a smaller batch.ghost_size"
                )
        return self


class OptimConfig(Section, affects="result"):
    """The optimizer and its learning rate."""

    name: str = "sgd"
    """Optimizer: sgd (with momentum), adamw, lars and lamb, which are sgd and adam with the learning rate of each
    layer scaled by the norm of its weights, muon (torch.optim.Muon for the matrices between embeddings and output
    layer, adamw for all other parameters), or your own module.path:factory, which is called with the network and with
    those of lr, momentum, nesterov, weight_decay, betas and eps that it names, and returns a torch.optim.Optimizer."""
    lr: PositiveFloat = 0.02
    """Learning rate; with optim.scaling, the learning rate at a global batch of optim.base_size. Groups of parameters
    with other rates keep their ratio to it."""
    adamw_lr: PositiveFloat = 0.001
    """muon: learning rate of the parameters that adamw updates; scaled and scheduled as optim.lr."""
    momentum: Number = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of sgd, lars and muon (0 to 1)."""
    nesterov: Boolean = False
    """Nesterov momentum for sgd, lars and muon."""
    momentum_correction: Boolean = True
    """sgd and lars: rescale the momentum buffer when the learning rate changes (Goyal et al. 2017, remark 2); false:
    each gradient in the buffer keeps the learning rate of its own step."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (sgd, lars) or decoupled decay (adamw, lamb, muon). lars and lamb exclude biases and norm
    parameters."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square per step (0 to 1), for adamw, lamb and adamw's
    part of muon."""
    eps: PositiveFloat | None = None
    """Added to the root of the averaged squared gradient, as optim.betas; null: 1e-8, with lamb 1e-6."""
    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of the gradient of the global batch; a larger gradient is scaled down to it. null: no clipping."""
    scaling: Literal["none", "linear", "sqrt", "legw", "adam_sqrt"] = "none"
    """Scaling of the learning rate with the global batch B, k = B / optim.base_size: lr * k (linear), lr * sqrt(k)
    (sqrt), lr * sqrt(k) and k times the warm-up epochs (legw), or, for adamw, lr * sqrt(k) with 1 - k (1 - beta) for
    each of optim.betas and eps / sqrt(k) (adam_sqrt; Malladi et al. 2022)."""
    beta2_scaling: Literal["none", "half_life"] = "none"
    """half_life: the second of optim.betas to the power of k, so that the average of squares forgets after as many
    samples at any batch (Marek et al. 2025)."""
    weight_decay_scaling: Literal["none", "linear"] = "none"
    """linear: decoupled weight decay times k (Bergsma et al. 2025)."""
    base_size: PositiveInt | None = None
    """Global batch that optim.lr is given for, in samples; required by optim.scaling, optim.beta2_scaling and
    optim.weight_decay_scaling other than none and by train.length_unit=updates."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Number of epochs in which the learning rate rises from near 0 to its full value."""
    schedule: measures.Schedule = "constant"
    """Learning rate after warm-up: constant; step: multiplied by optim.gamma at each milestone; cosine and polynomial:
    decays to 0 at the last step, along a half cosine or as (1 - t)^optim.power; wsd (warm-up, stable, decay): constant,
    then falls linearly to 0 in the last optim.decay_fraction of the run."""
    milestones: tuple[Annotated[Number, Field(gt=0.0, lt=1.0)], ...] = (0.5, 0.75)
    """Milestones of the step schedule, as fractions of the run (0 to 1)."""
    gamma: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.1
    """Factor of the step schedule for the learning rate."""
    power: PositiveFloat = 2.0
    """Exponent of the polynomial schedule: lr * (1 - t)^power, t the completed fraction of the steps after warm-up."""

    decay_fraction: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.2
    """Fraction of the steps of the run in which the wsd schedule falls (0 to 1)."""

    @property
    def is_own(self) -> bool:
        """Whether `name` is a user's own factory."""
        return ":" in self.name

    def batch_ratio(self, global_size: int) -> float:
        """K = B / base_size of a global batch B, the k of the rules; 1 without a base_size.

        >>> OptimConfig(base_size=8).batch_ratio(32), OptimConfig().batch_ratio(32)
        (4.0, 1.0)
        """
        return global_size / (self.base_size or global_size)

    def at_batch(self, global_size: int) -> Self:
        """The settings with betas, eps and weight decay as the rules have them at a global batch.

        The learning rate stays: the schedule scales it, see `lr_schedule`.

        >>> given = OptimConfig(name="adamw", weight_decay=0.1, base_size=8, weight_decay_scaling="linear")
        >>> given.at_batch(16).weight_decay
        0.2
        """
        k = self.batch_ratio(global_size)
        eps = self.eps or (DEFAULT_EPS if self.scaling == "adam_sqrt" else None)
        scaled: dict[str, Any] = {
            "betas": batch_rules.scaled_betas(self.scaling, self.beta2_scaling, self.betas, k),
            "eps": eps and batch_rules.scaled_eps(self.scaling, eps, k),
            "weight_decay": self.weight_decay * batch_rules.weight_decay_factor(self.weight_decay_scaling, k),
        }
        return self.model_copy(update=scaled)

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        known = get_args(measures.Optimizer)
        if not self.is_own and self.name not in known:
            raise ValueError(
                f"optim.name ({self.name}) is not an optimizer{did_you_mean(self.name, known)}: choose one of "
                f"{', '.join(known)}, or your own module.path:factory"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        for rule in ("scaling", "beta2_scaling", "weight_decay_scaling"):
            if (value := getattr(self, rule)) != "none" and self.base_size is None:
                raise ValueError(
                    f"optim.{rule} ({value}) needs the global batch that optim.lr is for: set optim.base_size, "
                    "for example to the baseline's batch.global_size"
                )
            if rule != "scaling" and value != "none" and self.name in ("sgd", "lars"):
                raise ValueError(
                    f"optim.{rule} ({value}) is for adamw, lamb and muon, not for {self.name}: set optim.{rule}=none"
                )
        if self.scaling == "adam_sqrt" and self.name != "adamw":
            raise ValueError(f"optim.scaling (adam_sqrt) is for adamw, not for {self.name}: choose optim.scaling=sqrt")
        if self.scaling == "adam_sqrt" and self.beta2_scaling != "none":
            raise ValueError(
                f"optim.beta2_scaling ({self.beta2_scaling}) and optim.scaling (adam_sqrt) both change the second of "
                "optim.betas: set optim.beta2_scaling=none, or choose optim.scaling=sqrt"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov (true) needs momentum: set optim.momentum above 0")
        if not self.momentum_correction and self.name not in ("sgd", "lars"):
            raise ValueError(
                f"optim.momentum_correction (false) is for sgd and lars, not for {self.name}: leave it true"
            )
        if not self.momentum_correction and self.nesterov:
            raise ValueError(
                "optim.nesterov (true) cannot be combined with optim.momentum_correction (false): change one of them"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"optim.milestones ({list(self.milestones)}) are not increasing: list each fraction once, in order"
            )
        return self


class TrainConfig(Section, affects="result"):
    """Length, precision and execution of training."""

    epochs: PositiveInt = 5
    """Passes over the training images. Default for digits: 20."""
    length_unit: Literal["epochs", "updates"] = "epochs"
    """Unit of train.epochs and optim.warmup_epochs: epochs are passes over the data; updates are the number of steps
    that a global batch of optim.base_size takes in these epochs (regime adaptation; Hoffer et al. 2017)."""
    steps: PositiveInt | None = None
    """Number of optimizer steps; replaces train.epochs when set."""
    tokens: PositiveInt | None = None
    """Length in tokens, for language models; replaces train.epochs when set: the run ends with the step in which so
    many are reached, data.context for each sequence."""
    target_accuracy: Annotated[Annotated[Number, Field(gt=0.0, le=1.0)] | None, Affects("observation")] = None
    """Target validation accuracy (0 to 1); the result reports the updates and epochs needed to reach it."""
    target_loss: Annotated[PositiveFloat | None, Affects("observation")] = None
    """Target validation loss, in place of train.target_accuracy, for any task."""
    stop_at_target: Boolean = False
    """Stop when train.target_accuracy or train.target_loss is reached."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of parameters, activations and gradients."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Precision of matrix products and convolutions in training; parameters stay in train.dtype. float16 (GPU only)
    scales the loss so that small gradients do not underflow. null: train.dtype."""
    tf32: Boolean = False
    """Allow TF32 on GPUs: inputs of float32 matrix products and convolutions are rounded to 10 mantissa bits. Faster,
    but the result then depends on ranks and micro-batches by about 1e-3. Probes never use TF32."""
    channels_last: Annotated[Boolean | Literal["auto"], Affects("runtime")] = False
    """Use the channels_last (NHWC) memory format, which is faster on some hardware; auto measures both formats and
    caches the faster one for this network on this machine."""
    compile: Annotated[Boolean, Affects("runtime")] = False
    """Compile the network with torch.compile; on a CPU this needs a C++ compiler."""
    activation_checkpointing: Annotated[Boolean, Affects("runtime")] = False
    """Recompute activations inside blocks in the backward pass: less memory, about a third more time."""
    deterministic: Boolean = False
    """Allow only deterministic operations (bitwise equal results); operations on a CPU always are."""
    num_evals: Annotated[PositiveInt, Affects("observation")] = 20
    """Number of validation passes, evenly spaced over the run: the same for every arm, so that the choice of the best
    checkpoint is fair."""
    log_every: Annotated[PositiveInt, Affects("observation")] = 1
    """Steps between two records of loss, accuracy, learning rate and gradient norm."""

    @property
    def has_target(self) -> bool:
        """Whether a validation score is to be reached."""
        return self.target_accuracy is not None or self.target_loss is not None


class AlgorithmConfig(Section, affects="result"):
    """Changes to plain training that recover the accuracy of small batches, or test why it is lost."""

    label_smoothing: Number = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the target that is spread evenly over all classes (0 to 1)."""
    sam_rho: PositiveFloat | None = None
    """rho of SAM (Foret et al. 2021): take the gradient at w + rho g / |g|, g of the global batch; two passes per
    step."""
    gradient_penalty: PositiveFloat | None = None
    """Coefficient c: add c/2 times the mean of |g_b|^2 over groups of algorithm.penalty_size samples to the loss
    (Geiping et al. 2022; Novack et al. 2023), by forward difference; two passes per step."""
    penalty_size: PositiveInt | None = None
    """Number of consecutive samples of the global batch in each group gradient g_b of the gradient penalty."""
    rank_penalty: Number | None = None
    """Strength: add this times algorithm.rank_measure, summed over algorithm.rank_layers, to the loss. Above 0 it
    raises the rank of their activations directly, below 0 it lowers it, to separate cause from correlation. Two passes
    more per step over algorithm.rank_images."""
    rank_measure: Literal[measures.RankMeasure, "placebo"] = "logdet"
    """Function of the eigenvalues of the D x D covariance of the activations: minus the mean log (logdet) or the
    variance (spread) of the eigenvalues divided by their mean; or (tr C / tr C0 - 1)^2, which holds the scale of
    activations at that of the untrained network (trace). placebo: a gradient as long as that of algorithm.placebo_of,
    which rotates the activations and leaves the eigenvalues where they are, to first order."""
    placebo_of: measures.RankMeasure | None = None
    """logdet, spread or trace: whose gradient norm algorithm.rank_measure=placebo has at every step, at the same
    strength (its sign plays no part). That of trace grows with the scale, which a placebo does not hold: such a run may
    diverge."""
    rank_layers: tuple[str, ...] = ("auto",)
    """Layers of the rank penalty, as in probe.layers; convolutions by channel."""
    rank_images: Annotated[Integer, Field(ge=2)] | None = None
    """Number of training images from which the rank penalty takes the covariance. In each step they are drawn anew, the
    same in all arms of a seed, whatever the batch, and are not augmented. null: 4 for each unit of the widest of
    algorithm.rank_layers, at most all."""
    weight_averaging: Literal["ema", "swa"] | None = None
    """Evaluate and probe an average of the weights: exponential (ema), or the mean of all steps after
    algorithm.average_start (swa)."""
    ema_decay: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.999
    """Decay of the exponential average per step (0 to 1)."""
    average_start: Number = Field(default=0.75, ge=0.0, lt=1.0)
    """Fraction of the run before swa starts to average (0 to 1)."""
    local_sgd: Literal["post_local_sgd", "swap"] | None = None
    """In the last part of the run algorithm.workers networks train independently, each with an equal part of the global
    batch. post_local_sgd (Lin et al. 2020) averages them every algorithm.local_steps; swap (Gupta et al. 2020) gives
    each network its own sample order and the learning rate that optim.scaling has for its part, and averages them only
    for evaluation. The average is evaluated."""
    workers: Annotated[Integer, Field(ge=2)] = 4
    """Number of networks of algorithm.local_sgd; it does not depend on the number of ranks."""
    local_start: Number = Field(default=0.5, ge=0.0, lt=1.0)
    """Fraction of the run before algorithm.local_sgd starts (0 to 1)."""
    local_steps: PositiveInt = 8
    """Steps between two averagings of post_local_sgd."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if (self.gradient_penalty is None) != (self.penalty_size is None):
            given, needed = ("gradient_penalty", "penalty_size")[:: 1 if self.gradient_penalty else -1]
            raise ValueError(f"algorithm.{given} ({getattr(self, given)}) needs algorithm.{needed}: set both, or none")
        directions = [
            name for name in ("sam_rho", "gradient_penalty", "rank_penalty") if getattr(self, name) is not None
        ]
        if "gradient_penalty" in directions and len(directions) > 1:
            other = next(name for name in directions if name != "gradient_penalty")
            raise ValueError(
                f"algorithm.gradient_penalty and algorithm.{other} both define the gradient of a step: choose one"
            )
        if self.weight_averaging and self.local_sgd:
            raise ValueError(
                f"algorithm.weight_averaging ({self.weight_averaging}) and algorithm.local_sgd "
                f"({self.local_sgd}) both define the evaluated network: choose one"
            )
        return self

    @model_validator(mode="after")
    def _check_rank_penalty(self) -> Self:
        strength, measure, of = self.rank_penalty, self.rank_measure, self.placebo_of
        if strength == 0:
            raise ValueError(
                "algorithm.rank_penalty (0) has no effect: choose a number above 0 to raise the rank, below 0 to lower "
                "it, or null"
            )
        if (measure == "placebo") != (of is not None):
            raise ValueError(
                "algorithm.rank_measure (placebo) needs the measure whose gradient norm it takes: set "
                "algorithm.placebo_of to logdet, spread or trace"
                if of is None
                else f"algorithm.placebo_of ({of}) is for algorithm.rank_measure=placebo, not for {measure}: set "
                "algorithm.placebo_of=null, or algorithm.rank_measure=placebo"
            )
        if measure == "trace" and strength is not None and strength < 0:
            raise ValueError(
                f"algorithm.rank_penalty ({strength:g}) would reward activations of any size under "
                "algorithm.rank_measure=trace, which has no upper bound: choose a number above 0, or logdet or spread"
            )
        return self


class ProbeConfig(Section, affects="observation"):
    """The near-rank-loss probe."""

    enabled: Boolean = True
    """Measure activation spectra while training."""
    num_samples: Annotated[
        tuple[Annotated[Annotated[Integer, Field(ge=2)] | Literal["auto"], WrapValidator(_size_or_auto)], ...],
        BeforeValidator(_one_or_many),
        Field(min_length=1),
    ] = ("auto",)
    """Number of training images in the fixed probe set. auto: 1,024, or more until every layer has eight rows for each
    of its units (views of flatten not counted), but at most the training set, and at most 1 GiB of inputs. Of several
    numbers the largest is the probe set; the first and the last measurement are repeated with each of the others, to
    separate rank from sample size."""
    own_batch: Boolean = False
    """At the first and the last measurement, also probe batch.global_size images: the matrix of the paper, whose
    singular values decrease with the batch even in an untrained network."""
    per_decade: PositiveInt | None = 3
    """Number of measurements per factor of ten in steps; step 0 and the last step are always measured."""
    every: PositiveInt | None = None
    """Steps between two additional measurements."""
    at_epochs: tuple[NonNegativeFloat, ...] = ()
    """Epochs of additional measurements; 0.5 is the middle of the first epoch."""
    at_losses: Annotated[
        tuple[Annotated[PositiveFloat | Literal["auto"], WrapValidator(_loss_or_auto)], ...], BeforeValidator(_losses)
    ] = ("auto",)
    """Additional measurements when the loss first falls below each of these values, so that arms can be compared at
    equal losses: the mean training loss without penalties and label smoothing, over the last 2,048 images. auto: 22
    values from 2 to 1e-4, each 0.62 times the one before; off: none."""
    max_time_fraction: Annotated[Number, Field(gt=0.0, le=1.0)] | None = 0.05
    """Largest fraction of the run's time for probes (0 to 1): above it, measurements between the first and the last are
    skipped, and the result lists them; eight, spread over those of probe.per_decade, probe.every and probe.at_epochs,
    are always taken. null: no limit."""
    layers: tuple[str, ...] = ("auto",)
    """`auto` (outputs of all non-linearities and residual blocks), or layer names; patterns such as `features.*` are
    allowed."""
    views: tuple[measures.View, ...] = ("channel", "token", "pool")
    """Reshaping of activations to a matrix. [N, C, H, W]: channel (N H W) x C, pool N x C (mean over H, W), flatten
    N x (C H W); tokens [N, T, D]: token (N T) x D, pool, flatten."""
    method: measures.Method = "gram"
    """gram (fast; singular values below 6e-8 of the largest are noise) or tsqr (slower; below 1e-14, for float64)."""
    memory_mib: PositiveInt = 512
    """Largest memory of the probe per rank, in MiB; wide layers use several passes over the images if necessary."""
    diagnostics: tuple[measures.Diagnostic, ...] = ("noise_scale", "norms", "weights", "neural_collapse")
    """Alternative explanations to measure: noise_scale (of the gradient), norms (distance from initialisation, update),
    weights (their spectra), neural_collapse (NC1); and, at many times the cost of the probe, hessian (top eigenvalues
    and trace) and keskar (sharpness)."""


RESOURCE_STEP = 1e-4  # Ray counts resources in this step, and cuts what is finer


class LaunchConfig(Section, affects="runtime"):
    """Processes, devices and communication."""

    launcher: Literal["auto", "local", "torchrun", "ray"] = "auto"
    """local starts the ranks on this machine; torchrun joins ranks that torchrun, deepspeed or a similar launcher
    started; ray starts them on a Ray cluster; auto chooses by environment variables (ray under `ray job submit`)."""
    num_processes: PositiveInt = 1
    """Number of ranks that local or ray starts (torchrun sets its own number)."""
    max_processes: PositiveInt | None = None
    """ray: largest number of ranks; the cluster's free resources decide between launch.num_processes and this number.
    The global batch does not change. null: exactly launch.num_processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu (gloo), cuda (NCCL, one GPU per rank), or auto: cuda if there is one GPU for every local rank; under ray, if
    the nodes have one for each of launch.num_processes ranks when the run starts."""
    strategy: Literal["auto", measures.Strategy] = "auto"
    """Parallel strategy: single (one rank), ddp, DeepSpeed's ZeRO stages, or fsdp (torch's FSDP2, which shards
    parameters too); auto is single on one rank and ddp on more."""
    shard_size: PositiveInt | None = None
    """fsdp: number of consecutive ranks that shard one copy of parameters, gradients and optimizer state; each such
    group has a copy (hybrid sharding, HSDP), and parameters are sent inside a group only. null: all ranks."""
    threads_per_rank: PositiveInt | None = None
    """Largest number of threads of a rank; null: the cores that this program may use (of the machine, its container or
    its job), divided among the ranks of the machine; under ray, the CPUs of launch.resources_per_rank."""
    timeout_seconds: PositiveInt = 600
    """Timeout of collectives, in seconds: a rank that waits longer for the others fails."""
    stall_report_seconds: PositiveFloat = 60.0
    """Seconds that a rank waits in a collective before it reports which rank blocks it, and in which phase."""
    memory_snapshot: Boolean = False
    """GPU: record allocations, and if memory runs out write OUT/memory/rank<R>.pickle for pytorch.org/memory_viz."""
    ray_address: Annotated[str, Field(min_length=1)] | None = None
    """ray: address of the cluster, host:port or ray://host:port; null: RAY_ADDRESS, else a cluster on this machine,
    else a new one."""
    resources_per_rank: dict[str, PositiveFloat] = {}
    """ray: resources of one rank, such as {CPU: 4}; the default is one CPU, and one GPU if ranks compute on GPUs.
    With GPU here, launch.device=auto means cuda. {GPU: 0.25} runs four runs of a study on one GPU, with one rank
    each."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """ray: placement strategy, on as few nodes as possible (PACK) or over many nodes (SPREAD)."""
    max_failures: NonNegativeInt = 3
    """ray: largest number of restarts from the last checkpoint after ranks failed."""

    @model_validator(mode="after")
    def _check_num_processes(self) -> Self:
        if self.max_processes is not None and self.max_processes < self.num_processes:
            raise ValueError(
                f"launch.max_processes ({self.max_processes}) is below launch.num_processes ({self.num_processes}): "
                "give the smaller number as launch.num_processes"
            )
        return self

    @model_validator(mode="after")
    def _check_resources(self) -> Self:
        for name, amount in self.resources_per_rank.items():
            if amount < RESOURCE_STEP:
                raise ValueError(
                    f"launch.resources_per_rank.{name} ({amount:g}) is less than Ray can count: choose "
                    f"{RESOURCE_STEP:g} or more"
                )
        gpus = self.resources_per_rank.get("GPU", 1.0)
        name = f"launch.resources_per_rank.GPU ({gpus:g})"
        if gpus > 1 and gpus % 1:
            raise ValueError(f"{name} is above one and not a whole number: choose {gpus // 1:g} or {gpus // 1 + 1:g}")
        if gpus >= 1:
            return self
        per_gpu = int(1 / gpus + 1e-9)
        if gpus <= 1 / per_gpu - RESOURCE_STEP:
            smaller, larger = (int(1 / number / RESOURCE_STEP) * RESOURCE_STEP for number in (per_gpu + 1, per_gpu))
            raise ValueError(
                f"{name} does not divide one GPU: choose {larger:g} for {per_gpu} rank(s) on a GPU, or {smaller:g} for "
                f"{per_gpu + 1}"
            )
        if max(self.num_processes, self.max_processes or 1) > 1:
            ranks = "num_processes" if self.num_processes > 1 else "max_processes"
            raise ValueError(
                f"{name} would put ranks of one run on the same GPU, which NCCL refuses: choose "
                f"launch.{ranks}=1 (it is {getattr(self, ranks)}), or one GPU for each rank"
            )
        return self


class CheckpointConfig(Section, affects="runtime"):
    """When checkpoints are saved, and how many are kept."""

    every_seconds: NonNegativeFloat = 60.0
    """Seconds between checkpoints, each saved at the next log point; the end of a run is always saved."""
    every_steps: PositiveInt | None = None
    """Steps between additional checkpoints."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep; each also contains the best weights so far."""


class MlflowConfig(Section, affects="runtime"):
    """Upload of the run to MLflow."""

    enabled: Boolean = True
    """Upload the run folder to MLflow during the run."""
    tracking_uri: Annotated[str, Field(min_length=1), AfterValidator(check_address)] | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    experiment: Annotated[str, Field(min_length=1)] = "gengap_dist"
    """Name of the MLflow experiment."""
    flush_timeout_seconds: NonNegativeFloat = 60.0
    """Seconds that a finished command waits for the upload to end; `gengap report sync` uploads the rest later."""
    log_model: Boolean = True
    """Export the final network of a run that is uploaded, and log it as an MLflow model with its signature."""
    metrics: Literal["essential", "all"] = "essential"
    """What is sent of a run: `essential`, about 20 losses, metrics, gaps, and the near-rank loss of each layer; `all`:
    every metric that was recorded, system metrics and spectra, which `gengap compare experiments:/NAME` needs to say
    all that a comparison of the folders says. The folder has all."""
    system_seconds: PositiveFloat | None = 10.0
    """Seconds between two measurements of a node's CPU, memory, disk, network and GPUs; null: none."""

    @field_serializer("tracking_uri")
    def _without_credentials(self, uri: str | None) -> str | None:
        return uri and without_logins(uri)


LANGUAGE_DEFAULTS: dict[str, Any] = {
    "task": {"name": "language_modeling"},
    "model": {"name": "gpt"},
    "batch": {"global_size": 16},
    "optim": {"name": "adamw", "lr": 3e-3},
    "probe": {"diagnostics": ("noise_scale", "norms", "weights")},  # neural collapse needs one class for each sample
}
"""Defaults of a run on tokens; all others are those of the fields."""
STDLIB_SEQUENCES = 2_048  # of the default of data.num_train: a minute on one core
DIGITS_DEFAULTS: dict[str, Any] = {"train": {"epochs": 20}}  # 1,294 images: fewer passes leave lenet5 half trained


class RunConfig(Section, affects="result"):
    """One training run."""

    seed: NonNegativeInt = 0
    """Seed of initialisation, sample order and augmentation."""
    profile: Annotated[Boolean, Affects("runtime")] = False
    """Trace a few steps of every rank, and write where their time is spent to OUT/profile."""
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    probe: ProbeConfig = ProbeConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mlflow: MlflowConfig = MlflowConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_data(cls, tree: Any) -> Any:
        """Other defaults where the data are tokens, or so few that the others train too little."""
        data = tree.get("data", {}) if isinstance(tree, Mapping) else None
        default = DataConfig.model_fields["name"].default
        name = data.get("name", default) if isinstance(data, Mapping) else getattr(data, "name", None)
        if name == "digits":
            return merge(DIGITS_DEFAULTS, tree)
        if name not in measures.TOKEN_SETS:
            return tree
        tree = merge(LANGUAGE_DEFAULTS, tree)
        return merge({"data": {"num_train": STDLIB_SEQUENCES}}, tree) if name == "stdlib" else tree

    @property
    def norm(self) -> str:
        """`model.norm`, with null resolved.

        >>> RunConfig().norm, RunConfig(batch=BatchConfig(ghost_size=32)).norm
        ('local', 'ghost')
        """
        return norm_rule(self.model.norm, self.batch.ghost_size)

    @property
    def scaled_optim(self) -> OptimConfig:
        """`optim` at the run's global batch, see `OptimConfig.at_batch`."""
        return self.optim.at_batch(self.batch.global_size)

    @model_validator(mode="after")
    def _check_norm(self) -> Self:
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
    def _check_length_and_schedule(self) -> Self:
        train, optim = self.train, self.optim
        lengths = [f"train.{name}" for name in ("steps", "tokens") if getattr(train, name)]
        if len(lengths) > 1:
            raise ValueError(
                f"train.steps ({train.steps}) and train.tokens ({train.tokens}) are two lengths: set one of them to "
                "null"
            )
        if train.length_unit == "updates" and (optim.base_size is None or lengths):
            rule = f"cannot be combined with {lengths[0]}" if lengths else "needs the batch whose updates are counted"
            raise ValueError(
                f"train.length_unit (updates) {rule}: set optim.base_size and train.epochs, not train.steps or "
                "train.tokens"
            )
        if self.batch.schedule and train.length_unit == "updates":
            raise ValueError(
                "batch.schedule changes the number of updates per epoch: set train.length_unit=epochs, or train.steps"
            )
        k = optim.batch_ratio(self.batch.global_size)
        beta = min(optim.betas)
        if optim.scaling == "adam_sqrt" and k * (1 - beta) >= 1:
            raise ValueError(
                f"optim.scaling (adam_sqrt) turns {beta:g} of optim.betas into 1 - k (1 - {beta:g}) = "
                f"{1 - k * (1 - beta):.3g} at k = {k:g}, and it must be above 0: choose a larger optim.base_size, "
                "larger optim.betas, or optim.scaling=sqrt"
            )
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.data.is_tokens:
            return self
        if self.batch.schedule_unit == "tokens":
            raise ValueError(
                f"batch.schedule_unit (tokens) needs sequences of tokens, and data.name is {self.data.name}: choose "
                "samples, steps or epochs"
            )
        if self.train.tokens:
            raise ValueError(
                f"train.tokens ({self.train.tokens}) needs sequences of tokens, and data.name is {self.data.name}: set "
                "train.epochs or train.steps in its place"
            )
        return self

    @model_validator(mode="after")
    def _check_mixed(self) -> Self:
        mixed = [name for name in ("mixup", "cutmix") if name in self.data.augment]
        if mixed and self.task.name != "classification":
            raise ValueError(
                f"data.augment ({mixed[0]}) mixes the classes of images, and task.name is {self.task.name}: set "
                "task.name=classification, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        train = self.train
        if train.stop_at_target and not train.has_target:
            raise ValueError(
                "train.stop_at_target (true) needs a target: set train.target_accuracy or train.target_loss"
            )
        targets = {"target_accuracy": train.target_accuracy, "target_loss": train.target_loss}
        given = [f"train.{name} ({value:g})" for name, value in targets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two targets, and a run has one: set one of them to null")
        if given and not self.data.val_fraction:
            raise ValueError(
                f"{given[0]} is measured on validation samples, and data.val_fraction is 0: set it above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        algorithm, batch, size = self.algorithm, self.batch, self.algorithm.penalty_size
        too_small = size and batch.micro_size != "auto" and batch.micro_size < size
        if size and (any(each % size for each in batch.sizes) or size % (batch.ghost_size or 1) or too_small):
            raise ValueError(
                f"algorithm.penalty_size ({size}) must divide batch.global_size ({batch.global_size}) and the "
                "sizes of batch.schedule, be a multiple "
                f"of batch.ghost_size ({batch.ghost_size}) if that is set, and be at most batch.micro_size "
                f"({batch.micro_size}): choose another"
            )
        if size and self.norm == "sync":
            raise ValueError(
                "algorithm.gradient_penalty takes gradients of groups, and model.norm (sync) couples all samples"
                f": choose model.norm=ghost with batch.ghost_size={size}, or another norm"
            )
        if algorithm.local_sgd and self.norm == "sync":
            raise ValueError(
                f"algorithm.local_sgd ({algorithm.local_sgd}) trains independent networks, and model.norm (sync) "
                "couples them: choose model.norm=ghost, or another norm"
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
        if algorithm.local_sgd and batch.schedule:
            raise ValueError(
                f"algorithm.local_sgd ({algorithm.local_sgd}) needs a fixed batch: leave batch.schedule out"
            )
        return self
