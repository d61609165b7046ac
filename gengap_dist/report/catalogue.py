"""Which figures a report has, and what each shows."""

from collections.abc import Callable

from matplotlib.figure import Figure

from gengap_dist.report import figures, probe_figures
from gengap_dist.report.collect import StudyData

Draw = Callable[[StudyData], Figure | None]

STUDY_FIGURES: dict[str, tuple[Draw, str]] = {  # file name: how it is drawn, what it shows
    "accuracy": (
        figures.accuracy,
        "Test accuracy by global batch, or arm by arm where many share one (dashed: the baseline). Dots are seeds, "
        "diamonds their mean, bars the 95% t interval of the mean.",
    ),
    "near_rank_loss_rel": (
        lambda study: figures.by_layer(study, "near_rank_loss", "rel_1e-2", "share of singular values below 0.01 s1"),
        "Near-rank loss, relative threshold: share of singular values below 1% of the largest, on the probe set. "
        "Dots are finished runs, diamonds their mean; the dashed line is the same networks before training.",
    ),
    "near_rank_loss_abs": (
        lambda study: figures.by_layer(study, "near_rank_loss", "abs_1e-2", "share of singular values below 0.01"),
        "Near-rank loss, absolute threshold: share of singular values (divided by the square root of N) below 0.01.",
    ),
    "effective_rank": (
        lambda study: figures.by_layer(study, "effective_rank", "", "effective rank"),
        "Effective rank (Roy & Vetterli 2007) of the raw activations, trained against untrained.",
    ),
    "spectra": (
        figures.spectra_over_steps,
        "Singular values of three layers while training goes on, from dark to bright; the first arm of each batch "
        "size, first seed. "
        "Values below the numerical floor (dotted) say nothing and are not drawn.",
    ),
    "rank_by_samples": (
        probe_figures.rank_by_samples,
        "Rank against the number of probe samples, of the trained network (solid) and the untrained one (dashed): what "
        "the dashed lines do has nothing to do with training. Stars: the probe is as large as the arm's own batch.",
    ),
    "curves": (
        figures.curves,
        "Training loss by step and by epoch, and validation accuracy; the first seed strong, the others faint.",
    ),
}
RUN_FIGURES: dict[str, tuple[Draw, str]] = {
    "measures": (
        figures.measures_over_steps,
        "Near-rank loss and effective rank of the layers while the network trains.",
    ),
    "spectra": STUDY_FIGURES["spectra"],
    "all_spectra": (
        probe_figures.all_spectra,
        "Singular values of every layer at the last measurement, as they are (solid) and centred (thin), beside the "
        "untrained network (dashed grey). Nothing is drawn below the numerical floor (dotted).",
    ),
    "rank_by_samples": STUDY_FIGURES["rank_by_samples"],
    "rivals": (
        probe_figures.rivals_over_steps,
        "Other explanations of the gap, measured in the same run: docs/measures.md has their formulas.",
    ),
    "curves": STUDY_FIGURES["curves"],
}
