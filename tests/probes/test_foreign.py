"""Networks that this package does not know: what is measured is true, and what is not measured is said.

Each network is measured in two unequal batches. Every spectrum is compared with numpy's, in float64, of the activation
that a plain forward hook sees when all samples are passed at once; of a function, of any tensor that torch's dispatcher
sees. Every activation module of torch that ran is measured, or a warning names it.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.convnext import CNBlockConfig

from gengap_dist.errors import UsageError
from gengap_dist.probes import LayerSpectrum, measure
from tests.conftest import thinned

NUM = 5
BATCHES = (2, 3)
VIEWS = ("channel", "token", "pool")
ACTIVATIONS = tuple(
    getattr(activation, name)
    for name in activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "GLU")
)
Setting = tuple[nn.Module, Tensor]


def images(size: int = 32) -> Tensor:
    return torch.randn(NUM, 3, size, size, generator=torch.Generator().manual_seed(0))


def token_numbers(length: int = 7, vocabulary: int = 50) -> Tensor:
    return torch.randint(1, vocabulary, (NUM, length), generator=torch.Generator().manual_seed(0))


def of_torchvision(name: str, size: int = 32, **settings: Any) -> Callable[[], Setting]:
    return lambda: (torchvision.models.get_model(name, weights=None, num_classes=5, **settings), images(size))


def of_timm(name: str, size: int = 32, **settings: Any) -> Callable[[], Setting]:
    def make() -> Setting:
        timm = pytest.importorskip("timm", reason="timm is not installed")
        return timm.create_model(name, num_classes=5, **settings), images(size)

    return make


WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = WIDTH | {"intermediate_size": 32}


def of_transformers(name: str, *, sees: bool = False, **settings: Any) -> Callable[[], Setting]:
    def make() -> Setting:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config_class = getattr(transformers, f"{name}Config")
        inputs = images() if sees else token_numbers()
        kept = {} if sees else {"vocab_size": 50}
        return getattr(transformers, f"{name}Model")(config_class(**kept, **settings)), inputs

    return make


def by_hand(make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> Callable[[], Setting]:
    return lambda: (make(), inputs())


def rows(width: int = 6) -> Callable[[], Tensor]:
    return lambda: torch.randn(NUM, width, generator=torch.Generator().manual_seed(0))


def sequences() -> Tensor:
    return torch.randn(NUM, 7, 6, generator=torch.Generator().manual_seed(0))


class FunctionalCNN(nn.Module):
    """As in many tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 20), nn.Linear(20, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return F.log_softmax(self.fc3(F.relu(self.fc2(F.relu(self.fc1(x))))), 1)


class FunctionalBlock(nn.Module):
    """A residual block as in many CIFAR repositories: every non-linearity is a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x
        return F.relu(out)


class FunctionalResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(*[FunctionalBlock(8) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreActivation(FunctionalBlock):
    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        x = F.silu(self.conv(x))
        x = x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(x.mean((2, 3)))


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12)]), nn.Linear(12, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.head(x)


class Gated(nn.Module):
    """A gated unit, as in large language models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(6, 24), nn.Linear(12, 5)

    def forward(self, x):
        a, b = self.linear(x).chunk(2, -1)
        return self.head(a * torch.sigmoid(b))


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.more = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(self.more(hidden) if len(x) > 2 else hidden)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 5)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])

    def forward(self, x):
        x = self.stem(x)
        out, chosen = torch.zeros_like(x), x[:, :3].argmax(1)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return self.head(out)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.head, self.first = kind(6, 8, batch_first=batch_first), nn.Linear(8, 5), batch_first

    def forward(self, x):
        steps, _ = self.rnn(x if self.first else x.transpose(0, 1))
        return self.head(steps.mean(1 if self.first else 0))


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        lengths = 4 + 2 * (x[:, 0, 0] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0])


class Unrolled(nn.Module):
    """A cell that is called once for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.mix, self.act, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)

    def forward(self, x):
        h = torch.zeros(len(x), 8, dtype=x.dtype)
        for token in x.unbind(1):
            h = self.act(self.cell(token) + self.mix(h))
        return self.head(h)


class Shared(nn.Module):
    """One block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.block(self.block(self.block(x))))


class Points(nn.Module):
    """Of sets of points, with their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.head = (
            nn.Conv1d(6, 8, 1),
            nn.BatchNorm1d(8),
            nn.Conv1d(8, 12, 1),
            nn.Linear(12, 5),
        )

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x.transpose(1, 2))))
        return self.head(torch.max(F.relu(self.conv2(x)), 2)[0])


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) * self.b(x)))


class NoStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.InstanceNorm1d(8), nn.Hardswish(), nn.Linear(8, 5))

    def forward(self, x):
        return self.net(x)


class Transposed(nn.Module):
    """Tokens first, as torch's default has them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


