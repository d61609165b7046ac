import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm as reference

from gengap_dist import models
from gengap_dist.config import UsageError
from gengap_dist.models.norm import GhostBatchNorm1d


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 32, 10), (3, 32, 100), (1, 28, 10)])
def test_every_model_maps_images_to_logits_and_learns_everywhere(name, channels, size, classes):
    model = models.build(name, num_classes=classes, in_channels=channels, image_size=size)
    logits = model(torch.randn(4, channels, size, size))
    assert logits.shape == (4, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("lenet5", {"in_channels": 1}, 61_706),
        ("mlp", {"in_channels": 1, "image_size": 28, "widths": (512,) * 5}, 1_462_794),
    ],
)
def test_parameter_counts(name, arguments, count):
    model = models.build(name, num_classes=10, **arguments)
    assert sum(p.numel() for p in model.parameters()) == count


def test_own_factory(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.build("mynet:make", num_classes=7, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(UsageError, match=r"mynet:wrong\) made a int"):
        models.build("mynet:wrong", num_classes=7, in_channels=1)
    with pytest.raises(UsageError, match=r"mynet:mkae\) cannot be imported"):
        models.build("mynet:mkae", num_classes=7, in_channels=1)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UsageError, match=r"lenet \(|did you mean lenet5"):
        models.build("lenet", num_classes=10, in_channels=1)


def test_ghost_batch_norm_is_batch_norm_per_group():
    norm = GhostBatchNorm1d(3, ghost_size=4).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    out = norm(x)
    for group in (x[:4], x[4:8], x[8:]):
        at = int((x == group[0]).all(1).nonzero()[0])
        expected = reference(group, None, None, norm.weight, norm.bias, training=True)
        assert torch.allclose(out[at : at + len(group)], expected)
    norm.eval()
    assert torch.allclose(norm(x), nn.BatchNorm1d.forward(norm, x))
