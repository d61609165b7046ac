"""Networks of transformers: built without the network, logits alone, what probes find, saved as transformers saves."""

import math
import re
import socket
import sys
from typing import Any

import pytest
import torch

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.models.dropout import SampleDropout, replace_random_layers
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.probes.layer_view import build_layer_views
from gengap_dist.probes.layers import last_hidden_layer, select_layers
from gengap_dist.training.export import load_network
from tests.conftest import train
from tests.training.tasks.documents import write_documents

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS, IMAGES = DataSpec.tokens(257, 7, "byte"), DataSpec.images(10, 1, 16)
LAYERS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
VIT = LAYERS | {"patch_size": 8}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make(name: str, spec: DataSpec, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(f"transformers:{name}", spec, options=options)


def test_a_causal_language_model_has_the_size_of_the_data():
    """V D + T D + depth (12 D^2 + 13 D) + 2 D, as our gpt: the embedding also gives the logits."""
    model: Any = make("gpt2", TOKENS, **GPT2)
    assert sum(p.numel() for p in model.parameters()) == 257 * 16 + 7 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, None)
    tokens = TOKENS.random_inputs(3)
    logits = model(tokens)
    assert logits.shape == (3, 7, 257)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(257), abs=0.1)


@pytest.mark.parametrize(("name", "options"), [("vit", VIT), ("resnet", RESNET)])
def test_a_classifier_of_images_has_the_size_of_the_data(name, options):
    model = make(name, IMAGES, **options).train()
    model(torch.rand(4, 1, 16, 16)).sum().backward()
    assert model(torch.rand(4, 1, 16, 16)).shape == (4, 10)


@pytest.mark.parametrize(
    ("name", "options", "part", "names", "hidden"),
    [
        ("gpt2", GPT2, "transformer.h.", ("attn", "mlp.act"), 64),
        ("llama", LAYERS, "model.layers.", ("self_attn", "mlp.act_fn"), 40),
    ],
)
def test_probes_find_attention_mlp_and_residual_stream(name, options, part, names, hidden):
    """As in our gpt, with tokens as rows. Of attention the outputs, of which a network may return several."""
    model, tokens = make(name, TOKENS, **options).eval(), TOKENS.random_inputs(2)
    layers = select_layers(model, tokens, ["auto"])
    found = [(layer.name, tuple(layer.output), layer.kind) for layer in layers]
    assert found == [
        entry
        for block in (0, 1)
        for entry in (
            (f"{part}{block}.{names[0]}", (2, 7, 16), "linear"),
            (f"{part}{block}.{names[1]}", (2, 7, hidden), "non-linear"),
            (f"{part}{block}", (2, 7, 16), "residual"),
        )
    ]
    views = build_layer_views(layers, ["token"], 10)
    assert {(view.view, view.num_rows) for view in views} == {("token", 70)}
    assert last_hidden_layer(model, tokens, layers) == f"{part}1"


def test_dropout_is_drawn_by_sample():
    model = make("gpt2", TOKENS, **GPT2)
    replace_random_layers(model, SamplePosition())
    assert sum(isinstance(module, SampleDropout) for module in model.modules()) == 1 + 2 * 3


@pytest.mark.parametrize(
    ("name", "spec", "options", "says"),
    [
        ("gpt3", TOKENS, {}, "(transformers:gpt3) is no causal language model of transformers (did you mean gptj?)"),
        ("gpt2", IMAGES, {}, "(transformers:gpt2) is no classifier of images of transformers"),
        ("gpt2", DataSpec((3,), (2,)), {}, "reads tokens or images, and the samples are inputs of shape [3]"),
        (
            "gpt2",
            TOKENS,
            {"n_layr": 2},
            "model.options.n_layr (2) is no setting of transformers:gpt2 (did you mean",
        ),
        ("gpt2", TOKENS, {"vocab_size": 9}, "model.options.vocab_size (9) follows from the data, 257: remove it"),
        ("gpt2", TOKENS, {"max_position_embeddings": 9}, "follows from the data, 7: remove it"),
        ("gpt2", TOKENS, {"n_layer": "x"}, "cannot be built with model.options ({'n_layer': 'x'})"),
        ("gpt2", TOKENS, {"n_embd": 16, "n_head": 3}, "must be divisible by num_heads"),
        ("gpt2", TOKENS, {"attn_implementation": "a/b"}, "is no setting of transformers:gpt2"),  # code of the hub
        ("gpt2", TOKENS, {"auto_map": {"AutoModelForCausalLM": "a--b.C"}}, "is no setting of transformers:gpt2"),
        ("llama", TOKENS, {"hidden_size": 10**7}, "GiB of weights, and this machine has"),
    ],
)
def test_what_cannot_be_built_is_refused(name, spec, options, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        make(name, spec, **options)


def test_options_are_of_networks_that_have_them():
    with pytest.raises(UsageError, match=r"model.options \(n_layer\) has no effect on lenet5"):
        models.build("lenet5", IMAGES, options={"n_layer": 2})


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"needs the package transformers: pip install 'gengap_dist\[transformers\]'"):
        make("gpt2", TOKENS)


def test_a_run_is_probed_and_saved_as_transformers_saves(tmp_path):
    text = write_documents(tmp_path / "text", 5_000)
    settings = {"data__name": "text", "data__root": text, "data__context": 8, "train__steps": 3}
    settings |= {"model__name": "transformers:gpt2", "probe__num_samples": (32,), "probe__diagnostics": ()}
    with pytest.warns(UserWarning, match=r"transformer.h.0.attn.* draw random numbers by micro-batch"):
        result = train(tmp_path / "run", **settings, model__options=GPT2)
    assert result["num_steps"] == 3
    network: Any = load_network(tmp_path / "run")
    network.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    tokens = TOKENS.random_inputs(2)
    assert torch.equal(loaded(tokens).logits, network(tokens))
    with pytest.raises(UsageError, match=r"sees the tokens after a position, which it is to predict"):
        train(tmp_path / "seeing", **settings | {"model__name": "transformers:bert"}, model__options=LAYERS)
