"""Which layers are found in networks as people write them, what they are called, and which of their dimensions counts.

Real ones from torchvision and, where they are installed, timm and transformers: small, with random weights.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.probes import measure
from gengap_dist.probes.layers import Pattern, select_layers
from gengap_dist.probes.trace import Layer, trace_calls

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, patterns: Pattern | list[Pattern] = "auto", example: torch.Tensor = IMAGE) -> list[Layer]:
    with torch.no_grad():
        return select_layers(model.eval(), example, patterns if isinstance(patterns, list) else [patterns])


def names(model: nn.Module, patterns: Pattern | list[Pattern] = "auto", example: torch.Tensor = IMAGE) -> list[str]:
    return [layer.name for layer in found(model, patterns, example)]


def facts(layers: list[Layer]) -> list[tuple]:
    return [(layer.name, tuple(layer.output), layer.channels_last, layer.kind) for layer in layers]


def lenet(image_size: int = 32) -> nn.Module:
    return models.build("lenet5", DataSpec.images(10, 3, image_size))


def test_lenet5():
    assert facts(found(lenet())) == [
        ("conv1", (2, 6, 28, 28), False, "non-linear"),  # before pooling
        ("conv2", (2, 16, 10, 10), False, "non-linear"),
        ("fc1", (2, 120), True, "non-linear"),
        ("fc2", (2, 84), True, "non-linear"),
    ]
    assert names(models.build("mlp", DataSpec.images(5, 3), widths=(8, 8))) == ["fc1", "fc2"]


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
def test_a_linear_network_is_measured_where_its_twin_is(name: str):
    relu, linear = (models.build(name, DataSpec.images(5, 3), activation=a) for a in ("relu", "linear"))
    assert [fact[:3] for fact in facts(found(linear))] == [fact[:3] for fact in facts(found(relu))]
    assert {layer.kind for layer in found(linear)} == {"linear"}


def test_an_identity_that_is_no_units_act_is_no_layer():
    assert names(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU())) == ["2"]


def test_a_residual_block_of_our_own_is_measured_after_its_addition():
    assert facts(found(models.build("resnet20", DataSpec.images(5, 3))))[:5:2] == [
        ("conv1", (2, 16, 32, 32), False, "non-linear"),
        ("stage1.0.act", (2, 16, 32, 32), False, "non-linear"),
        ("stage1.1.act", (2, 16, 32, 32), False, "non-linear"),
    ]


def test_resnet18_of_torchvision():
    layers = found(torchvision.models.resnet18())
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [layer.name for layer in layers] == ["relu"] + [
        f"{block}.relu{call}" for block in blocks for call in ("", "#2")
    ]
    assert {(layer.channels_last, layer.kind) for layer in layers} == {(False, "non-linear")}
    assert [layer.output[1] for layer in layers] == [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4


def test_the_second_relu_of_a_residual_block_is_after_the_addition():
    model = torchvision.models.resnet18().double().eval()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    (s,) = measure(model, [x], layers="layer2.0.relu#2", views=["flatten"], centred=[False])
    with torch.no_grad():
        before = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        true = np.linalg.svd(model.layer2[0](before).flatten(1).numpy(), compute_uv=False) / 5**0.5
    assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


def test_resnet18_of_timm():
    timm = pytest.importorskip("timm")
    layers = found(timm.create_model("resnet18", num_classes=3))
    assert len(layers) == 17
    assert [layer.name for layer in layers[:3]] == ["act1", "layer1.0.act1", "layer1.0.act2"]
    assert {(layer.channels_last, layer.kind) for layer in layers} == {(False, "non-linear")}


def tokens(block: str, gelu: str, width: int) -> list[tuple]:
    """Two blocks on a class token and 16 patches, each with its GELU before its residual stream."""
    return [
        fact
        for at in (0, 1)
        for fact in (
            (f"{block.format(at)}.{gelu}", (2, 17, width), True, "non-linear"),
            (block.format(at), (2, 17, 16), True, "residual"),
        )
    ]


def test_vision_transformer_of_torchvision():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=48, num_classes=3
    )
    assert facts(found(model)) == tokens("encoder.layers.encoder_layer_{}", "mlp.1", 48)


def test_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    assert facts(found(timm.create_model("vit_tiny_patch16_224", **small))) == tokens("blocks.{}", "mlp.act", 64)


def test_vision_transformer_of_transformers():
    """Without the blocks' names, which differ between versions."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.ViTModel(transformers.ViTConfig(**small, image_size=32, patch_size=8))
    *layers, pooler = facts(found(model))
    assert [layer[1:] for layer in layers] == [layer[1:] for layer in tokens("{}", "", 48)]
    assert pooler == ("pooler.activation", (2, 16), True, "non-linear")


