"""Which pictures a report has, and what each shows."""

from collections.abc import Callable
from typing import NamedTuple

from gengap_dist.analysis.report import figures, probe_figures
from gengap_dist.analysis.report.plotting import ReportFigure, in_rows
from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.study_data import StudyData


class Entry(NamedTuple):
    """One picture of a report."""

    title: str
    draw: Callable[[StudyData, Comparison], ReportFigure | None]
    caption: str


SPECTRA = Entry(
    "Spectra while training goes on",
    lambda study, _: probe_figures.spectra_over_steps(study),
    "How the singular values of three layers lie, from the untrained network (grey, top) to the end: one ridge for "
    "each measured step, all of equal height; the first arm of each batch size. Values below the numerical floor say "
    "nothing and are not drawn. The CSV has at most 128 values of each spectrum, spectra/*.npz have all.",
)
SAMPLES = Entry(
    "Rank and the number of probe samples",
    lambda study, _: probe_figures.rank_by_samples(study),
    "Rank against the number of probe samples, of the trained network (solid) and the untrained one (dashed): what the "
    "dashed lines do has nothing to do with training. Stars: the probe is as large as the arm's own batch.",
)
CURVES = Entry(
    "Training",
    lambda study, _: figures.curves(study),
    "Training loss by step and by epoch, and validation accuracy; the first seed strong, the others faint. Long curves "
    f"are means over {figures.MAX_POINTS} consecutive stretches.",
)
STUDY_FIGURES: dict[str, Entry] = {  # by file name
    "gap": Entry(
        "What each arm loses",
        figures.gap,
        "Test accuracy of the baseline minus the arm's, paired by seed. Dots are seeds, diamonds their mean, bars the "
        "95% t interval. Filled diamonds: told apart from none after Holm's correction for all arms. Runs without a "
        "result are counted on the right.",
    ),
    "accuracy": Entry(
        "Accuracy by batch",
        # in rows the gaps say the same
        lambda study, said: None if in_rows(study) and said.gaps else figures.accuracy(study),
        "Test accuracy of every arm. Dots are seeds, diamonds their mean, bars the 95% t interval of the mean.",
    ),
    "updates_to_target": Entry(
        "Updates to the target",
        figures.updates_to_target,
        "Updates until validation reached the target, by global batch (Shallue et al. 2019); dots are seeds. Along the "
        "dashed line a doubled batch halves the updates; the curve bends at the critical batch (band: 95% interval). "
        "The gradient noise scale measured in the baseline is what it should be (McCandlish et al. 2018).",
    ),
    "explanations": Entry(
        "Explanations side by side",
        figures.explanations,
        "How each measure goes with test accuracy lost: correlation over all finished runs, seeds removed, and "
        "given the logarithm of the number of updates. Bars are 95% intervals; strongest first. An "
        "interval across 0 explains nothing yet.",
    ),
    "gap_against_explanations": Entry(
        "Accuracy lost against the strongest explanations",
        figures.gap_against_explanations,
        "Every finished run: test accuracy lost against the baseline run of its seed, by the value of the measure at "
        "the end of training.",
    ),
    "near_rank_change": Entry(
        "Near-rank loss against the untrained network",
        lambda study, _: probe_figures.near_rank_change(study),
        "Share of singular values below 0.01 s1 on the probe set, trained minus untrained, in percentage points; means "
        "over finished runs. Orange: training lost rank; blue: training gained it.",
    ),
    "near_rank_loss_rel": Entry(
        "Near-rank loss of each layer",
        lambda study, _: probe_figures.by_layer(study, *probe_figures.MEASURES[0]),
        "Share of singular values below 1% of the largest, on the probe set. Dots are finished runs, diamonds their "
        "mean; the dashed line is the same networks before training.",
    ),
    "effective_rank": Entry(
        "Effective rank of each layer",
        lambda study, _: probe_figures.by_layer(study, *probe_figures.MEASURES[1]),
        "Effective rank (Roy & Vetterli 2007) of the raw activations, trained against untrained.",
    ),
    "spectra": SPECTRA,
    "rank_by_samples": SAMPLES,
    "curves": CURVES,
}
RUN_FIGURES: dict[str, Entry] = {
    "measures": Entry(
        "Rank while training goes on",
        lambda study, _: probe_figures.measures_over_steps(study),
        "Near-rank loss and effective rank of the layers while the network trains.",
    ),
    "spectra": SPECTRA,
    "all_spectra": Entry(
        "All spectra at the end",
        lambda study, _: probe_figures.all_spectra(study),
        "Singular values of every layer at the last measurement, as they are (solid) and centred (thin), beside the "
        "untrained network (dashed grey). Nothing is drawn below the numerical floor (dotted).",
    ),
    "rank_by_samples": SAMPLES,
    "diagnostics": Entry(
        "Other explanations",
        lambda study, _: probe_figures.diagnostics_over_steps(study),
        "Other explanations of the gap, measured in the same run: docs/measures.md has their formulas.",
    ),
    "curves": CURVES,
}