class Plain(nn.Module):
    """Nothing in it is non-linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.b(self.a(x))


VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
NETWORKS: dict[str, Callable[[], Setting]] = {
    # written by hand
    "functional CNN": by_hand(FunctionalCNN, images),
    "functional ResNet": by_hand(FunctionalResNet, images),
    "pre-activation": by_hand(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(8)), images),
    "squeeze and excite": by_hand(SqueezeExcite, images),
    "SIREN": by_hand(Siren, rows()),
    "gated": by_hand(lambda: nn.Sequential(Gated(), Gated(), nn.Linear(6, 5)), sequences),
    "chunked GLU": by_hand(Chunked, sequences),
    "early exit": by_hand(EarlyExit, rows()),
    "experts": by_hand(Experts, rows()),
    "LSTM": by_hand(lambda: Recurrent(nn.LSTM), sequences),
    "GRU, tokens first": by_hand(lambda: Recurrent(nn.GRU, batch_first=False), sequences),
    "packed GRU": by_hand(Packed, sequences),
    "unrolled": by_hand(Unrolled, sequences),
    "shared block": by_hand(Shared, rows()),
    "points": by_hand(Points, sequences),
    "bilinear": by_hand(Bilinear, rows()),
    "instance norm": by_hand(NoStatistics, lambda: torch.randn(NUM, 8, 6)),
    "tokens first": by_hand(Transposed, sequences),
    "plain": by_hand(Plain, rows()),
    "3-d convolutions": by_hand(
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.ELU(), nn.MaxPool3d(2), nn.Flatten(), nn.LazyLinear(5)),
        lambda: torch.randn(NUM, 1, 8, 8, 8),
    ),
    "1-d convolutions": by_hand(
        lambda: nn.Sequential(nn.Conv1d(7, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(16, 5)), sequences
    ),
    # torchvision
    "alexnet": of_torchvision("alexnet", 64),
    "vgg11_bn": of_torchvision("vgg11_bn"),
    "resnet18": of_torchvision("resnet18"),
    "resnext50": of_torchvision("resnext50_32x4d"),
    "densenet121": of_torchvision("densenet121"),
    "googlenet": of_torchvision("googlenet", 64, init_weights=False),
    "inception_v3": of_torchvision("inception_v3", 80, init_weights=False),
    "mobilenet_v2": of_torchvision("mobilenet_v2"),
    "mobilenet_v3_small": of_torchvision("mobilenet_v3_small"),
    "shufflenet": of_torchvision("shufflenet_v2_x0_5"),
    "squeezenet": of_torchvision("squeezenet1_1"),
    "mnasnet": of_torchvision("mnasnet0_5"),
    "efficientnet_b0": of_torchvision("efficientnet_b0"),
    "regnet_y": of_torchvision("regnet_y_400mf"),
    "vision transformer": lambda: (torchvision.models.VisionTransformer(**VIT, num_classes=5), images()),
    "convnext": lambda: (
        torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5), images()
    ),
    "swin": lambda: (
        torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [7, 7], num_classes=5), images(56)
    ),
    "swin_v2_t": of_torchvision("swin_v2_t", 64),
    # timm
    **{
        name: of_timm(name, size)
        for name, size in {
            "test_byobnet": 32, "test_convnext": 32, "test_convnext2": 32, "test_convnext3": 32,
            "test_efficientnet": 32, "test_efficientnet_evos": 32, "test_efficientnet_gn": 32,
            "test_efficientnet_ln": 32, "test_mambaout": 32, "test_nfnet": 64, "test_resnet": 32,
            "ghostnet_050": 32, "lcnet_035": 32, "mobilenetv4_conv_small_035": 32, "repvgg_a0": 32, "seresnet18": 32,
            "skresnet18": 32, "selecsls42": 64, "hardcorenas_a": 32, "tinynet_e": 32, "dla46_c": 32,
            "repghostnet_050": 32, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "ese_vovnet19b_slim": 32,
            "resnet10t": 32, "fbnetc_100": 32, "starnet_s1": 64,
        }.items()
    },
    **{
        name: of_timm(name, 32, img_size=32)
        for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos")
    },
    "mixer": of_timm("mixer_s32_224", 64, img_size=64),
    "resmlp": of_timm("resmlp_12_224", 32, img_size=32),
    "gmlp": of_timm("gmlp_ti16_224", 32, img_size=32),
    "poolformer": of_timm("poolformerv2_s12", 64),
    # transformers
    "BERT": of_transformers("Bert", **SMALL),
    "RoBERTa": of_transformers("Roberta", **SMALL),
    "DistilBERT": of_transformers("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "ALBERT": of_transformers("Albert", embedding_size=8, **SMALL),
    "ELECTRA": of_transformers("Electra", embedding_size=16, **SMALL),
    "GPT-2": of_transformers("GPT2", n_embd=16, n_layer=2, n_head=2),
    "GPT-NeoX": of_transformers("GPTNeoX", **SMALL),
    "OPT": of_transformers("OPT", **WIDTH, ffn_dim=32, word_embed_proj_dim=16),
    "LLaMA": of_transformers("Llama", **SMALL, num_key_value_heads=1),
    "Mistral": of_transformers("Mistral", **SMALL, num_key_value_heads=1),
    "Qwen2": of_transformers("Qwen2", **SMALL, num_key_value_heads=1),
    "Gemma": of_transformers("Gemma", **SMALL, num_key_value_heads=1, head_dim=8),
    "Mixtral": of_transformers("Mixtral", **SMALL, num_key_value_heads=1, num_local_experts=3),
    "ViT": of_transformers("ViT", sees=True, image_size=32, patch_size=8, **SMALL),
    "DINOv2": of_transformers("Dinov2", sees=True, image_size=32, patch_size=8, mlp_ratio=2, **WIDTH),
}  # fmt: skip
ALWAYS = {
    "functional CNN", "functional ResNet", "squeeze and excite", "gated", "early exit", "experts", "LSTM", "unrolled",
    "tokens first", "resnet18", "swin_v2_t", "test_vit", "LLaMA", "Mixtral",
}  # fmt: skip


class Seen(TorchDispatchMode):
    """Copies of all results with one of some numbers of values."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.tensors = sizes, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() in self.sizes:
            self.tensors.append(out.detach().clone())
        return out