CONVNEXT = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]


def test_convnext_is_channels_last_inside_its_blocks_only():
    """GELUs on [N, H, W, C], which is told by the linear map before; the stream itself is [N, C, H, W]."""
    assert facts(found(ConvNeXt(CONVNEXT, num_classes=3))) == [
        ("features.1.0.block.4", (2, 8, 8, 32), True, "non-linear"),
        ("features.1.0", (2, 8, 8, 8), False, "residual"),
        ("features.3.0.block.4", (2, 4, 4, 64), True, "non-linear"),
        ("features.3.0", (2, 16, 4, 4), False, "residual"),
    ]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_swin_is_channels_last_throughout(library):
    """Also where the stream is reshaped from tokens [N, H W, C] back to [N, H, W, C]."""
    if library == "timm":
        timm = pytest.importorskip("timm")
        small = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 3}
        model = timm.create_model("swin_tiny_patch4_window7_224", **small)
    else:
        model = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [7, 7], num_classes=3)
    layers = found(model, example=torch.randn(1, 3, 56, 56))
    assert [layer.kind for layer in layers] == ["non-linear", "residual"] * 2
    assert all(layer.channels_last for layer in layers)
    assert [tuple(layer.output) for layer in layers[1::2]] == [(2, 14, 14, 12), (2, 7, 7, 24)]


def test_a_reshape_keeps_what_is_known():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(2), nn.ReLU(), nn.Unflatten(2, (30, 30)), nn.ReLU())
    assert facts(found(model)) == [("2", (2, 6, 900), False, "non-linear"), ("4", (2, 6, 30, 30), False, "non-linear")]
    model = nn.Sequential(nn.Flatten(2), nn.Linear(1024, 5), nn.Unflatten(1, (1, 3)), nn.ReLU())
    assert facts(found(model)) == [("3", (2, 1, 3, 5), True, "non-linear")]


@pytest.mark.parametrize("layer", ["features.1.0.block.4", "features.1.0", "features.3.0"])
def test_views_of_both_layouts_equal_numpys_svd(layer):
    model = ConvNeXt(CONVNEXT, num_classes=3).double().eval()
    x = torch.randn(7, 3, 32, 32, dtype=torch.float64)
    out = {}
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: out.update(a=output))
    spectra = measure(model, x.split(3), layers=layer, views=["channel", "pool", "flatten"])
    with torch.no_grad():
        model(x)
    last = out["a"].numpy()
    if layer != "features.1.0.block.4":
        last = last.transpose(0, 2, 3, 1)  # rows are positions, columns are channels
    rows = {"channel": last.reshape(-1, last.shape[-1]), "pool": last.mean((1, 2)), "flatten": last.reshape(7, -1)}
    assert len(spectra) == 6
    for s in spectra:
        a = rows[s.view]
        true = np.linalg.svd(a - s.centred * a.mean(0), compute_uv=False)[: len(a) - s.centred] / len(a) ** 0.5
        assert (s.num_samples, s.num_units) == a.shape
        assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


