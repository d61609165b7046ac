"""The figures of a report by file name, each with its title and the function that draws it."""

from collections.abc import Callable

from gengap_dist.analysis.report import figures, probe_figures
from gengap_dist.analysis.report.plotting import ReportFigure
from gengap_dist.analysis.results import Comparison
from gengap_dist.analysis.study_data import StudyData
from gengap_dist.runs.metric import MetricDescription

Entry = tuple[str, Callable[[StudyData, Comparison], ReportFigure | None]]
"""{metric} in a title is the name of the study's metric, {harm} what a worse arm lost."""


def name_metric(text: str, metric: MetricDescription) -> str:
    """The text with the names that belong to `metric`.

    >>> name_metric("{Harm} by each arm", MetricDescription(name="accuracy", unit="share", higher_is_better=True))
    'Accuracy lost by each arm'
    """
    for word, name in (("metric", metric.name), ("harm", metric.harm)):
        text = text.replace(f"{{{word}}}", name).replace(f"{{{word.capitalize()}}}", f"{name[:1].upper()}{name[1:]}")
    return text


KEY_FIGURES = ("test_values", "near_rank_by_batch")  # beside the answer
STUDY_FIGURES: dict[str, Entry] = {
    "test_values": ("{Metric} by batch", figures.test_values),
    "near_rank_by_batch": ("Near-rank loss against the untrained network", figures.near_rank_by_batch),
    "gap": ("{Harm} by each arm", figures.gap),
    "updates_to_target": ("Updates to the target", figures.updates_to_target),
    "curves": ("Training", figures.curves),
    "near_rank_change": (
        "Change of near-rank loss in each layer",
        lambda study, _: probe_figures.near_rank_change(study),
    ),
    "near_rank_loss_rel": (
        "Near-rank loss of each layer",
        lambda study, _: probe_figures.by_layer(study, "near_rank_loss/rel_1e-2"),
    ),
    "effective_rank": (
        "Effective rank of each layer",
        lambda study, _: probe_figures.by_layer(study, "effective_rank"),
    ),
    "spectra": ("Spectra during training", lambda study, _: probe_figures.spectra_over_steps(study)),
    "rank_by_samples": (
        "Rank and the number of probe samples",
        lambda study, _: probe_figures.rank_by_samples(study),
    ),
    "explanations": ("Correlation with {harm}", figures.explanations),
    "gap_against_explanations": ("{Harm} against measures", figures.gap_against_explanations),
}
RUN_FIGURES: dict[str, Entry] = {
    "curves": STUDY_FIGURES["curves"],
    "measures": ("Rank during training", lambda study, _: probe_figures.measures_over_steps(study)),
    "spectra": STUDY_FIGURES["spectra"],
    "all_spectra": ("Spectra at the end", lambda study, _: probe_figures.all_spectra(study)),
    "rank_by_samples": STUDY_FIGURES["rank_by_samples"],
    "diagnostics": ("Other measures", lambda study, _: probe_figures.diagnostics_over_steps(study)),
}
