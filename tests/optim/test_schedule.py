import math

import pytest
import torch

from gengap_dist.config import OptimConfig
from gengap_dist.optim.build import build
from gengap_dist.optim.schedule import lr_at, scaled_lr


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 16.0), ("sqrt", 4.0)])
def test_scaling_rules(rule, factor):
    assert scaled_lr(OptimConfig(lr=0.1, scaling=rule, base_size=64), 1024) == pytest.approx(0.1 * factor)


def test_warmup_then_cosine_to_zero():
    config = OptimConfig(lr=1.0, warmup_epochs=2.0, schedule="cosine")
    rates = [lr_at(step, config, global_size=8, steps_per_epoch=5, num_steps=30) for step in range(31)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10] == 1.0
    assert rates[20] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert rates[30] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_follow_their_textbook(name):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = build(OptimConfig(name=name, lr=0.1, momentum=0.5, weight_decay=0.01), torch.nn.ParameterList([p]))
    expected, velocity, m, v = p.detach().clone(), torch.zeros(2).double(), 0.0, 0.0
    for step in range(1, 4):
        g = expected * 3
        p.grad = p.detach() * 3
        optimizer.step()
        if name == "sgd":
            g = g + 0.01 * expected
            velocity = g if step == 1 else 0.5 * velocity + g
            expected = expected - 0.1 * velocity
        else:
            expected = expected * (1 - 0.1 * 0.01)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            expected = expected - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        assert torch.allclose(p.detach(), expected, rtol=1e-12, atol=0)


def test_lars_follows_its_paper():
    """Matrices: trust ratio 0.001 |w| / (|g| + decay |w|); vectors: plain momentum, undecayed (You et al. 2017)."""
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build(OptimConfig(name="lars", lr=0.1, momentum=0.5, weight_decay=0.01), layer)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    velocity_w, velocity_b = 0.0, 0.0
    for _ in range(3):
        layer.weight.grad, layer.bias.grad = layer.weight.detach() * 3, layer.bias.detach() * 3
        optimizer.step()
        ratio = 0.001 * weight.norm() / (3 * weight.norm() + 0.01 * weight.norm())
        velocity_w = 0.5 * velocity_w + ratio * (3 * weight + 0.01 * weight)
        velocity_b = 0.5 * velocity_b + 3 * bias
        weight, bias = weight - 0.1 * velocity_w, bias - 0.1 * velocity_b
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-7, atol=0)
    torch.testing.assert_close(layer.bias.detach(), bias)
