"""The decoder-only transformer: its size, what each position sees, what probes find."""

import math

import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.models.gpt import Attention
from gengap_dist.probes.layer_view import build_layer_views
from gengap_dist.probes.layers import last_hidden_layer, select_layers


def make(vocab_size=11, context=7, **sizes):
    torch.manual_seed(0)
    return models.build("gpt", DataSpec.tokens(vocab_size, context), **sizes).double()


@pytest.mark.parametrize(("vocab", "context", "depth", "width", "heads"), [(257, 128, 2, 64, 4), (11, 7, 3, 12, 2)])
def test_the_number_of_parameters(vocab, context, depth, width, heads):
    """Tied embedding, positions; in a block two norms, 3 D^2 + D^2 of attention, 8 D^2 of the two layers, biases."""
    block = 2 * 2 * width + (4 * width**2 + 4 * width) + (8 * width**2 + 5 * width)
    expected = (vocab + context) * width + depth * block + 2 * width
    model = make(vocab, context, depth=depth, width=width, heads=heads)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert len(model.state_dict()) == len([*model.parameters()])


def test_a_position_sees_itself_and_those_before():
    model, tokens = make(), torch.randint(11, (3, 7))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 7, 11)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(torch.cat([model(row[None]) for row in tokens]), before)


def test_attention_by_hand():
    """softmax(q k / sqrt(D / heads)) v over the positions so far, head by head."""
    torch.manual_seed(0)
    attention = Attention(6, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(6, -1)
    mixed = torch.zeros(5, 6, dtype=torch.float64)
    for head in (slice(0, 3), slice(3, 6)):
        for t in range(5):
            weights = (k[: t + 1, head] @ q[t, head] / math.sqrt(3)).softmax(0)
            mixed[t, head] = weights @ v[: t + 1, head]
    torch.testing.assert_close(attention(x[None])[0], attention.out(mixed), rtol=0, atol=1e-12)


def test_the_untrained_network_knows_nothing():
    model = models.build("gpt", DataSpec.tokens(257, 32), depth=4)
    tokens = torch.randint(257, (8, 32))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(math.log(257), abs=0.1)


def test_probes_find_attention_mlp_and_residual_stream():
    model, tokens = make(width=8, heads=2), torch.randint(11, (2, 7))
    layers = select_layers(model, tokens, ["auto"])
    names = [f"blocks.{block}{part}" for block in (0, 1) for part in (".attention", ".mlp", "")]
    assert [layer.name for layer in layers] == names
    assert [tuple(layer.output) for layer in layers[:3]] == [(2, 7, 8), (2, 7, 32), (2, 7, 8)]
    views = build_layer_views(layers, ["token"], 10)
    assert {(view.view, view.num_rows) for view in views} == {("token", 70)}
    assert last_hidden_layer(model, tokens, layers) == "blocks.1"


def test_another_kind_of_data_is_refused():
    with pytest.raises(UsageError, match=r"model.name \(lenet5\) .* choose gpt"):
        models.build("lenet5", DataSpec.tokens(11, 7))
    with pytest.raises(UsageError, match=r"model.name \(gpt\) .* set data.name=stdlib"):
        models.build("gpt", DataSpec.images(10, 1))
