"""Computes all rank measures from the singular values of one layer. Pure: no network, no ranks.

A is the layer's activation matrix, N rows (samples) by D columns (units); s_1 >= ... >= s_m are its singular values
divided by sqrt(N), m = min(N, D), or min(N - 1, D) of a centred matrix, whose rows sum to 0. Values below the numerical
floor are rounding noise and are set to 0: they count as small, but they never enter a sum, and a threshold below the
floor gives no measure.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gengap_dist.config.metric_key import LayerKey

TAUS = (1e-1, 1e-2, 1e-3)  # thresholds of near-rank loss, the paper's sigma << 1
LIVE_TAU = 1e-2  # threshold of the near-rank loss of live units
MIN_POWER_LAW_POINTS = 10  # with fewer singular values a slope says nothing
ACTIVATION_FLOORS = {  # relative to s_1 of the raw matrix: rounding error of activations in their dtype
    torch.float64: 0.0,
    torch.float32: 2e-8,
    torch.float16: 2e-5,
    torch.bfloat16: 1.5e-4,
}

RANK_MEASURES = (
    "effective_rank",
    "energy_effective_rank",
    "stable_rank",
    "participation_ratio",
    "pca_99",
    "srank_1e-2",
)


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one layer's activations in one view."""

    layer: str
    """Name of the layer."""
    view: str
    """How the activation became a matrix: "" for [N, D], else channel, pool, flatten or token."""
    centred: bool
    """Whether column means were subtracted."""
    num_samples: int
    """N, rows of the matrix over all ranks."""
    num_units: int
    """D, columns of the matrix."""
    singular_values: Tensor
    """[m] float64, descending, divided by sqrt(N); 0 where the value is below the floor."""
    floor: float
    """Level below which singular values are rounding noise, in the same units."""
    dead_units: int
    """Columns that are zero for every sample. Each also appears as a zero singular value."""
    constant_units: int = 0
    """Columns with one value for all samples up to rounding, dead ones included: zero in a centred matrix."""

    @property
    def key(self) -> str:
        """Name for metrics and files, see `config.metric_key`: layer, then view and `centred` where they apply.

        >>> LayerSpectrum("conv1", "pool", True, 2, 1, torch.ones(1).double(), 0.0, 0).key
        'conv1/pool/centred'
        """
        return LayerKey(self.layer, self.view, self.centred).format()

    def measures(self) -> dict[str, float]:
        """All rank measures that these singular values support; docs/measures.md has the formulas.

        A zero is below every threshold. A matrix of zeros has rank 0 by every measure, and near-rank loss 1.
        Measures that need values below the floor are omitted. The near-rank loss of live units is that of the matrix
        without its columns of zeros (of a centred matrix, without constant units), whose other singular values are the
        same; it is omitted if no unit is live. alpha-ReQ is one of centred matrices only, with the R^2 of its
        fit, and is omitted under 10 singular values above the floor.

        >>> s = torch.tensor([1.0, 0.5, 1e-3, 0.0]).double()
        >>> values = LayerSpectrum("fc", "", False, 100, 4, s, floor=1e-8, dead_units=1).measures()
        >>> values["near_rank_loss/abs_1e-2"], values["numerical_rank"], values["dead_units"]
        (0.5, 3.0, 1.0)
        >>> round(values["near_rank_loss_live/rel_1e-2"], 3)  # one of three
        0.333
        """
        s = self.singular_values
        m = len(s)
        alive = s[s > 0]
        out = {"dead_units": float(self.dead_units), "numerical_rank": float(len(alive)), "sigma_max": float(s[0])}
        for tau in TAUS:
            name = f"1e-{round(-torch.tensor(tau).log10().item())}"
            levels = {"abs": tau, "rel": tau * float(s[0])}
            for kind, level in levels.items():
                if level >= self.floor or len(alive) == 0:
                    count = int(((s < level) | (s == 0)).sum())
                    out[f"near_rank_count/{kind}_{name}"] = float(count)
                    out[f"near_rank_loss/{kind}_{name}"] = count / m
                    if (kind, tau) == ("rel", LIVE_TAU) and (num_live := self._num_live):
                        out[f"near_rank_loss_live/{kind}_{name}"] = max(0, count - (m - num_live)) / num_live
        if len(alive) == 0:
            return out | dict.fromkeys(RANK_MEASURES, 0.0)
        if len(alive) == m:
            out["sigma_min"] = float(s[-1])
            out["condition_number"] = float(s[0] / s[-1])
        energy = alive.square()
        out |= {
            "effective_rank": _exp_entropy(alive),
            "energy_effective_rank": _exp_entropy(energy),
            "stable_rank": float(energy.sum() / energy[0]),
            "participation_ratio": float(energy.sum().square() / energy.square().sum()),
            "pca_99": float(_least_k(energy, 0.99)),
            "srank_1e-2": float(_least_k(alive, 0.99)),
        }
        if self.centred and len(alive) >= MIN_POWER_LAW_POINTS:
            out["alpha_req"], out["alpha_req_r2"] = _power_law(energy)
        return out

    @property
    def _num_live(self) -> int:
        """Singular values of the matrix without its columns of zeros."""
        num_columns = self.num_units - (self.constant_units if self.centred else self.dead_units)
        return min(num_columns, len(self.singular_values))


def _exp_entropy(values: Tensor) -> float:
    """exp(-sum p log p), p = values / sum(values) (Roy & Vetterli 2007); no epsilon inside.

    >>> round(_exp_entropy(torch.ones(10).double()), 9)
    10.0
    """
    return float(torch.exp(torch.special.entr(values / values.sum()).sum()))


def _least_k(values: Tensor, share: float) -> int:
    """The smallest k such that the first k values hold `share` of the sum.

    >>> _least_k(torch.tensor([9.0, 0.5, 0.45, 0.05]).double(), 0.99)
    3
    """
    cumulative = values.cumsum(0)
    return int((cumulative < share * cumulative[-1]).sum()) + 1


def _power_law(energy: Tensor) -> tuple[float, float]:
    """alpha-ReQ: minus the least-squares slope of log s_i^2 against log i (Agrawal et al. 2022); and the fit's R^2.

    The range is that of all values given, i = 1, ..., n. If all are equal the slope is 0, and R^2 is 1.

    >>> [round(value, 9) for value in _power_law(torch.arange(1, 50).double() ** -2)]
    [2.0, 1.0]
    """
    x = torch.arange(1, len(energy) + 1, dtype=torch.float64).log()
    y = energy.cpu().log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    total = float(y.square().sum())
    return -float(slope), 1 - float((y - slope * x).square().sum()) / total if total else 1.0
