"""Names that several packages share: of measures, and of the choices of settings. Loads nothing.

Packages map these names to functions; tests/config/test_measures.py says that their keys are these names.
"""

from typing import Literal, NamedTuple, get_args

View = Literal["channel", "token", "pool", "flatten"]
Method = Literal["gram", "tsqr"]
Diagnostic = Literal["noise_scale", "norms", "weights", "neural_collapse", "hessian", "keskar"]
Strategy = Literal["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]
Optimizer = Literal["sgd", "adamw", "lars", "lamb", "muon"]
Schedule = Literal["constant", "step", "cosine", "polynomial", "wsd"]
Norm = Literal["local", "ghost", "sync", "group", "none"]
RankMeasure = Literal["logdet", "spread", "trace"]
Cleanable = Literal["checkpoints", "all_checkpoints", "spectra"]
"""Of a run: checkpoints but the last, all of them, and spectra but those of the last hidden layer."""
Augmentation = Literal["resized_crop", "crop", "flip", "rand_augment", "cutout", "mixup", "cutmix"]

TOKEN_SETS = ("stdlib", "text", "tokens")
DATA_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder", *TOKEN_SETS)
VIEWS: tuple[View, ...] = get_args(View)
WEIGHT_VIEW = "weight"  # the view of a weight matrix
PROBE_DIAGNOSTICS: tuple[Diagnostic, ...] = tuple(name for name in get_args(Diagnostic) if name != "noise_scale")
"""Those measured on the probe set; the noise scale is computed from training gradients."""
PRIMARY_VIEWS = ("", "pool", "token", "channel", "flatten")  # of a layer, the first of them that was measured
OWN_BATCH = "own_batch"  # the probe set with as many images as the run's global batch


class Measure(NamedTuple):
    """What is known of a measure without its value."""

    label: str = ""
    """For axes and panels; empty for a measure that has no figure."""
    per_layer: bool = False
    """Whether every layer has one, with its views, centring and probe sets."""
    is_explanation: bool = False
    """Whether it describes the representation or the loss, and may explain a generalization gap."""
    is_share: bool = False
    """Whether it is between 0 and 1; figures then show this whole range."""
    has_log_scale: bool = False
    """Whether it is positive and differs by factors, so that its logarithm is correlated."""
    is_derived: bool = False
    """Whether it is another measure in other units: curves over seeds and tables show that one only."""


_LAYER, _SHARE = Measure(per_layer=True), Measure(per_layer=True, is_share=True)
_THRESHOLDS = [f"{kind}_1e-{digits}" for kind in ("abs", "rel") for digits in (1, 2, 3)]
MEASURES: dict[str, Measure] = {  # in the order of figures; those with a threshold are NAME/THRESHOLD
    **{f"near_rank_count/{threshold}": _LAYER for threshold in _THRESHOLDS},
    **{f"near_rank_loss/{threshold}": _SHARE for threshold in _THRESHOLDS},
    "near_rank_loss/rel_1e-2": _SHARE._replace(is_explanation=True, label="near-rank loss (share < 0.01 s1)"),
    "near_rank_loss_live/rel_1e-2": _SHARE,
    "effective_rank": Measure("effective rank", True, True),
    "energy_effective_rank": _LAYER,
    "stable_rank": _LAYER,
    "participation_ratio": _LAYER,
    "pca_99": _LAYER,
    "srank_1e-2": _LAYER,
    "numerical_rank": _LAYER,
    "dead_units": _LAYER,
    "alpha_req": _LAYER,
    "alpha_req_r2": _SHARE,
    "sigma_max": _LAYER,
    "sigma_min": _LAYER,
    "condition_number": _LAYER,
    "noise_scale": Measure("gradient noise scale (samples)", is_explanation=True, has_log_scale=True),
    "noise_scale/gradient_squared": Measure(),
    "noise_scale/trace_covariance": Measure(),
    "weight_norm": Measure(),
    "distance_from_init": Measure("distance from initialisation"),
    "relative_distance_from_init": Measure(is_explanation=True, is_derived=True),
    "train/update_norm": Measure("norm of the update"),
    "nc1": Measure("NC1", is_explanation=True, has_log_scale=True),
    "hessian/eigenvalue_1": Measure("largest Hessian eigenvalue", is_explanation=True, has_log_scale=True),
    "hessian/eigenvalue_2": Measure(),
    "hessian/eigenvalue_3": Measure(),
    "hessian/trace": Measure("Hessian trace", is_explanation=True, has_log_scale=True),
    "hessian/trace_standard_error": Measure(),
    "keskar_sharpness": Measure("sharpness (Keskar), %", is_explanation=True, has_log_scale=True),
}
OTHER = Measure()  # losses, times, metrics of other programs
LAYER_MEASURES = frozenset(name.partition("/")[0] for name, measure in MEASURES.items() if measure.per_layer)
"""Without thresholds."""
SUMMARY = ("near_rank_loss/rel_1e-2", "effective_rank")  # what tables and figures show of a layer
PRIMARY = "near_rank_loss/rel_1e-2"  # of the last hidden layer, centred: the measure that verdicts are about
