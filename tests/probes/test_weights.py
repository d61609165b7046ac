"""Weight spectra against numpy, bit for bit the same on all ranks; distances in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.weights import distance_from_init, flat_parameters, weight_spectra


def net() -> nn.Module:
    torch.manual_seed(0)
    model = models.build("lenet5", DataSpec.images(10, 3, 16))
    with torch.no_grad():
        model.fc1.affine.weight[:, 3] = 0.0
        model.fc2.affine.weight[:] = torch.randn(84, 5) @ torch.randn(5, 120)
    model.conv1.requires_grad_(False)
    model.scale = nn.Parameter(torch.randn(2, 3, 4))
    return model


def spectra(world: World) -> list:
    return [(s.layer, s.singular_values.numpy().tobytes()) for s in weight_spectra(net(), world=world)]


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_have_the_same_bits(crews, size):
    found, alone = crews[size](spectra), spectra(World())
    assert all(other == found[0] for other in found)
    assert [name for name, _ in found[0]] == [name for name, _ in alone]
    for (name, bits), (_, true) in zip(found[0], alone, strict=True):
        s, t = np.frombuffer(bits), np.frombuffer(true)
        assert np.allclose(s, t, rtol=0, atol=1e-13 * t[0]), name


def test_equal_to_numpy():
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = {s.layer: s for s in weight_spectra(model)}
    assert [*found] == ["scale", "conv2.affine", "fc1.affine", "fc2.affine", "fc3"]
    for name, s in found.items():
        weight = dict(model.named_parameters())[name if name == "scale" else f"{name}.weight"].detach()
        matrix = weight.numpy().astype(np.float64).reshape(len(weight), -1)
        true = np.linalg.svd(matrix, compute_uv=False)
        assert np.abs(s.singular_values.numpy() - true).max() < 1e-13 * true[0]
        assert (s.num_samples, s.num_units, s.view, s.centred) == (*matrix.shape, "weight", False)
        assert s.dead_units == (1 if name == "fc1.affine" else 0)
        assert s.key == f"{name}/weight"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rank_deficient_weights_give_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(30, 20).double()
    with torch.no_grad():
        layer.weight[:] = torch.randn(20, 7).double() @ torch.randn(7, 30).double()
    (found,) = weight_spectra(nn.Sequential(layer))
    assert int((found.singular_values > 0).sum()) == 7
    assert (found.singular_values[7:] == 0).all()
    assert found.measures()["numerical_rank"] == 7
    nn.init.zeros_(layer.weight)
    (found,) = weight_spectra(layer)
    assert (found.layer, found.dead_units, found.measures()["numerical_rank"]) == ("weight", 30, 0)


def test_non_finite_weights_are_left_out_with_a_warning():
    model = net()
    with torch.no_grad():
        model.fc1.affine.weight[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="weight fc1.affine.weight has non-finite entries"):
        assert [s.layer for s in weight_spectra(model)] == ["scale", "conv2.affine", "fc2.affine", "fc3"]


def test_nothing_but_vectors_has_no_spectra():
    assert weight_spectra(nn.BatchNorm1d(3)) == []


def test_flat_is_a_copy_of_what_is_trained():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1, bias=False))
    vector = flat_parameters(model)
    assert vector.tolist() == model[1].weight.detach().flatten().tolist()
    assert not vector.requires_grad
    with torch.no_grad():
        model[1].weight += 1
    assert vector.tolist() != model[1].weight.detach().flatten().tolist()
    with pytest.raises(UsageError, match="Linear has no parameter with requires_grad"):
        flat_parameters(model[0])


def test_distance():
    model = net()
    start = flat_parameters(model)
    assert distance_from_init(model, start)["distance_from_init"] == 0.0
    step = torch.randn_like(start) * 1e-3
    torch.nn.utils.vector_to_parameters(start + step, [p for p in model.parameters() if p.requires_grad])
    now, then = flat_parameters(model).numpy().astype(np.float64), start.numpy().astype(np.float64)
    found = distance_from_init(model, start)
    assert found["weight_norm"] == pytest.approx(np.linalg.norm(now), rel=1e-12)
    assert found["distance_from_init"] == pytest.approx(np.linalg.norm(now - then), rel=1e-12)
    assert found["relative_distance_from_init"] == pytest.approx(
        np.linalg.norm(now - then) / np.linalg.norm(then), rel=1e-12
    )
    assert [*distance_from_init(model, 0 * start)] == ["weight_norm", "distance_from_init"]
    with pytest.raises(UsageError, match=r"initial has shape \[3\]"):
        distance_from_init(model, start[:3])
