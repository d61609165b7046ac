import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gengap_dist.probes import measure
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum


def measured(matrix: torch.Tensor, *, centred: bool = False) -> LayerSpectrum:
    (found,) = measure(nn.Sequential(nn.Identity()), matrix.split(37), layers="0", centred=[centred])
    return found


@given(n=st.integers(2, 60), d=st.integers(1, 40), seed=st.integers(0, 10_000), centred=st.booleans())
def test_singular_values_are_numpys(n, d, seed, centred):
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)) + 0.5)
    ours = measured(matrix, centred=centred).singular_values.numpy()
    theirs = np.linalg.svd(matrix.numpy() - centred * matrix.numpy().mean(0), compute_uv=False) / np.sqrt(n)
    theirs = theirs[: min(n - centred, d)]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-7 * max(theirs[0], np.abs(matrix.numpy()).max())


def test_the_floor_is_where_it_says():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 40)))[0] for size in (500, 40))
    true = np.logspace(0, -12, 40)
    s = measured(torch.from_numpy(u * true @ v.T) * 500**0.5)
    found = s.singular_values.numpy()
    above = true > 10 * s.floor
    assert np.abs(found[above] / true[above] - 1).max() < 0.02
    assert s.measures()["numerical_rank"] == pytest.approx((true > s.floor).sum(), abs=1)


def test_every_measure_on_a_known_spectrum():
    s = torch.tensor([2.0, 1.0, 0.05, 0.005]).double()
    values = LayerSpectrum("fc", "", False, 100, 4, s, floor=1e-8, dead_units=0).measures()
    p, q = (s / s.sum()).numpy(), (s**2 / (s**2).sum()).numpy()
    expected = {
        "sigma_max": 2.0,
        "sigma_min": 0.005,
        "condition_number": 400.0,
        "numerical_rank": 4,
        "near_rank_count/abs_1e-1": 2,
        "near_rank_count/abs_1e-2": 1,
        "near_rank_loss/abs_1e-2": 0.25,
        "near_rank_count/abs_1e-3": 0,
        "near_rank_count/rel_1e-1": 2,
        "near_rank_count/rel_1e-2": 1,
        "near_rank_count/rel_1e-3": 0,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "energy_effective_rank": np.exp(-(q * np.log(q)).sum()),
        "stable_rank": (s**2).sum() / 4,
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "pca_99": 2,
        "srank_1e-2": 3,
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value)), name


def test_a_true_rank_of_ten_measures_ten():
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.normal(size=(300, 10)))[0]
    v = np.linalg.qr(rng.normal(size=(64, 10)))[0]
    values = measured(torch.from_numpy(u @ v.T)).measures()
    assert values["effective_rank"] == pytest.approx(10, abs=1e-6)
    assert values["numerical_rank"] == 10
    assert "sigma_min" not in values
    assert values["near_rank_loss/rel_1e-3"] == pytest.approx(54 / 64)


def test_thresholds_below_the_floor_give_no_measure():
    s = torch.tensor([1e6, 1.0]).double()
    values = LayerSpectrum("fc", "", False, 9, 2, s, floor=1e-2 * 1.5, dead_units=0).measures()
    assert "near_rank_loss/abs_1e-2" not in values
    assert "near_rank_loss/abs_1e-1" in values


def test_a_dead_layer_has_rank_0_and_has_lost_everything():
    values = measured(torch.zeros(9, 3)).measures()
    assert values["dead_units"] == 3
    assert values["numerical_rank"] == 0
    assert values["near_rank_loss/abs_1e-1"] == 1.0
    assert values["near_rank_loss/rel_1e-3"] == 1.0
    assert values["effective_rank"] == values["stable_rank"] == values["pca_99"] == 0
    assert "sigma_min" not in values


def test_centring_alone_makes_no_near_rank_loss():
    """The rows of a centred matrix sum to 0, so it has at most N - 1 singular values: none of them is small here."""
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 40)))
    s = measured(matrix, centred=True)
    assert len(s.singular_values) == 15
    assert s.measures()["near_rank_loss/rel_1e-2"] == 0
    assert s.measures()["sigma_min"] > 0.5
    assert len(measured(matrix).singular_values) == 16


