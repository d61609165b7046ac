"""What a set of runs says: gaps with intervals, what goes with them, and which claims the numbers support.

Pure functions of numbers: no folder is read here, and nothing is drawn. `compare` puts everything together.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from gengap_dist.statistics.paired import Interval, Paired

Outcome = Literal["supported", "contradicted", "undecided"]


class Run(NamedTuple):
    """One run as a comparison sees it."""

    arm: str
    seed: int
    status: str
    """finished, diverged, failed, ...: only finished runs have results, the others are counted."""
    global_size: int
    num_updates: int
    """0 if that is not known, and so for epochs."""
    num_epochs: float
    settings: Mapping[str, object]
    """Dotted settings that say what was computed, the seed left out."""
    accuracy: float | None
    """Test accuracy at the end, a share of 1; None if there is none."""
    measures: Mapping[str, float]
    """Explanations of a gap at the last measurement, by name: `near_rank_loss/fc2/rel_1e-2`, `noise_scale`, ..."""
    own_batch: Mapping[str, float]
    """The same names, of matrices with as many rows as the run's own batch, at the last measurement."""
    own_batch_untrained: Mapping[str, float]
    """The same at the first."""
    num_probe_samples: int | None
    """Images in the fixed probe set; None if that is not known."""
    target: float | None
    """Validation accuracy to reach; None if none was set."""
    updates_to_target: int | None
    """Updates that took; None if it was not reached."""


class Gap(NamedTuple):
    """An arm against the baseline; accuracies are shares of 1, the gap is baseline minus arm."""

    paired: Paired
    p: float | None
    """Two-sided p of the paired t test; None for fewer than two pairs, or if all differences are equal."""
    holm: float | None
    """The same, corrected for all arms of the study (Holm 1979)."""
    ci_half_width: float | None
    """Half the t interval, below which a difference is not told from none with this spread; None without one."""
    minimum_detectable_effect: float | None
    """A true difference that the paired t test finds four times in five, with these seeds and this spread."""
    matched: str
    """What the arm has in common with the baseline: "epochs", "updates", "epochs and updates" or ""."""
    lost: str
    """Runs of the arm that gave no result, in words: "1 diverged"; empty if none."""


class Correlation(NamedTuple):
    """How an explanation goes with test accuracy lost, over runs, seeds removed."""

    measure: str
    r: float
    interval: Interval | None
    """95%, for as many independent observations as there are arms; None for too few."""
    partial: float | None
    """The same with the logarithm of the number of updates held constant; None where that leaves nothing."""
    partial_interval: Interval | None
    p: float | None
    holm: float | None
    """p corrected for all explanations."""
    num_runs: int
    num_arms: int


class Target(NamedTuple):
    """Updates to a validation accuracy, by global batch (Shallue et al. 2019), and the curve through them."""

    accuracy: float
    updates: Mapping[str, Mapping[int, int]]
    """Arm to seed to updates."""
    missed: Mapping[str, int]
    """Arm to number of runs that did not get there."""
    least_updates: float | None
    """S_min of S = S_min (1 + B_crit / B) (McCandlish et al. 2018), fitted to all runs; None below 3 batches."""
    critical_batch: float | None
    """B_crit of the same."""
    critical_interval: Interval | None
    noise_scale: float | None
    """Measured gradient noise scale at the end, median over baseline runs: what B_crit should be."""


class Claim(NamedTuple):
    """A claim, and what the numbers make of it."""

    key: str
    """Short name: "gap", "near_rank_loss_grows", "explains", "scaling", "longer_training"."""
    claim: str
    """What the paper says, in one sentence."""
    outcome: Outcome
    evidence: str
    """The numbers behind the outcome, in words."""
    control: str
    """The control that decides it, in words."""


class Comparison(NamedTuple):
    """All of it."""

    baseline: str
    gaps: Mapping[str, Gap]
    """By arm, in the order of the study; arms without a pair are missing."""
    correlations: Sequence[Correlation]
    target: Target | None
    claims: Sequence[Claim]
    caveats: Sequence[str]
    """What cannot be concluded, and why: one sentence each."""
