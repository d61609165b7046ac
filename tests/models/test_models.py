"""Every network of MODELS by one contract, and each by the literature's own count of parameters."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.probes.layers import select_layers

RESNETS = {f"resnet{depth}": (depth - 2) // 6 for depth in (20, 44, 56, 110)}  # blocks in a stage
LAYERS = {
    "lenet5": ["conv1", "conv2", "fc1", "fc2"],
    "mlp": ["fc1", "fc2", "fc3", "fc4", "fc5"],
    "f1": ["fc1", "fc2", "fc3", "fc4", "fc5"],
    "c1": ["conv1", "conv2", "fc1", "fc2"],
    "vgg16": [f"conv{s}_{k}" for s, convs in enumerate([2, 2, 3, 3, 3], 1) for k in range(1, convs + 1)]
    + ["fc1", "fc2"],
} | {
    name: ["conv1"] + [f"stage{s}.{b}.{layer}" for s in (1, 2, 3) for b in range(blocks) for layer in ("conv1", "act")]
    for name, blocks in RESNETS.items()
}
"""What probes find by themselves: the output of every layer but the classifier."""
OF_IMAGES = [name for name in models.MODELS if name != "gpt"]


def make(name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, **more) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, DataSpec.images(num_classes, in_channels, image_size), **more)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def norm_count(model: nn.Module) -> int:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    return sum(count(module) for module in model.modules() if isinstance(module, norms))


def fully_connected(*sizes: int, norm: bool = False) -> int:
    """d_in d_out + d_out a layer, and 2 d_out for the norm of each but the last."""
    return sum(a * b + b for a, b in pairwise(sizes)) + norm * 2 * sum(sizes[1:-1])


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 100)])
def test_every_model(name, channels, classes):
    model = make(name, classes, channels, image_size=32)
    again = make(name, classes, channels, image_size=32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    images = torch.randn(4, channels, 32, 32)
    model.train()
    assert model(images).shape == (4, classes)
    model.double().eval()  # without dropout, and a bias before batch norm has an effect only here
    logits = model(images.double())
    assert (logits.shape, logits.dtype) == ((4, classes), torch.float64)
    assert torch.allclose(torch.cat([model(image[None].double()) for image in images]), logits)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert [layer.name for layer in select_layers(model, images[:1].double(), ["auto"])] == LAYERS[name]


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name != "vgg16"])
def test_mnist_in_its_own_size(name):
    assert make(name, in_channels=1, image_size=28)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name != "mlp"])  # its widths are the user's
def test_batch_norm_is_of_torchs_own_class(name):
    """So that it can be exchanged for another norm by its class; LeNet-5 has none."""
    kinds = {type(m) for m in make(name).modules() if "Norm" in type(m).__name__}
    assert kinds <= {nn.BatchNorm1d, nn.BatchNorm2d}
    assert bool(kinds) == (name != "lenet5")


def test_lenet5_count():
    """Convolutions 5 x 5 x 1 x 6 + 6 and 5 x 5 x 6 x 16 + 16, then 16 maps of 5 x 5 (or 4 x 4) to 120, 84, 10."""
    convolutions = 156 + 2416
    for size, side in [(32, 5), (28, 4)]:
        expected = convolutions + fully_connected(16 * side**2, 120, 84, 10)
        assert count(make("lenet5", in_channels=1, image_size=size)) == expected
    assert convolutions + fully_connected(400, 120, 84, 10) == 61_706


def test_f1_count_whatever_the_mlps_widths():
    expected = fully_connected(784, *[512] * 5, 10, norm=True)
    assert expected == 1_462_794
    assert count(make("f1", in_channels=1, image_size=28, widths=(8,))) == expected
    assert count(make("mlp", in_channels=1, image_size=28, widths=(512,) * 5)) == expected
    assert count(make("mlp", in_channels=1, image_size=28, widths=(8,))) == fully_connected(784, 8, 10, norm=True)


@pytest.mark.parametrize("size", [32, 28])  # both end as 2 x 2
def test_c1_count(size):
    """25 x 3 x 64 + 64, 25 x 64 x 64 + 64, 2 x 64 each for their norms; then 2 x 2 x 64 to 384, 192, 10."""
    expected = 4_864 + 102_464 + 256 + fully_connected(256, 384, 192, 10, norm=True)
    assert expected == 283_274
    assert count(make("c1", image_size=size)) == expected


def test_vgg16_count():
    """With (inputs, outputs) of the 13 convolutions of configuration D: sum of 9 in out + out, batch norm 2 out.

    9 (3 64 + 64 64 + 64 128 + 128 128 + 128 256 + 2 256 256 + 256 512 + 5 512 512) = 14,710,464, biases 4,224; the
    fully connected 2 (512 512 + 512) + 5,130 = 530,442.
    """
    pairs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 2, (256, 512), *[(512, 512)] * 5]
    assert len(pairs) + 3 == 16
    plain = sum(9 * a * b + b for a, b in pairs) + fully_connected(512, 512, 512, 10)
    assert plain == 14_710_464 + 4_224 + 530_442 == 15_245_130
    model = make("vgg16")
    assert norm_count(model) == 2 * 4_224
    assert count(model) == plain + 8_448 == 15_253_578
    assert count(make("vgg16", image_size=64)) - count(model) == 3 * 512 * 512
    with pytest.raises(UsageError, match=r"data.image_size \(28\) cannot be halved five times by vgg16"):
        make("vgg16", image_size=28)


@pytest.mark.parametrize(
    ("name", "known"), [("resnet20", 269_722), ("resnet44", 658_586), ("resnet56", 853_018), ("resnet110", 1_727_962)]
)
def test_resnet_counts(name, known):
    """n blocks a stage: 2n convolutions of 9 c c, but 9 c c / 2 for the first of a stage that widens to c; norms 2 c.

    Stem 9 3 16 + 32; stages 2n (2304 + 32), 4608 + (2n - 1) 9216 + 2n 64, 18432 + (2n - 1) 36864 + 2n 128; head 650.
    """
    n = RESNETS[name]
    norms = 32 + 2 * n * (32 + 64 + 128)
    expected = 432 + 2 * n * 2304 + 4608 + (2 * n - 1) * 9216 + 18432 + (2 * n - 1) * 36864 + 650 + norms
    assert expected == known
    assert count(make(name)) == known
    assert norm_count(make(name)) == norms


def test_shortcut_takes_every_other_pixel_and_adds_channels_of_zeros():
    block = make("resnet20").get_submodule("stage2.0").eval()
    nn.init.zeros_(block.get_parameter("conv2.norm.weight"))  # nothing is added to the shortcut
    x = torch.randn(2, 16, 7, 7)
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, :16], x[:, :, [0, 2, 4, 6]][..., [0, 2, 4, 6]].relu())
    assert not out[:, 16:].any()


@pytest.mark.parametrize("name", ["vgg16", "resnet56"])
def test_convolutions_are_drawn_as_he_et_al_draw_them(name):
    for conv in [module for module in make(name).modules() if isinstance(module, nn.Conv2d)]:
        inputs = conv.weight[0].numel()
        assert abs(conv.weight.std() * (inputs / 2) ** 0.5 - 1) < 4 / (2 * conv.weight.numel()) ** 0.5
        assert abs(conv.weight.mean() * (inputs / 2) ** 0.5) < 4 / conv.weight.numel() ** 0.5


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
def test_linear_variant_has_the_same_weights_and_no_non_linearity(name):
    relu, linear = make(name), make(name, activation="linear")
    assert {key: value.shape for key, value in relu.state_dict().items()} == {
        key: value.shape for key, value in linear.state_dict().items()
    }
    assert not any(isinstance(module, nn.ReLU) for module in linear.modules())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(relu.eval()(x), linear.eval()(x))


def test_linear_mlp_is_a_linear_map():
    model = make("mlp", activation="linear").double().eval()
    x, y, zero = torch.randn(5, 3, 32, 32).double(), torch.randn(5, 3, 32, 32).double(), torch.zeros(5, 3, 32, 32)
    assert torch.allclose(model(x + y) + model(zero.double()), model(x) + model(y))


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name not in ("lenet5", "mlp")])
def test_a_model_without_a_linear_variant_says_so(name):
    with pytest.raises(UsageError, match=rf"model.activation \(linear\) has no effect on {name}: choose relu"):
        make(name, activation="linear")


def test_own_factory(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert models.build("mynet:make", DataSpec.images(7, 1))(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(UsageError, match=r"mynet:wrong\) returned a int"):
        models.build("mynet:wrong", DataSpec.images(7, 1))
    with pytest.raises(UsageError, match=r"mynet:mkae\) cannot be imported"):
        models.build("mynet:mkae", DataSpec.images(7, 1))
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(UsageError, match=r"broken:make\) cannot be imported \(broken.py:1, SyntaxError: invalid s"):
        models.build("broken:make", DataSpec.images(7, 1))


@pytest.mark.parametrize(("name", "near"), [("lenet", "lenet5"), ("resnet65", "resnet56"), ("vgg-16", "vgg16")])
def test_unknown_model_names_the_nearest(name, near):
    with pytest.raises(UsageError, match=rf"model.name \({name}\) is not a model \(did you mean {near}\?\)"):
        models.build(name, DataSpec.images(10, 1))
