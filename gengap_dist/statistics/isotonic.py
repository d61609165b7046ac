"""Training loss as a falling function of the step, and a score as a function of that loss; pure functions.

Arms are compared at equal training loss. Measured losses are noisy, so that a loss is reached several times: isotonic
regression gives the curve that reaches it once. scipy is imported inside functions, see paired.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_MATCHED = 6
LARGEST_SPAN = 0.35  # of log losses: from l to 1.42 l
SPAN_OF_FALL = 0.05  # and at most this share of what the log loss has fallen by


def falling_blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fit of values [n] by a non-increasing sequence [n], and where its constant blocks start [blocks].

    min sum_i (y_i - x_i)^2 with x_1 >= x_2 >= ...: each block is the mean of its values (pool adjacent violators,
    Ayer et al. 1955, Ann. Math. Stat. 26:641; algorithm of Busing 2022, J. Stat. Softw. 102).

    >>> fitted, starts = falling_blocks(np.array([5.0, 2.0, 4.0, 1.0]))
    >>> fitted, starts
    (array([5., 3., 3., 1.]), array([0, 1, 3]))
    """
    from scipy import optimize

    fitted = optimize.isotonic_regression(values, increasing=False).x
    return fitted, np.flatnonzero(np.diff(fitted, prepend=np.inf))


