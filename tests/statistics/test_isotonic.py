import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.statistics.isotonic import LossCurve, falling_blocks, matched_losses


def best_of_all_partitions(values: np.ndarray) -> np.ndarray:
    """Of all ways to cut values [n] into blocks whose means fall, the fit with the smallest sum of squares."""
    best, fit = np.inf, values
    for cuts in itertools.product((False, True), repeat=len(values) - 1):
        blocks = np.split(values, np.flatnonzero(cuts) + 1)
        candidate = np.concatenate([np.full(len(block), block.mean()) for block in blocks])
        if (np.diff(candidate) <= 1e-12).all() and (squares := np.sum((values - candidate) ** 2)) < best:
            best, fit = squares, candidate
    return fit


@given(st.lists(st.one_of(st.integers(-3, 3), st.floats(-5, 5)), min_size=1, max_size=7))
def test_blocks_are_the_best_of_all_partitions(given_values):
    values = np.array(given_values, dtype=float)
    fitted, starts = falling_blocks(values)
    assert fitted == pytest.approx(best_of_all_partitions(values), abs=1e-6)
    assert starts[0] == 0
    assert (np.diff(fitted[starts]) < 0).all()
    for block in np.split(fitted, starts[1:]):
        assert (block == block[0]).all()


def test_a_fit_is_optimal():
    """Sums of residuals from the left are never positive and are 0 at a block's end (Karush, Kuhn and Tucker)."""
    values = np.random.default_rng(0).normal(0, 1, 300) - np.linspace(0, 3, 300)
    fitted, starts = falling_blocks(values)
    sums = np.cumsum(fitted - values)
    assert 10 < len(starts) < 200
    assert (sums > -1e-9).all()
    assert sums[np.append(starts[1:] - 1, 299)] == pytest.approx(0, abs=1e-9)


def test_a_curve_without_noise_is_read_back():
    """log l = 1 - step / 100 and score = 60 - 10 log l."""
    steps = np.arange(0, 501, 20)
    log_losses = 1 - steps / 100
    curve = LossCurve.of(steps, np.exp(log_losses), 60 - 10 * log_losses)
    at = np.array([0.99, 0.123, -2.5, -4.0])
    assert curve.score_at(at) == pytest.approx(60 - 10 * at)
    assert curve.step_at(at) == pytest.approx(100 * (1 - at))
    assert curve.slope_at(at) == pytest.approx(-10)
    assert curve.final_log_loss == pytest.approx(-4)
    assert np.isnan(curve.residual_deviation)
    for outside in (1.01, -4.01):
        assert np.isnan([curve.score_at(outside), curve.step_at(outside), curve.slope_at(outside)]).all()


def test_noise_is_averaged_and_measured():
    rng = np.random.default_rng(0)
    steps, deviation = np.arange(400), 0.05
    truth = np.repeat(-np.arange(4.0), 100)  # a loss that falls in four steps: a block is as good as its average
    curves = [
        LossCurve.of(steps, np.exp(truth + rng.normal(0, deviation, 400)), 60 - 10 * truth + rng.normal(0, 1, 400))
        for _ in range(40)
    ]
    assert np.mean([curve.residual_deviation for curve in curves]) == pytest.approx(deviation, rel=0.02)
    assert np.mean([curve.score_at(-1.5) for curve in curves]) == pytest.approx(75, abs=0.5)


@pytest.mark.parametrize(("fall", "part"), [(0.0, 1.0), (0.1, 0.94), (1.0, 0.75), (2.0, 0.6)])
def test_the_deviation_of_falling_curves_is_too_small(fall, part):
    """As the docstring says: `fall` deviations of the noise from one measurement to the next."""
    rng, steps = np.random.default_rng(0), np.arange(60)
    curves = [LossCurve.of(steps, np.exp(0.05 * (rng.normal(0, 1, 60) - fall * steps)), steps) for _ in range(100)]
    assert np.mean([curve.residual_deviation**2 for curve in curves]) ** 0.5 / 0.05 == pytest.approx(part, abs=0.06)


def test_matched_curves_agree_at_the_same_losses():
    """One dependence of score on loss, of two runs at other speeds and with other final losses."""

    def run(speed: float, num: int) -> LossCurve:
        log_losses = 1 - speed * np.arange(num) / 100
        return LossCurve.of(np.arange(num), np.exp(log_losses), 80 - 5 * log_losses)

    fast, slow = run(2.0, 200), run(0.5, 500)
    losses = matched_losses([fast, slow])
    assert losses[0] == slow.final_log_loss > fast.final_log_loss
    assert np.diff(losses) == pytest.approx([0.05 * slow.fall / 5] * 5)
    assert slow.score_at(losses) == pytest.approx(fast.score_at(losses))
    assert not np.isnan(slow.score_at(losses)).any()


def test_one_block():
    curve = LossCurve.of([0, 1, 2], np.exp([0.0, 1.0, 2.0]), [1.0, 2.0, 6.0])
    assert (curve.final_log_loss, curve.score_at(curve.final_log_loss)) == pytest.approx((1.0, 3.0))
    assert np.isnan(curve.slope_at(np.array([1.0, 2.0]))).all()
    assert curve.residual_deviation == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("steps", "losses", "message"),
    [
        ([0, 1], [1.0], "one of each a measurement"),
        ([], [], "one of each a measurement"),
        ([1, 0], [1.0, 2.0], "do not ascend"),
        ([0, 1], [1.0, 0.0], "must be positive and finite"),
        ([0, 1], [1.0, float("nan")], "must be positive and finite"),
        ([0, 1], [float("inf"), 1.0], "must be positive and finite"),
    ],
)
def test_bad_input(steps, losses, message):
    with pytest.raises(ValueError, match=message):
        LossCurve.of(steps, losses, [0.5] * len(steps))