def test_dead_units_are_columns_of_zeros():
    matrix = torch.rand(50, 6).double()
    matrix[:, 2] = 0
    matrix[:, 4] = 1  # constant: dead only once its mean is gone
    assert measured(matrix).dead_units == measured(matrix, centred=True).dead_units == 1
    assert measured(matrix, centred=True).measures()["numerical_rank"] == 4


def test_coarse_activations_have_a_higher_floor():
    matrix = torch.rand(9, 3)
    floors = [measured(matrix.to(dtype)).floor for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert floors[0] < floors[1] < floors[2] / 1000


def test_a_large_mean_does_not_spoil_the_centred_spectrum():
    rng = np.random.default_rng(3)
    small = rng.normal(size=(400, 12)) * np.logspace(0, -5, 12)
    s = measured(torch.from_numpy(small + 300.0), centred=True)
    true = np.linalg.svd(small - small.mean(0), compute_uv=False) / 20
    assert s.floor < 1e-7 * true[0]
    assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


def test_live_units_are_those_that_vary():
    """A matrix without its constant columns has the same measure and no constant units."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(80, 12)) @ np.diag(10.0 ** -np.arange(12) / 3)
    constant = np.concatenate([matrix, np.zeros((80, 3)), np.full((80, 2), 7.0)], axis=1)
    for centred, dropped in ((True, 5), (False, 3)):
        with_some = measured(torch.from_numpy(constant), centred=centred)
        without = measured(
            torch.from_numpy(constant[:, [*range(12), *((15, 16) if not centred else ())]]), centred=centred
        )
        assert (
            with_some.constant_units - without.constant_units == dropped if centred else with_some.constant_units == 5
        )
        live = with_some.measures()["near_rank_loss_live/rel_1e-2"]
        assert live == without.measures()["near_rank_loss/rel_1e-2"]
        assert live < with_some.measures()["near_rank_loss/rel_1e-2"]


@pytest.mark.parametrize("num_rows", [10, 40])
def test_live_units_of_wide_and_tall_matrices(num_rows):
    """D = 30: kept as rows, or as columns; float32, in which a constant unit may be a little uneven."""
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(num_rows, 30))).float()
    matrix[:, :4], matrix[:, 4:6] = 0.0, 3.0
    matrix[::2, 5] = 3.0000002
    s = measured(matrix, centred=True)
    assert (s.dead_units, s.constant_units) == (4, 6)
    m_live = min(num_rows - 1, 24)
    count = s.measures()["near_rank_count/rel_1e-2"] - (len(s.singular_values) - m_live)
    assert s.measures()["near_rank_loss_live/rel_1e-2"] == count / m_live


def test_a_layer_without_live_units_has_no_measure_of_them():
    values = measured(torch.zeros(9, 3), centred=True).measures()
    assert values["near_rank_loss/rel_1e-2"] == 1.0
    assert "near_rank_loss_live/rel_1e-2" not in values


def test_alpha_req_is_of_centred_matrices_with_enough_points():
    def alpha(num: int, *, centred: bool) -> dict[str, float]:
        s = torch.arange(1, num + 1).double() ** -0.75
        return LayerSpectrum("fc", "", centred, 99, num, s, 0.0, 0).measures()

    assert alpha(10, centred=True)["alpha_req"] == pytest.approx(1.5)
    assert alpha(10, centred=True)["alpha_req_r2"] == pytest.approx(1.0)
    assert "alpha_req" not in alpha(9, centred=True)
    assert "alpha_req" not in alpha(50, centred=False)
    bent = LayerSpectrum("fc", "", True, 99, 20, torch.linspace(1, 0.01, 20).double(), 0.0, 0).measures()
    x, y = np.log(np.arange(1, 21)), np.log(np.linspace(1, 0.01, 20) ** 2)
    assert bent["alpha_req"] == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert bent["alpha_req_r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
