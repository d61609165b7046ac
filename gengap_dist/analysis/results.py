"""Results of a comparison: gaps with intervals, training, correlations, the critical batch, and outcomes of the claims.

Only data types of numbers and text: nothing is read or drawn here. `compare` builds a `Comparison`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gengap_dist.runs.metric import MetricDescription
from gengap_dist.statistics.paired import Interval, Paired

Outcome = Literal["supported", "contradicted", "undecided"]
"""Of a claim; `Claim.finding` says more."""


class Curve(NamedTuple):
    """What was recorded of a run at its measurements, by increasing step: arrays of [k], nan where nothing was."""

    steps: np.ndarray
    losses: np.ndarray
    """Mean loss of the probe set, without penalties and label smoothing."""
    scores: np.ndarray
    """`MetricDescription.score` of the metric on the validation samples."""
    near_rank_losses: np.ndarray
    """As `Run.near_rank_loss`."""
    rate_shares: np.ndarray
    """Learning rate as a share of the highest one of the run."""


class Run(NamedTuple):
    """The data of one run that a comparison uses."""

    arm: str
    seed: int
    status: str
    """finished, diverged, failed, ...: only finished runs have results; the others are counted."""
    global_size: int
    num_updates: int
    """0 if unknown; the same holds for `num_epochs`."""
    num_epochs: float
    settings: Mapping[str, object]
    """By dotted name, without those tuned for each arm."""
    score: float | None
    """`MetricDescription.score` of the study's metric on the test samples at the end; None if there is none."""
    measures: Mapping[str, float]
    """Measures that may explain a gap, at the last measurement: `near_rank_loss/fc2/rel_1e-2`, `noise_scale`, ..."""
    own_batch: Mapping[str, float]
    """The same measures on a probe set as large as the run's own batch, at the last measurement."""
    own_batch_untrained: Mapping[str, float]
    """The same at the first measurement."""
    num_probe_samples: int | None
    """Samples in the fixed probe set; None if unknown."""
    target: str | None
    """Validation score to reach, as text: "80.0% validation accuracy"; None if none was set."""
    updates_to_target: int | None
    """Updates until the target was reached; None if it was not reached."""
    train_score: float | None = None
    """`score` on all training samples at the end; None if it was not measured, and so below."""
    train_loss: float | None = None
    """Mean loss of all training samples at the end."""
    chance: float | None = None
    """Score of a network that has learned nothing."""
    near_rank_loss: float | None = None
    """The primary one, at the end: centred, below 0.01 s1, of the last hidden layer, on the fixed probe set."""
    near_rank_loss_untrained: float | None = None
    """The same before the first step."""
    near_rank_loss_raw: float | None = None
    """The same at the end of activations that are not centred, which measures their mean, too."""
    near_rank_loss_pooled: float | None = None
    """Of all layers: the number of singular values below 0.01 s1 of their layer, over the number of all of them."""
    penalty_norm: float | None = None
    """Norm of what a penalty on the rank, or its placebo, adds to the gradient: mean over the recorded steps."""
    num_skipped: int = 0
    """Measurements that probe.max_time_fraction left out."""
    curve: Curve | None = None
    test_correct: np.ndarray | None = None
    """Whether each test sample is classified correctly at the end: [M] bool."""


class Gap(NamedTuple):
    """Score of the baseline minus that of the arm: above 0 the arm is worse."""

    paired: Paired
    p: float | None
    """Two-sided p of the paired t test; None for fewer than two pairs, or if all differences are equal."""
    holm: float | None
    """`p` corrected for all arms of the study (Holm 1979)."""
    ci_half_width: float | None
    """Half the width of the t interval; a smaller difference is not significant. None without an interval."""
    minimum_detectable_effect: float | None
    """True difference that the paired t test detects with 80% power, for this number of seeds and this spread."""
    matched: str
    """What the arm has in common with the baseline: "epochs", "updates", "epochs and updates" or ""."""
    unfinished_runs: str
    """Runs of the arm without a result, as text ("1 diverged"); empty if there are none."""


