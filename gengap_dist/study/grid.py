"""The runs of a study."""

from pathlib import Path
from typing import NamedTuple

from gengap_dist.config import RunConfig, StudyConfig


class Cell(NamedTuple):
    """One run of a study."""

    arm: str
    seed: int
    config: RunConfig
    folder: Path


def cells(config: StudyConfig, out: Path) -> list[Cell]:
    """Every arm with every seed; all arms of one seed come before the next seed, so that pairs are complete early.

    Raises:
        UsageError: if an arm's overrides are no settings of a run.
    """
    return [
        Cell(arm.name, seed, config.run_config(arm, seed), out / "runs" / arm.name / f"seed{seed}")
        for seed in config.study.seeds
        for arm in config.study.arms
    ]
