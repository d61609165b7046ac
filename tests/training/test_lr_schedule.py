"""Rates, momentum and lengths against closed forms written out here."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.config.sections import OptimConfig
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.errors import UsageError
from gengap_dist.training.lr_schedule import Schedule, decay_steps, lr_at, momentum_at, scaled_lr, warmup_steps
from gengap_dist.training.optimizer import build_optimizer
from tests.conftest import config

RUN = {"global_size": 8, "steps_per_epoch": 5, "num_steps": 30}


def rates(num: int = 30, **settings) -> list[float]:
    return [lr_at(step, OptimConfig(lr=1.0, **settings), **RUN) for step in range(num)]


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 16.0), ("sqrt", 4.0), ("legw", 4.0)])
def test_scaling_rules(rule, factor):
    assert scaled_lr(OptimConfig(lr=0.1, scaling=rule, base_size=64), 1024) == pytest.approx(0.1 * factor)


@pytest.mark.parametrize(("rule", "steps"), [("linear", 7), ("legw", 28)])
def test_legw_alone_lengthens_the_warmup(rule, steps):
    settings = OptimConfig(lr=1.0, scaling=rule, base_size=64, warmup_epochs=0.7)
    sizes = {"global_size": 256, "steps_per_epoch": 10}
    full = scaled_lr(settings, 256)
    assert warmup_steps(settings, **sizes) == steps
    found = [lr_at(step, settings, **sizes, num_steps=50) for step in range(50)]
    assert found == pytest.approx([full * min(1.0, (step + 1) / steps) for step in range(50)])


def test_warmup_then_cosine_to_zero():
    found = rates(31, warmup_epochs=2.0, schedule="cosine")
    assert found[:10] == [(step + 1) / 10 for step in range(10)]
    assert found[10:] == pytest.approx([math.cos(math.pi * (step - 10) / 40) ** 2 for step in range(10, 31)])


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial(power):
    found = rates(31, warmup_epochs=2.0, schedule="polynomial", power=power)
    assert found[10:] == pytest.approx([((30 - step) / 20) ** power for step in range(10, 31)])


@pytest.mark.parametrize(("fraction", "decay"), [(0.2, 6), (0.01, 1), (0.5, 15)])
def test_warmup_stable_decay(fraction, decay):
    """A trapezoid: the last step of the run is one step above 0."""
    found = rates(31, warmup_epochs=2.0, schedule="wsd", decay_fraction=fraction)
    expected = [min((step + 1) / 10, 1.0, (30 - step) / decay) for step in range(31)]
    assert found == pytest.approx(expected, abs=1e-15)


def test_step_decays_at_its_milestones():
    found = rates(warmup_epochs=1.0, schedule="step", milestones=(0.5, 0.71, 0.9), gamma=0.2)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 11 + [0.2] * 6 + [0.04] * 6 + [0.008] * 3)


def test_rates_that_stay():
    assert rates(schedule="constant", gamma=0.5) == [1.0] * 30


@given(
    schedule=st.sampled_from(["constant", "step", "cosine", "polynomial", "wsd"]),
    scaling=st.sampled_from(["none", "linear", "sqrt", "legw"]),
    epochs=st.integers(2, 40),
    steps_per_epoch=st.integers(1, 50),
    warmup=st.floats(0, 1),
    factor=st.sampled_from([0.25, 1, 2, 16]),
    power=st.floats(0.2, 4),
)
def test_every_schedule_rises_to_the_full_rate_and_never_again(
    schedule, scaling, epochs, steps_per_epoch, warmup, factor, power
):
    settings = OptimConfig(
        lr=0.3, schedule=schedule, scaling=scaling, base_size=64, warmup_epochs=warmup, gamma=0.5, power=power
    )
    sizes = {"global_size": int(64 * factor), "steps_per_epoch": steps_per_epoch}
    rise, num_steps = warmup_steps(settings, **sizes), epochs * steps_per_epoch * max(1, int(factor))
    found = [lr_at(step, settings, **sizes, num_steps=num_steps) for step in range(num_steps + 1)]
    full = scaled_lr(settings, sizes["global_size"])
    milestones = [
        num_steps - decay_steps(settings, num_steps) * (schedule == "wsd"),
        *(round(m * num_steps) for m in settings.milestones if schedule == "step"),
    ]
    top = max(0, rise - 1)  # the last step of warm-up has the full rate, and so has the next: no jump
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top] == pytest.approx(full)
    assert found[rise:] == sorted(found[rise:], reverse=True)
    if rise < min(milestones):
        assert found[rise] == pytest.approx(full)
    assert all(0 < rate <= full * (1 + 1e-12) for rate in found[:-1])
    ends = {"wsd": 0.0, "cosine": 0.0, "polynomial": 0.0, "step": full / 4}
    assert found[-1] == pytest.approx(ends.get(schedule, full), abs=1e-12)


@pytest.mark.parametrize("name", ["sgd", "lars"])
@pytest.mark.parametrize("corrected", [True, False])
def test_momentum_correction(name, corrected):
    """Without it, v = m v + lr g and w -= v; with it, u = m u + g and w -= lr u (Goyal et al. 2017, remark 2)."""
    if name == "lars":
        pytest.importorskip("timm", reason="timm is not installed")
    settings = OptimConfig(
        name=name, lr=0.05, momentum=0.9, momentum_correction=corrected, warmup_epochs=0.6, schedule="step",
        milestones=(0.4, 0.7), gamma=0.3,
    )  # fmt: skip
    run = {"global_size": 8, "steps_per_epoch": 10, "num_steps": 20}
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    curvature = torch.rand(3, 4, dtype=torch.float64)
    optimizer, w, memory = build_optimizer(settings, layer), layer.weight.detach().clone(), torch.zeros(3, 4).double()
    used = []
    for step in range(20):
        lr = lr_at(step, settings, **run)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum_at(step, settings, lambda at: lr_at(at, settings, **run))
        used.append(optimizer.param_groups[0]["momentum"])
        layer.weight.grad = curvature * layer.weight.detach()
        optimizer.step()
        g = curvature * w
        if name == "lars":
            g = g * (0.001 * w.norm() / (g.norm() + 1e-8))
        memory = 0.9 * memory + (g if corrected else lr * g)
        w = w - (lr * memory if corrected else memory)
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=0)
    assert [min(used), max(used)] == pytest.approx([0.9, 0.9] if corrected else [0.45, 3.0])


def test_momentum_where_the_rate_is_nothing():
    """The last step of a cosine is never made; were it, nothing would move."""
    settings = OptimConfig(momentum=0.8, schedule="cosine", momentum_correction=False)
    assert momentum_at(30, settings, lambda step: lr_at(step, settings, **RUN)) > 0
    settings = OptimConfig(momentum=0.8, schedule="polynomial", power=400, momentum_correction=False)
    assert lr_at(29, settings, **RUN) == 0.0
    assert [momentum_at(step, settings, lambda at: lr_at(at, settings, **RUN)) for step in (0, 29)] == [0.8, 0.8]


def schedule(num_samples: int = 1000, **settings) -> Schedule:
    given = config(**settings)
    return Schedule.of(given, EpochSampler.of(given, num_samples))


def ramp(*changes: tuple[float, int]) -> tuple[dict[str, float], ...]:
    return tuple({"at": at, "size": size} for at, size in changes)


def test_lengths():
    sizes = {"batch__global_size": 100, "optim__base_size": 30}
    assert schedule(**sizes, train__epochs=3).num_steps == 30
    assert schedule(**sizes, train__steps=7).num_steps == 7
    assert schedule(**sizes, train__epochs=3, train__length_unit="updates").num_steps == 3 * 34


RAMP = {"batch__global_size": 100, "batch__schedule_unit": "epochs", "train__epochs": 6}


@pytest.mark.parametrize("power", [0, 0.5, 0.6, 1])
def test_the_rate_of_a_batch_that_grows(power):
    """Changes at epoch 3 and within epoch 4: 30 steps of 100, 8 of 200, then 400, times a trapezoid of the steps."""
    grown = schedule(
        **RAMP, batch__schedule=ramp((0, 100), (3, 200), (4.5, 400)), batch__schedule_lr_power=power,
        optim__schedule="wsd", optim__decay_fraction=0.5, optim__lr=0.1, optim__momentum_correction=False,
    )  # fmt: skip
    assert grown.num_steps == 30 + 5 + 3 + 1 + 3
    sizes = [100] * 30 + [200] * 8 + [400] * 4
    want = [0.1 * (size / 100) ** power * min(1, (42 - step) / 21) for step, size in enumerate(sizes)]
    assert [grown.lr(step) for step in range(42)] == pytest.approx(want)
    assert grown.momentum(30) == pytest.approx(0.9 * want[29] / want[30])


def test_a_batch_that_never_grows():
    with pytest.raises(
        UsageError, match=r"batch.schedule never starts with 200: that would be before step 71 of a run"
    ):
        schedule(**RAMP, batch__schedule=ramp((0, 100), (7, 200)))
    with pytest.raises(UsageError, match=r"are 40 steps, and the part before the batch of batch.schedule grows has 30"):
        schedule(**RAMP, batch__schedule=ramp((0, 100), (3, 200)), optim__warmup_epochs=4)


def test_lengths_and_changes_in_tokens():
    """A sequence of 8 tokens, 1,000 of them: 16,000 tokens are 10 steps of 100 and 5 of 200."""
    words = {"data__name": "stdlib", "data__context": 8, "batch__global_size": 100, "batch__schedule_unit": "tokens"}
    grown = schedule(**words, batch__schedule=ramp((0, 100), (7_201, 200)), train__tokens=16_000, optim__lr=0.1,
                     batch__schedule_lr_power=0.5, optim__warmup_epochs=0.2)  # fmt: skip
    assert grown.num_steps == 10 + 5
    assert [round(grown.lr(step), 4) for step in (0, 1, 9, 10, 14)] == [0.05, 0.1, 0.1, 0.1414, 0.1414]
    assert schedule(**words, train__tokens=16_001).num_steps == 21
    with pytest.raises(UsageError, match=r"batch.schedule never starts with 200: that would be before step 21 of a ru"):
        schedule(**words, batch__schedule=ramp((0, 100), (16_000, 200)), train__tokens=16_000)
    with pytest.raises(UsageError, match=r"batch.schedule \(400 at 7210 tokens\) begins with the same step as 200"):
        schedule(**words, batch__schedule=ramp((0, 100), (7_201, 200), (7_210, 400)), train__tokens=90_000)


def test_regime_adaptation_is_the_small_batch_step_for_step():
    """Same number of updates, same warm-up, same milestones as a run at base_size, only the batch differs."""
    rule = {
        "optim__base_size": 25, "optim__schedule": "step", "optim__warmup_epochs": 1.5, "train__epochs": 4,
        "train__length_unit": "updates", "optim__momentum_correction": False,
    }  # fmt: skip
    small, large = schedule(**rule, batch__global_size=25), schedule(**rule, batch__global_size=500)
    assert small.num_steps == large.num_steps == 160
    for step in range(160):
        assert small.lr(step) == large.lr(step)
        assert small.momentum(step) == large.momentum(step)
    assert small.lr(58) < small.lr(59) == 0.02


@pytest.mark.parametrize("length_unit", ["epochs", "updates"])
def test_legw_warms_up_for_the_small_batch_updates_whatever_the_length_unit(length_unit):
    """Half an epoch of 40 steps at the base batch of 25 is 20 updates, at 100, too."""
    found = schedule(
        optim__lr=1.0, optim__scaling="legw", optim__base_size=25, optim__warmup_epochs=0.5,
        batch__global_size=100, train__epochs=6, train__length_unit=length_unit,
    )  # fmt: skip
    assert found.num_steps == {"epochs": 60, "updates": 240}[length_unit]
    assert [found.lr(step) for step in (18, 19, 20)] == pytest.approx([1.9, 2.0, 2.0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"warmup_epochs": 5.0}, r"optim.warmup_epochs \(5\) are 50 steps, and the run has 50: choose a smaller value"),
        (
            {"warmup_epochs": 1.5, "scaling": "legw", "base_size": 25},
            r"optim.warmup_epochs \(1.5\), 4 times as many under optim.scaling=legw, are 60 steps, and the run has 50",
        ),
        (
            {"warmup_epochs": 3.0, "schedule": "step"},
            r"\(3\) are 30 steps, and the part before the first of optim.milestones has 25",
        ),
        ({"warmup_epochs": 4.0, "schedule": "wsd"}, "40 steps, and .* before the decay of optim.decay_fraction has 40"),
    ],
)
def test_a_warmup_longer_than_the_run_is_refused(settings, says):
    given = {f"optim__{key}": value for key, value in settings.items()}
    with pytest.raises(UsageError, match=says):
        schedule(**given, batch__global_size=100, train__epochs=5)
    schedule(**given | {"optim__warmup_epochs": 0.4}, batch__global_size=100, train__epochs=5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"nesterov": True, "momentum_correction": False}, "optim.nesterov .true. cannot be combined"),
        ({"name": "lamb", "momentum_correction": False}, "is for sgd and lars, not for lamb"),
        ({"name": "lambs"}, r"optim.name \(lambs\) is not an optimizer \(did you mean lamb\?\): choose one of sgd"),
        ({"name": "adam"}, r"did you mean adamw\?"),
        ({"betas": (0.9, 1.0)}, r"optim.betas \(1.0\) is not valid: input should be less than 1"),
        ({"betas": 0.9}, r"optim.betas \(0.9\) is not valid"),
        ({"eps": 0.0}, r"optim.eps \(0.0\) is not valid: input should be greater than 0"),
        ({"scaling": "adam_sqrt", "base_size": 64}, r"optim.scaling \(adam_sqrt\) is for adamw, not for sgd"),
        (
            {"name": "adamw", "scaling": "adam_sqrt", "base_size": 4},
            r"turns 0.9 of optim.betas into 1 - k \(1 - 0.9\) = -0.6 at k = 16, and it must be above 0: choose",
        ),
        (
            {"name": "adamw", "scaling": "adam_sqrt", "base_size": 64, "beta2_scaling": "half_life"},
            "both change the second of optim.betas: set optim.beta2_scaling=none",
        ),
        ({"name": "adamw", "beta2_scaling": "half_life"}, "optim.beta2_scaling .half_life. needs the global batch"),
        ({"weight_decay_scaling": "linear", "base_size": 8}, "is for adamw, lamb and muon, not for sgd"),
        ({"scaling": "legw"}, "optim.scaling .legw. needs the global batch"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(UsageError, match=says):
        config(**{f"optim__{key}": value for key, value in settings.items()})