class Swapped(nn.Module):
    """An encoder that wants [T, N, D], in a network of [N, T, D]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)


def encoder(activation: str, *, batch_first: bool) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 24, activation=activation, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder(activation):
    """Its non-linearity is a function; the dropout after it puts out the very same tensor. Its sums are normalised."""
    first, second = encoder(activation, batch_first=True), Swapped(encoder(activation, batch_first=False))
    x = torch.randn(11, 5, 8, dtype=torch.float64)
    assert facts(found(first, example=x[:1])) == [
        (f"layers.{at}.dropout", (2, 5, 24), True, "non-linear") for at in (0, 1)
    ]
    assert facts(found(second, example=x[:1])) == [
        (f"encoder.layers.{at}.dropout", (5, 2, 24), True, "non-linear") for at in (0, 1)
    ]
    views = ["token", "pool", "flatten"]
    mine = {s.key: s for s in measure(first, x.split(4), views=views)}
    others = {s.key.removeprefix("encoder."): s for s in measure(second, x.split(4), views=views)}
    assert len(mine) == 12
    assert {key for key in mine if "token" in key} == {*others}  # no row of [T, N, D] is one sample
    with torch.no_grad():
        inside = first.layers[0]
        a = inside.activation(inside.linear1(inside.norm1(x + inside._sa_block(x, None, None)))).numpy()
    for centred in (False, True):
        key = "layers.0.dropout/token" + "/centred" * centred
        rows = a.reshape(55, 24)
        true = np.linalg.svd(rows - centred * rows.mean(0), compute_uv=False) / 55**0.5
        for s in (mine[key], others[key]):
            assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.act(self.conv(x)) - 0.1)
        return self.head(torch.tanh(F.relu(x.mean((2, 3)))))


def test_functions_that_no_module_returns_are_layers_of_their_own():
    """Named after the module that calls them; a second call has a number."""
    assert facts(found(Functional())) == [
        ("act", (2, 4, 30, 30), False, "non-linear"),
        ("relu", (2, 4, 30, 30), False, "non-linear"),
        ("relu#2", (2, 4), True, "non-linear"),
        ("tanh", (2, 4), True, "non-linear"),
    ]
    assert names(Functional(), "relu") == ["relu", "relu#2"]
    assert names(Functional(), ["relu#2", "head"]) == ["relu#2", "head"]


def test_a_function_is_measured_in_the_pass():
    """A network whose activations are all functions, against its own computation in numpy."""
    model, x = Functional().double().eval(), torch.randn(9, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        first = F.relu(model.act(model.conv(x)) - 0.1)
        second = F.relu(first.mean((2, 3)))
    true = {"relu": first.permute(0, 2, 3, 1).reshape(-1, 4), "relu#2": second, "tanh": second.tanh()}
    spectra = measure(model, x.split(4), layers=["relu", "tanh"], views=["channel"], centred=[False])
    assert [s.layer for s in spectra] == [*true]
    for s in spectra:
        a = true[s.layer].numpy()
        assert np.abs(s.singular_values.numpy() - np.linalg.svd(a, compute_uv=False) / len(a) ** 0.5).max() < 1e-7


def test_a_function_of_the_whole_network_is_found():
    class Bare(nn.Sequential):
        def forward(self, x):
            return F.relu(super().forward(x)) * 2

    assert names(Bare(nn.Flatten(), nn.Linear(3 * 32**2, 4))) == ["relu"]


def test_no_non_linearity_is_refused():
    with pytest.raises(UsageError, match=r"probe.layers \(auto\) matches no layer of Sequential: choose among 0, 1"):
        names(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32**2, 4)))


def test_a_function_with_the_name_of_a_module():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(F.relu(self.relu(x)))

    assert names(Named(), example=torch.randn(2, 4)) == ["relu()"]
    assert names(Named(), "relu", example=torch.randn(2, 4)) == ["relu"]


class Swish(nn.Module):
    """By hand, as many people have it."""

    def forward(self, x):
        return x * torch.sigmoid(x)


class Gated(nn.Module):
    """Non-linear, with a module of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 6)

    def forward(self, x):
        return F.silu(self.gate(x))


def test_activations_written_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Swish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Gated(), nn.Linear(6, 2))
    assert facts(found(model)) == [("1", (2, 6, 30, 30), False, "non-linear"), ("4", (2, 6), True, "non-linear")]


def test_inplace_non_linearities():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.SiLU(inplace=True))
    assert names(model) == ["1", "3"]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ("fc1", ["fc1"]),
        ("fc*", ["fc1", "fc2", "fc3"]),
        ("*", ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        ("conv?.pool", ["conv1.pool", "conv2.pool"]),
        ("fc[12].affine", ["fc1.affine", "fc2.affine"]),
        (["fc2", "conv1"], ["conv1", "fc2"]),  # in the order in which they run
        (["fc1", "fc1", "fc*"], ["fc1", "fc2", "fc3"]),
        (["auto", "fc3"], ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        (nn.Conv2d, ["conv1.affine", "conv2.affine"]),
        (nn.ReLU, ["conv1", "conv2", "fc1", "fc2"]),
        ([nn.MaxPool2d, "fc3"], ["conv1.pool", "conv2.pool", "fc3"]),
        ("conv1.act", ["conv1"]),
        ("*.act", ["conv1", "conv2", "fc1", "fc2"]),
    ],
    ids=str,
)
def test_patterns(patterns, wanted):
    assert names(lenet(), patterns) == wanted


