"""Against a float64 SVD of the gathered rows, for any shape, any split over 1 to 4 ranks, and the worst matrices."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from gengap_dist.distributed.process_group import World
from gengap_dist.probes import measure


def probe(world: World, parts: list[list[torch.Tensor]], method: str, memory_mib: int) -> list[tuple]:
    model = nn.Sequential(nn.Identity())
    found = measure(
        model, parts[world.rank], layers="0", views=["flatten"], world=world, method=method, memory_mib=memory_mib
    )
    return [(s.singular_values.numpy(), s.floor, s.num_samples, s.num_units, s.dead_units) for s in found]


KINDS = ("random", "deficient", "ill", "zero", "shifted", "dead")


def matrix(kind: str, n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    rows = rng.normal(size=(n, d))
    if kind == "deficient":
        r = max(1, min(n, d) // 2)
        rows = rng.normal(size=(n, r)) @ rng.normal(size=(r, d))
    elif kind == "ill":
        u, _, v = np.linalg.svd(rows, full_matrices=False)
        rows = u * np.logspace(0, -12, min(n, d)) @ v
    elif kind == "zero":
        rows[:] = 0
    elif kind == "shifted":
        rows = 300 + rows
    elif kind == "dead":
        rows[:, rng.random(d) < 0.5] = 0
    return rows


cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "n": st.integers(2, 70),
        "d": st.integers(1, 90),
        "cuts": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "size": st.integers(1, 4),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "method": st.sampled_from(["gram", "tsqr"]),
        "memory_mib": st.sampled_from([1, 512]),
        "seed": st.integers(0, 2**16),
    }
)
BASE = {"cuts": [0.5, 0.5, 0.9], "size": 4, "dtype": torch.float64, "method": "gram", "memory_mib": 512, "seed": 1}


@settings(max_examples=150)
@given(case=cases)
@example(case=BASE | {"kind": "ill", "n": 60, "d": 80})
@example(case=BASE | {"kind": "ill", "n": 80, "d": 60, "method": "tsqr"})
@example(case=BASE | {"kind": "zero", "n": 5, "d": 80, "size": 3})
@example(case=BASE | {"kind": "deficient", "n": 70, "d": 70})
@example(case=BASE | {"kind": "shifted", "n": 70, "d": 90})
def test_every_singular_value(crews, case):
    rng = np.random.default_rng(case["seed"])
    rows = torch.from_numpy(matrix(case["kind"], case["n"], case["d"], rng)).to(case["dtype"])
    edges = [0, *sorted(round(cut * len(rows)) for cut in case["cuts"][: case["size"] - 1]), len(rows)]
    shards = [list(rows[a:b].split(17)) for a, b in pairwise(edges)]
    shards = [[part for part in shard if len(part)] for shard in shards]  # a rank may have nothing at all
    answers = crews[case["size"]](probe, shards, case["method"], case["memory_mib"])
    for other in answers[1:]:
        for mine, its in zip(answers[0], other, strict=True):
            assert np.array_equal(mine[0], its[0])  # to the last bit
            assert mine[1:] == its[1:]
    a = rows.double().numpy()
    for centred, (values, floor, num_samples, num_units, dead_units) in enumerate(answers[0]):
        assert (num_samples, num_units) == a.shape
        assert dead_units == (a == 0).all(0).sum()
        true = np.linalg.svd(a - centred * a.mean(0), compute_uv=False) / len(a) ** 0.5
        true = true[: min(len(a) - centred, a.shape[1])]  # centred rows sum to 0
        assert len(values) == len(true)
        if true[0] < 1e-14 * np.abs(a).max():  # one row, centred: nothing is left
            true[:] = 0
        large = (true >= 1e-4 * true[0]) & (true > 2 * floor)
        assert np.all(np.abs(values[large] / true[large] - 1) <= 1e-6)
        assert np.all(true[values > 0] > floor / 2)  # what is reported is there
        assert np.all(values[true > 2 * floor] > 0)  # and what is there is reported
        if case["method"] == "tsqr" and case["dtype"] == torch.float64:
            assert np.abs(values - true).max() <= 1e-13 * max(true[0], np.abs(a).max())


def test_known_answers(crews):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(60, 10)))
    p, _ = np.linalg.qr(rng.normal(size=(200, 10)))
    for rows in (q @ p.T, p @ q.T):  # wide and tall, ten equal singular values
        for size, crew in ((size, crews[size]) for size in (1, 2, 3, 4)):
            shards = [[torch.from_numpy(rows[rank::size].copy())] for rank in range(size)]
            for method in ("gram", "tsqr"):
                assert crew(effective_ranks, shards, method)[0] == pytest.approx(10, abs=1e-6)
    for size, crew in ((size, crews[size]) for size in (1, 2, 3, 4)):
        shards = [[torch.eye(24)[rank::size]] for rank in range(size)]
        assert crew(effective_ranks, shards, "gram")[0] == pytest.approx(24, abs=1e-6)


def effective_ranks(world: World, shards: list[list[torch.Tensor]], method: str) -> float:
    (s,) = measure(
        nn.Sequential(nn.Identity()), shards[world.rank], layers="0", centred=[False], world=world, method=method
    )
    return s.measures()["effective_rank"]


def test_primal_dual_and_tsqr_agree(crews):
    a = torch.randn(150, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    found = {}
    for name, rows in {"primal": a, "dual": a.T.contiguous()}.items():  # the same singular values, times sqrt(N)
        for method in ("gram", "tsqr"):
            shards = [[rows[rank::3]] for rank in range(3)]
            values = crews[3](probe, shards, method, 512)[0][0][0]
            found[name, method] = values * len(rows) ** 0.5
    reference = found["primal", "gram"]
    assert len(reference) == 40
    for name, values in found.items():
        assert np.abs(values / reference - 1).max() < 1e-12, name
