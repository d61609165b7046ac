"""Writes the means over the seeds of each arm into the folder of a study, as soon as its runs have ended."""

from collections.abc import Iterable
from pathlib import Path

from gengap_dist.errors import UsageError
from gengap_dist.runs.arm_means import Sources, have_ended, read_runs, read_sources, write_means
from gengap_dist.runs.run_folder import SeedRun, read_metrics_table, read_study_info
from gengap_dist.runs.schema import RunInfo, RunStatus
from gengap_dist.study.run_matrix import PassOn, PlannedRun, StudyCallback

Runs = dict[Path, RunInfo]
"""Folder to run.json."""


class MeansCallback(PassOn):
    """Passes every call on, and writes the means of an arm after its last run."""

    def __init__(self, inner: StudyCallback, out: Path) -> None:
        """Means of the study in `out`."""
        super().__init__(inner)
        self.out = out

    def on_run_end(self, planned_run: PlannedRun, note: str) -> None:
        """Write what is complete now; what cannot be read is reported at the end of the study."""
        self.inner.on_run_end(planned_run, note)
        study = read_study_info(self.out)
        update_means(self.out, study.arms if planned_run.arm == study.baseline else [planned_run.arm])


def update_means(out: Path, arms: Iterable[str] | None = None) -> list[str]:
    """Write mean.jsonl of arms whose runs have all ended; returns one sentence for each arm that cannot be read.

    An arm whose means are made of the same runs already is not written again.

    Args:
        out: the folder of a study.
        arms: write these arms, if the runs of the baseline have all ended, too; None: all arms, because the study is
            over, with their gap to what there is of the baseline.
    """
    study, problems = read_study_info(out), []

    def read(arm: str) -> Runs:
        return read_runs(out / "runs" / arm, study.seeds, damaged=lambda error: None)  # the report names it

    baseline = read(study.baseline)
    baseline_is_due = arms is None or have_ended(baseline, study.seeds)
    for arm in study.arms if arms is None else arms:
        folder = out / "runs" / arm
        runs, others = (baseline, {}) if arm == study.baseline else (read(arm), baseline)
        if baseline_is_due and have_ended(runs, study.seeds):
            try:
                _write_arm(folder, runs, others)
            except (UsageError, OSError) as error:
                problems.append(f"the means of arm {arm} were not written ({error})")
    return problems


def _write_arm(arm: Path, runs: Runs, baseline: Runs) -> None:
    made_of: Sources = {
        str(folder.relative_to(arm.parent)): info.ended for folder, info in {**baseline, **runs}.items() if info.ended
    }
    if read_sources(arm) == made_of:
        return
    from gengap_dist.analysis.seed_aggregates import over_seeds, select_charted  # numpy and scipy are slow to import
    from gengap_dist.runs.metrics_table import to_table

    none = to_table(())
    of_arm = [
        SeedRun(
            info.content(), select_charted(read_metrics_table(folder)) if info.status == RunStatus.FINISHED else none
        )
        for folder, info in runs.items()
    ]
    of_baseline = [SeedRun(info.content(), none) for info in baseline.values()]  # only its results are compared
    write_means(arm, made_of, over_seeds(of_arm, of_baseline))
