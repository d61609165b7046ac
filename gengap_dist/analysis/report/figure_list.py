"""The figures of a report, with title and caption."""

from collections.abc import Callable
from typing import NamedTuple

from gengap_dist.analysis.report import figures, probe_figures
from gengap_dist.analysis.report.plotting import ReportFigure, in_rows
from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.runs.metric import MetricDescription


class Entry(NamedTuple):
    """One figure of a report; {metric} in its texts is the name of the study's metric, {harm} what a worse arm lost."""

    title: str
    draw: Callable[[StudyData, Comparison], ReportFigure | None]
    caption: str


def name_metric(text: str, metric: MetricDescription) -> str:
    """The text with the names that belong to `metric`.

    >>> name_metric("{Harm} by each arm", MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    'Accuracy lost by each arm'
    """
    for word, name in (("metric", metric.name), ("harm", metric.harm)):
        text = text.replace(f"{{{word}}}", name).replace(f"{{{word.capitalize()}}}", f"{name[:1].upper()}{name[1:]}")
    return text


SPECTRA = Entry(
    "Spectra during training",
    lambda study, _: probe_figures.spectra_over_steps(study),
    "Distribution of the singular values of three layers, from the untrained network (grey, top) to the end: one ridge "
    "for each measured step, all of equal height; the first arm of each batch size. Values below the numerical floor "
    "are not drawn. The CSV has at most 128 values of each spectrum; spectra/*.npz have all.",
)
RANK_BY_SAMPLES = Entry(
    "Rank and the number of probe samples",
    lambda study, _: probe_figures.rank_by_samples(study),
    "Rank against the number of probe samples, for the trained network (solid) and the untrained one (dashed). The "
    "dashed lines show the effect of the sample size alone. Stars: the probe set is as large as the arm's own batch.",
)
CURVES = Entry(
    "Training",
    lambda study, _: figures.curves(study),
    "Training loss by step and by epoch, and validation {metric}; the first seed in full colour, the others faint. "
    f"Long curves are means over {figures.MAX_POINTS} consecutive intervals.",
)
STUDY_FIGURES: dict[str, Entry] = {  # by file name
    "gap": Entry(
        "{Harm} by each arm",
        figures.gap,
        "Test {harm} against the baseline, paired by seed. Dots are seeds, diamonds their mean, bars the "
        "95% t interval. Filled diamonds: significant after Holm's correction for all arms. Runs without a result are "
        "counted on the right.",
    ),
    "test_values": Entry(
        "{Metric} by batch",
        # with one row per arm, the gap figure shows the same
        lambda study, comparison: None if in_rows(study) and comparison.gaps else figures.test_values(study),
        "Test {metric} of every arm. Dots are seeds, diamonds their mean, bars the 95% t interval of the mean.",
    ),
    "updates_to_target": Entry(
        "Updates to the target",
        figures.updates_to_target,
        "Updates until validation reached the target, by global batch (Shallue et al. 2019); dots are seeds. Along the "
        "dashed line, twice the batch halves the updates; the curve leaves it at the critical batch (band: 95% "
        "interval). The gradient noise scale of the baseline predicts the critical batch (McCandlish et al. 2018).",
    ),
    "explanations": Entry(
        "Correlation with {harm}",
        figures.explanations,
        "Correlation of each measure with test {harm}, over all finished runs, seeds removed: as measured, and "
        "given the logarithm of the number of updates. Bars are 95% intervals; strongest first. An interval that "
        "contains 0 shows no correlation.",
    ),
    "gap_against_explanations": Entry(
        "{Harm} against the most correlated measures",
        figures.gap_against_explanations,
        "Every finished run: test {harm} against the baseline run of its seed, by the value of the measure at "
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
        lambda study, _: probe_figures.by_layer(study, "near_rank_loss/rel_1e-2"),
        "Share of singular values below 1% of the largest, on the probe set. Dots are finished runs, diamonds their "
        "mean; the dashed line is the same networks before training.",
    ),
    "effective_rank": Entry(
        "Effective rank of each layer",
        lambda study, _: probe_figures.by_layer(study, "effective_rank"),
        "Effective rank (Roy & Vetterli 2007) of the raw activations, trained against untrained.",
    ),
    "spectra": SPECTRA,
    "rank_by_samples": RANK_BY_SAMPLES,
    "curves": CURVES,
}
RUN_FIGURES: dict[str, Entry] = {
    "measures": Entry(
        "Rank during training",
        lambda study, _: probe_figures.measures_over_steps(study),
        "Near-rank loss and effective rank of the layers during training.",
    ),
    "spectra": SPECTRA,
    "all_spectra": Entry(
        "All spectra at the end",
        lambda study, _: probe_figures.all_spectra(study),
        "Singular values of every layer at the last measurement, raw (solid) and centred (thin), with the "
        "untrained network (dashed grey). Values below the numerical floor (dotted) are not drawn.",
    ),
    "rank_by_samples": RANK_BY_SAMPLES,
    "diagnostics": Entry(
        "Other measures",
        lambda study, _: probe_figures.diagnostics_over_steps(study),
        "Other measures that may explain the gap, from the same run; formulas: docs/measures.md.",
    ),
    "curves": CURVES,
}
