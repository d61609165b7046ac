"""NC1 against the textbook formula with numpy's pseudo-inverse; the same on any number of ranks, even idle ones."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes import measure
from gengap_dist.probes.neural_collapse import ClassifierInputs, _whiten, nc1
from tests.probes.test_hessian import Fussy, dealt, left_as_found, refusal

SIZES = (7, 16, 1, 9, 4)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(9, 6)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


def setting(dtype: torch.dtype) -> tuple[Net, Batches]:
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 4, 4, 5] * 7)[: sum(SIZES)]  # class 3 is absent, 4 is twice as large
    images = torch.randn(len(labels), 1, 6, 6) * (1 + labels[:, None, None, None])
    return Net().to(dtype), list(zip(images.to(dtype).split(SIZES), labels.split(SIZES), strict=True))


def textbook(h: np.ndarray, labels: np.ndarray) -> float:
    classes = np.unique(labels)
    means = np.stack([h[labels == c].mean(0) for c in classes])
    within = sum(
        np.outer(x - means[classes == c][0], x - means[classes == c][0]) for x, c in zip(h, labels, strict=True)
    )
    centre = means.mean(0)
    between = sum(np.outer(m - centre, m - centre) for m in means) / len(classes)
    return float(np.trace(within / len(h) @ np.linalg.pinv(between, rcond=1e-12)) / len(classes))


def on_inputs(h: torch.Tensor, labels: torch.Tensor, num_classes: int = 4, size: int = 10) -> float:
    """NC1 of a network whose features are its inputs."""
    model = nn.Linear(h.shape[1], num_classes).to(h.dtype)
    return nc1(model, list(zip(h.split(size), labels.split(size), strict=True)))


def everything(world: World) -> dict:
    out = {}
    for dtype in (torch.float64, torch.float32):
        model, batches = setting(dtype)
        for how, mine in dealt(batches, world).items():
            out[dtype, how] = nc1(model, mine, world=world)
    mine = dealt(batches, world)["few"]
    out["empty"] = refusal(nc1, model, [], world=world)
    out["one class"] = refusal(nc1, model, [(x, 0 * y) for x, y in mine], world=world)
    out["soft"] = refusal(nc1, nn.Sequential(model, nn.Softmax(1)), mine, world=world)
    nn.init.constant_(model.body[1].bias, math.nan)
    with pytest.warns(UserWarning, match="features before the classifier are not finite"):
        out["nan"] = nc1(model, mine, world=world)
    return out


@pytest.fixture(scope="module")
def on(crews) -> dict[int, list[dict]]:
    return {size: crews[size](everything) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
def test_sharding_law(on, size):
    for found in on[size]:
        for dtype in (torch.float64, torch.float32):
            for how in ("dealt", "few"):
                assert found[dtype, how] == pytest.approx(on[1][0][dtype, "dealt"], rel=1e-10)
                assert found[dtype, how] == on[size][0][dtype, how]
        assert math.isnan(found["nan"])
        assert "no rank has any samples" in found["empty"]
        assert "all samples are of class 0" in found["one class"]
        assert "Sequential ends" in found["soft"]
    assert "something after its last nn.Linear (0.head)" in on[size][-1]["soft"]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_equal_to_the_textbook(on, dtype, error):
    model, batches = setting(torch.float64)
    images, labels = map(torch.cat, zip(*batches, strict=True))
    with torch.no_grad():
        true = textbook(model.eval().body(images).numpy(), labels.numpy())
    assert on[1][0][dtype, "dealt"] == pytest.approx(true, rel=error)


def test_mean_far_from_zero_costs_nothing():
    """Powers of two, so that the shift itself is exact."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    h = (torch.randn(40, 6).double() * 2**12 + 2**12 * torch.randn(4, 6).double()[labels]).round() / 2**12
    assert on_inputs(h + 2**30, labels) == pytest.approx(on_inputs(h, labels), rel=1e-5)
    assert on_inputs(h * 2.0**-30, labels) == pytest.approx(on_inputs(h, labels), rel=1e-12)
    assert on_inputs(h, labels) == pytest.approx(textbook(h.numpy(), labels.numpy()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_no_direction(dtype):
    """Class means on a line in 6 dimensions, 4 classes: of 3 directions between classes two are only rounding."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    line, noise = torch.randn(1, 6).double(), torch.randn(400, 1).double()
    h = (labels[:, None] + noise) * line
    true = textbook((labels[:, None] + noise).numpy(), labels.numpy())  # the same in one dimension
    assert on_inputs(h.to(dtype), labels) == pytest.approx(true, rel=1e-4)


def test_centred_means_of_c_classes_have_c_minus_1_directions_whatever_the_rounding():
    torch.manual_seed(0)
    assert _whiten(torch.randn(5, 9).double(), eps=0.0).shape == (9, 4)
    assert _whiten(torch.randn(5, 2).double(), eps=0.0).shape == (2, 2)


def test_full_collapse_is_zero_and_more_spread_is_more():
    labels = torch.arange(12) % 3
    corners = torch.eye(3).double()[labels]
    assert on_inputs(corners, labels, 3) == 0.0
    torch.manual_seed(0)
    noise = torch.randn_like(corners)
    noise -= torch.stack([noise[labels == c].mean(0) for c in range(3)])[labels]
    small, large = (on_inputs(corners + scale * noise, labels, 3) for scale in (0.1, 0.2))
    assert large == pytest.approx(4 * small, rel=1e-9)


def test_a_dead_network_has_not_collapsed():
    with pytest.warns(UserWarning, match="all classes have the same mean"):
        assert math.isnan(on_inputs(torch.ones(8, 3), torch.arange(8) % 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()), "Sequential ends without running any nn.Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh()), r"after its last nn.Linear \(1\)"),
        (nn.Linear(6, 3), r"ends in itself, whose input has shape \[7, 1, 6, 6\]"),
    ],
)
def test_what_has_no_such_classifier_is_refused(model, message):
    with pytest.raises(UsageError, match=message):
        nc1(model, setting(torch.float32)[1])


def test_features_of_the_passes_of_the_spectra():
    torch.manual_seed(0)
    model, passes = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)), []
    model.register_forward_hook(lambda *_: passes.append(1))
    batches = [(x, labels % 3) for x, labels in setting(torch.float32)[1]]
    found = ClassifierInputs(model)
    with found.attached():
        measure(model, [x for x, _ in batches], on_outputs=lambda number, outputs: found.add(outputs))
    assert len(passes) == 1 + len(batches)  # the first one is traced
    value = nc1(model, batches, features=found)
    assert len(passes) == 1 + len(batches)
    assert value == nc1(model, batches)
    assert len(passes) == 1 + 2 * len(batches)
    assert not model[3]._forward_hooks


def test_the_refusal_of_features_of_other_passes():
    model, batches = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ReLU()), setting(torch.float32)[1]
    found = ClassifierInputs(model)
    with found.attached():
        measure(model, [x for x, _ in batches], on_outputs=lambda number, outputs: found.add(outputs))
    with pytest.raises(UsageError, match=r"after its last nn.Linear \(1\)"):
        nc1(model, batches, features=found)


def test_model_is_left_as_found():
    left_as_found(nc1, Fussy())