def matrices(tensor: Tensor, s: LayerSpectrum) -> list[np.ndarray]:
    """`tensor` as a matrix with the view of `s`, units in any dimension that has as many."""
    out = []
    for dim in {1, tensor.ndim - 1}:
        if tensor.shape[dim] != s.num_units:
            continue
        last = tensor.movedim(dim, -1)
        matrix = last.flatten(1, -2).mean(1) if s.view == "pool" else last.reshape(-1, s.num_units)
        if len(matrix) == s.num_samples:
            out.append(matrix.numpy())
    return out


def agrees(s: LayerSpectrum, tensor: Tensor) -> bool:
    """To 1e-6 of the largest singular value; in float32, where other batches round otherwise, to 1e-4."""
    tolerance = 1e-6 if tensor.dtype == torch.float64 else 1e-4
    for matrix in matrices(tensor, s):
        a = matrix.astype(np.float64)
        true = np.linalg.svd(a, compute_uv=False) / len(a) ** 0.5
        found = s.singular_values.numpy()
        if len(true) == len(found) and np.abs(found - true).max() <= tolerance * true[0]:
            return True
    return False


def outputs_of_modules(model: nn.Module, x: Tensor, sizes: set[int]) -> tuple[dict, list[Tensor], set[str]]:
    """By module and call: its output for all samples; results of functions; the activation modules that ran."""
    seen: dict[tuple[str, int], Tensor] = {}
    counts: Counter[str] = Counter()
    ran: set[str] = set()

    def hook(name: str, module: nn.Module) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            counts[name] += 1
            if isinstance(module, ACTIVATIONS):
                ran.add(name)
            if isinstance(module, nn.RNNBase):
                output = (
                    output[0] if module.batch_first or not isinstance(output[0], Tensor) else output[0].transpose(0, 1)
                )
            if isinstance(output, Tensor):
                seen[name, counts[name]] = output.detach().clone()

        return record

    for name, module in model.named_modules():
        module.register_forward_hook(hook(name, module))
    with torch.no_grad(), Seen(sizes) as dispatched:
        model.eval()(x)
    return seen, dispatched.tensors, ran


def in_float64(model: nn.Module, x: Tensor) -> Setting:
    """In float64, if the network has kernels for it."""
    doubled = copy.deepcopy(model).double().eval()
    inputs = x.double() if x.is_floating_point() else x
    try:
        with torch.no_grad():
            doubled(inputs)
    except RuntimeError:  # grouped matrix products of experts
        return model.eval(), x
    return doubled, inputs


@pytest.mark.parametrize("name", thinned(NETWORKS, lambda name: name in ALWAYS))
def test_what_is_measured_is_true_and_what_is_not_is_said(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model.eval()(x)  # lazy parameters
    model, x = in_float64(model, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name == "plain":
            with pytest.raises(UsageError, match="matches no layer"):
                measure(model, [x])
            return
        spectra = measure(model, list(x.split(BATCHES)), views=VIEWS, centred=[False])
    said = " ".join(str(warning.message) for warning in caught)
    layers = {s.layer for s in spectra}
    assert layers, said
    modules = dict(model.named_modules())
    of_units = {f"{base}.act": base for base, module in modules.items() if type(module) is nn.Sequential}
    names = {of_units[name]: name for name in modules if name in of_units}  # see `reported_names`
    names = {name: name for name in modules} | names
    functions = [s for s in spectra if s.layer.partition("#")[0] not in names and s.view != "pool"]
    seen, dispatched, ran = outputs_of_modules(model, x, {s.num_samples * s.num_units for s in functions})
    for s in spectra:
        base, _, number = s.layer.partition("#")
        if base in names:
            assert agrees(s, seen[names[base], int(number or 1)]), s.key
        elif s.view != "pool":
            assert any(agrees(s, tensor) for tensor in dispatched), s.key
    measured = {names.get(base, base) for base in (layer.partition("#")[0] for layer in layers)}
    missing = {name for name in ran - measured if name not in said}
    num_said = int(said.split(" layer(s)")[0]) if ", ..." in said else 0  # a long list of names is cut
    assert not missing or num_said == len(ran - measured), (missing, said)