class Correlation(NamedTuple):
    """Correlation of a measure with the score lost, over the means of the arms that trained."""

    measure: str
    r: float
    """Spearman's."""
    interval: Interval | None
    """95% interval; None for fewer than seven arms, which are too few to tell."""
    leave_one_out: Interval | None
    """Smallest and largest r with one of the arms left out."""
    partial: float | None
    """Partial correlation, the number of updates held constant; None if it is not defined."""
    partial_interval: Interval | None
    p: float | None
    holm: float | None
    """p corrected for all measures: the strongest of them is the best of many."""
    num_runs: int
    num_arms: int

    @property
    def robust_r(self) -> float:
        """The r nearest to 0 with one of the arms left out; 0 if that changes its sign, or one arm alone makes r.

        >>> nobody = dict(interval=None, partial=None, partial_interval=None, p=None, holm=None, num_runs=8, num_arms=8)
        >>> [Correlation("nc1", 1.0, leave_one_out=ends, **nobody).robust_r for ends in (None, (-0.2, 1.0), (0.7, 0.9))]
        [0.0, 0.0, 0.7]
        """
        low, high = self.leave_one_out or (0.0, 0.0)
        return max(low, 0.0) if high > 0 else high


class Target(NamedTuple):
    """Updates to a validation score, by global batch (Shallue et al. 2019), and the fitted curve."""

    score: str
    """What is to be reached: `Run.target`."""
    updates: Mapping[str, Mapping[int, int]]
    """Arm to seed to updates."""
    missed: Mapping[str, int]
    """Arm to number of runs that did not reach it."""
    least_updates: float | None
    """S_min of S = S_min (1 + B_crit / B) (McCandlish et al. 2018), fitted to all runs; None below 3 batches."""
    critical_batch: float | None
    """B_crit of the same curve."""
    critical_interval: Interval | None
    noise_scale: float | None
    """Measured gradient noise scale at the end, median over baseline runs: predicts B_crit."""


class Claim(NamedTuple):
    """A claim of the paper, and its outcome in this study."""

    key: str
    """Short name: "gap", "near_rank_loss_grows", "explains", "scaling", "longer_training"."""
    claim: str
    """The claim, in one sentence."""
    outcome: Outcome
    evidence: str
    """The numbers that decide the outcome, as sentences."""
    control: str
    """The control that decides it, in one sentence."""
    finding: str = ""
    """The outcome in more words, such as "there, but below the margin" or "not asked"; empty if there are none."""


class Estimate(NamedTuple):
    """The mean over seeds of a quantity of an intervention."""

    quantity: str
    mean: float
    interval: Interval | None
    """Over seeds, on these test samples; of 90% for a difference of training scores."""
    new_images: Interval | None
    """Of a difference of test scores on new test samples; None if it is not known."""
    is_score: bool
    """Whether it is a difference of scores; else it is one of near-rank loss."""


class Requirement(NamedTuple):
    """A condition for a verdict on an intervention."""

    estimate: Estimate
    limit: float
    """Mean over seeds of what is compared with."""
    is_within: bool
    """Whether the quantity must be smaller in size than the limit; else it must be above it."""
    holds: bool
    """Whether it surely does."""


class InterventionResult(NamedTuple):
    """What raising and lowering the rank did at one large batch; the symbols are those of docs/statistics.md."""

    arm: str
    """The large batch without a penalty."""
    num_seeds: int
    """Seeds of which all arms have a result."""
    finding: str
    reason: str
    """Why there is no verdict; empty if there is one."""
    level: float
    """1 minus the confidence of the intervals."""
    estimates: Sequence[Estimate]
    requirements: Sequence[Requirement]


class TrainingSummary(NamedTuple):
    """How an arm trained, for tables."""

    label: str
    """`as well`, `less`, `did not train in 1 of 3`, ..."""
    loss_ratio: float | None
    """Geometric mean over seeds of the final training loss divided by the baseline's; None without losses."""


class Comparison(NamedTuple):
    """A study compared with its baseline."""

    metric: MetricDescription
    baseline: str
    answer: str
    """To the question of the study, in a sentence or two; empty without a baseline."""
    training: Mapping[str, TrainingSummary]
    """By arm; empty without a baseline."""
    gaps: Mapping[str, Gap]
    """By arm, in the order of the study; arms without a pair are missing."""
    correlations: Sequence[Correlation]
    target: Target | None
    claims: Sequence[Claim]
    caveats: Sequence[str]
    """Limits of the comparison, one sentence each."""
    interventions: Sequence[InterventionResult] = ()
    """Of every large batch with arms that raise and lower the rank and their placebos, asked for or not."""
    margin: float | None = None
    """A smaller difference of scores does not count; None without a baseline."""