def test_a_unit_and_its_own_non_linearity_have_names_of_their_own():
    """A unit's name stands for its non-linearity, unless the unit itself was asked for as well: by its class."""
    assert names(lenet(), [nn.Sequential]) == ["conv1", "conv2", "fc1", "fc2"]
    layers = found(lenet(), ["conv1", "conv2", nn.Sequential])
    assert [(layer.name, layer.output[2:]) for layer in layers] == [
        ("conv1.act", (28, 28)),
        ("conv1", (14, 14)),
        ("conv2.act", (10, 10)),
        ("conv2", (5, 5)),
        ("fc1", ()),
        ("fc2", ()),
    ]


class Twice(nn.Module):
    """One unit that runs three times, one module under two names, one weight in two layers, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.unit = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.alias = self.unit[1]
        self.first, self.second, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.unit(self.unit(self.stem(x)))
        x = self.alias(x - 0.1).mean((2, 3))
        return self.second(self.first(x))


def test_a_module_that_runs_several_times():
    assert names(Twice()) == ["unit.1", "unit.1#2", "unit.1#3"]
    assert names(Twice(), "unit.1") == ["unit.1", "unit.1#2", "unit.1#3"]
    assert names(Twice(), "unit.1#2") == ["unit.1#2"]
    assert names(Twice(), "unit.*#2") == ["unit.0#2", "unit.1#2"]
    assert names(Twice(), "unit#*") == ["unit#2"]
    assert names(torchvision.models.resnet18(), "layer[34].*.relu#2") == [
        f"layer{stage}.{block}.relu#2" for stage in (3, 4) for block in (0, 1)
    ]


def test_calls_of_one_module_are_told_apart():
    model, x = Twice().double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    calls = []
    model.unit[1].register_forward_hook(lambda module, args, output: calls.append(output.flatten(1).numpy()))
    spectra = measure(model, x.split(3), layers="unit.1", views=["flatten"], centred=[False])
    calls.clear()
    with torch.no_grad():
        model(x)
    assert len(spectra) == len(calls) == 3
    for s, a in zip(spectra, calls, strict=True):
        true = np.linalg.svd(a, compute_uv=False) / 2
        assert np.abs(s.singular_values.numpy() - true).max() < 1e-7 * true[0]


def test_layers_with_one_weight_are_two_layers():
    assert names(Twice(), [nn.Linear]) == ["first", "second"]


def test_a_layer_that_never_runs():
    with pytest.raises(UsageError, match=r"probe.layers \(spare\) names a layer that does not run.*leave it out"):
        names(Twice(), "spare")
    with pytest.raises(UsageError, match=r"probe.layers \(unit.1#4\) matches no layer of Twice"):
        names(Twice(), "unit.1#4")
    assert names(Twice(), "s*") == ["stem", "second"]  # a glob takes what runs


def test_a_name_that_matches_nothing_lists_the_nearest():
    with pytest.raises(
        UsageError, match=r"\(fc4\) matches no layer of LeNet5 \(did you mean fc\d\?\).*conv1, conv1.aff"
    ):
        names(lenet(), "fc4")
    with pytest.raises(UsageError) as error:
        names(torchvision.models.resnet18(), "layer2.0.rellu")
    assert "matches no layer of ResNet (did you mean layer2.0.relu?)" in str(error.value)
    near = str(error.value).partition("choose among ")[2]
    assert near.startswith("layer2.0.relu, ")
    assert len(near.split(", ")) == 20
    assert near.endswith("and 47 more")
    with pytest.raises(UsageError, match=r"probe.layers \(GELU\) matches no layer of LeNet5"):
        names(lenet(), nn.GELU)


@pytest.mark.parametrize("make", [Twice, Functional, lenet, torchvision.models.resnet18])
def test_tracing_leaves_no_hooks(make: Callable[[], nn.Module]):
    model = make().eval()
    trace_calls(model, IMAGE)
    with pytest.raises(RuntimeError):
        trace_calls(model, IMAGE[:, :2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