class LossCurve(NamedTuple):
    """One run: the blocks of its isotonic fit of log loss on step, in the order of steps."""

    log_losses: np.ndarray
    """Fitted log loss [blocks], natural logarithm, strictly falling."""
    scores: np.ndarray
    """Mean score of each block [blocks], in the unit of the scores."""
    steps: np.ndarray
    """Mean step of each block [blocks]."""
    residual_deviation: float
    """Standard deviation of log loss around the fit: sqrt(sum (log l - fit)^2 / (n - blocks)); nan for n = blocks.

    The number of blocks estimates the degrees of freedom of an isotonic fit (Meyer & Woodroofe 2000, Ann. Stat.
    28:1083): unbiased where the true curve is flat. Where it falls by 0.1, 1 and 2 deviations of the noise from one
    measurement to the next, the result is 0.94, 0.75 and 0.6 of that deviation (20 and 60 measurements); where it falls
    by 4, it is nan in 9 of 10 runs, as no measured loss is above the one before.
    """

    @classmethod
    def of(
        cls,
        steps: Sequence[float] | np.ndarray,
        losses: Sequence[float] | np.ndarray,
        scores: Sequence[float] | np.ndarray,
    ) -> "LossCurve":
        """The curve of n measurements at ascending steps, all [n].

        Raises:
            ValueError: if the lengths differ or are 0, steps do not ascend, or a loss is not positive and finite.

        >>> curve = LossCurve.of([0, 10, 20, 30], np.exp([1.0, -1.2, -0.8, -2.0]), [10.0, 50.0, 60.0, 80.0])
        >>> curve.log_losses.round(9), curve.scores, curve.steps, round(curve.residual_deviation, 9)
        (array([ 1., -1., -2.]), array([10., 55., 80.]), array([ 0., 15., 30.]), 0.282842712)
        """
        steps, losses, scores = (np.asarray(values, dtype=float) for values in (steps, losses, scores))
        if not steps.shape == losses.shape == scores.shape or steps.ndim != 1 or not len(steps):
            shapes = ", ".join(str(values.shape) for values in (steps, losses, scores))
            raise ValueError(f"steps, losses and scores have the shapes {shapes}: one of each a measurement is needed")
        if not (np.diff(steps) > 0).all():
            raise ValueError(f"steps ({steps}) do not ascend: sort the measurements, one a step")
        if not (np.isfinite(losses) & (losses > 0)).all():
            raise ValueError(f"losses ({losses}) must be positive and finite: leave out the measurements that are not")
        log_losses = np.log(losses)
        fitted, starts = falling_blocks(log_losses)
        sizes = np.diff(starts, append=len(steps))
        spare = len(steps) - len(starts)
        squares = float(np.sum((log_losses - fitted) ** 2))
        return cls(
            log_losses=fitted[starts],
            scores=np.add.reduceat(scores, starts) / sizes,
            steps=np.add.reduceat(steps, starts) / sizes,
            residual_deviation=(squares / spare) ** 0.5 if spare else float("nan"),
        )

    @property
    def fall(self) -> float:
        """Of the fitted log loss, from the first measurement to the end.

        >>> round(LossCurve.of([1, 2, 3], np.exp([2.0, 1.0, -3.0]), [0.5, 0.6, 0.7]).fall, 9)
        5.0
        """
        return float(self.log_losses[0] - self.log_losses[-1])

    @property
    def final_log_loss(self) -> float:
        """Fitted log loss at the end.

        >>> LossCurve.of([1, 2], [1.0, 1.0], [0.5, 0.7]).final_log_loss
        0.0
        """
        return float(self.log_losses[-1])

    def score_at(self, log_losses: np.ndarray | float) -> np.ndarray:
        """Score [k] at log losses [k], linear between blocks; nan above the first block and below the last one.

        >>> curve = LossCurve.of([0, 10, 20], np.exp([1.0, 0.0, -1.0]), [10.0, 50.0, 60.0])
        >>> curve.score_at(np.array([1.1, 0.5, -1.0, -1.1]))
        array([nan, 30., 60., nan])
        """
        return self._between_blocks(log_losses, self.scores)

    def step_at(self, log_losses: np.ndarray | float) -> np.ndarray:
        """Step [k] at which the curve reaches log losses [k]; as in `score_at`, with the mean step of each block.

        >>> LossCurve.of([0, 10, 20], np.exp([1.0, 0.0, -1.0]), [10.0, 50.0, 60.0]).step_at(np.array([0.5, -1.0]))
        array([ 5., 20.])
        """
        return self._between_blocks(log_losses, self.steps)

    def slope_at(self, log_losses: np.ndarray | float) -> np.ndarray:
        """Slope [k] of `score_at`: score per unit of log loss; at a block that of the piece with larger loss.

        nan where the score is nan, and everywhere for a curve of one block. An error of log loss changes the score by
        slope x error.

        >>> curve = LossCurve.of([0, 10, 20], np.exp([1.0, 0.0, -1.0]), [10.0, 50.0, 60.0])
        >>> curve.slope_at(np.array([1.1, 1.0, 0.5, 0.0, -0.5, -1.0])).round(9)
        array([ nan, -40., -40., -40., -10., -10.])
        """
        at = np.asarray(log_losses, dtype=float)
        if len(self.log_losses) < 2:
            return np.full(at.shape, np.nan)
        ascending, scores = self.log_losses[::-1], self.scores[::-1]
        slopes = np.diff(scores) / np.diff(ascending)
        piece = np.clip(np.searchsorted(ascending, at, side="right") - 1, 0, len(slopes) - 1)
        return np.where((at >= ascending[0]) & (at <= ascending[-1]), slopes[piece], np.nan)

    def _between_blocks(self, log_losses: np.ndarray | float, values: np.ndarray) -> np.ndarray:
        return np.asarray(np.interp(log_losses, self.log_losses[::-1], values[::-1], left=np.nan, right=np.nan))


def matched_losses(curves: Sequence[LossCurve]) -> np.ndarray:
    """Log losses [6], equally spaced, at which runs are compared: from log l* to log l* + s.

    l* is the largest of the final fitted losses, which all runs reach. s = min(0.35, 0.05 f), f the smallest fall of
    the log loss of a run. An average over six losses is less noisy than the score at one; the second bound keeps it at
    the end of training where the loss falls little, as that of a language model does.

    >>> classifier, slower = (LossCurve.of([0, 1], np.exp([1.0, end]), [0, 1]) for end in (-9.0, -7.0))
    >>> matched_losses([classifier, slower])
    array([-7.  , -6.93, -6.86, -6.79, -6.72, -6.65])
    >>> language_model = LossCurve.of([0, 1], np.exp([1.7, 0.7]), [0, 1])
    >>> matched_losses([language_model, language_model])
    array([0.7 , 0.71, 0.72, 0.73, 0.74, 0.75])
    """
    span = min(LARGEST_SPAN, SPAN_OF_FALL * min(curve.fall for curve in curves))
    return max(curve.final_log_loss for curve in curves) + np.linspace(0, span, NUM_MATCHED)
