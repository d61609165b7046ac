"""The names in config/measures.py are those of the functions that packages have for them."""

from typing import get_args

import pytest
import torch

from gengap_dist.config import measures
from gengap_dist.config.sections import AlgorithmConfig, LaunchConfig, OptimConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import replace_batch_norm
from gengap_dist.models.sample_position import SamplePosition
from gengap_dist.parallel.capabilities import CAPABILITIES, Algorithm
from gengap_dist.parallel.strategies import STRATEGIES
from gengap_dist.probes.noise_scale import NoiseScale
from gengap_dist.probes.spectra.accumulate import METHODS
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
from gengap_dist.training.algorithms import rank_penalty
from gengap_dist.training.observer import DIAGNOSTICS, NUM_EIGENVALUES
from gengap_dist.training.optimizer import build_optimizer


def test_every_name_has_its_function():
    assert [*STRATEGIES] == [*get_args(measures.Strategy)]
    assert [*CAPABILITIES] == [*STRATEGIES]
    assert {*get_args(Algorithm)} <= AlgorithmConfig.model_fields.keys()
    assert {*METHODS} == {*get_args(measures.Method)}
    assert [*DIAGNOSTICS] == [*measures.PROBE_DIAGNOSTICS]
    assert {*rank_penalty.MEASURES} == {*get_args(measures.RankMeasure)}
    strategy = LaunchConfig.model_fields["strategy"].annotation
    assert get_args(strategy) == ("auto", *STRATEGIES)


@pytest.mark.parametrize("name", get_args(measures.Optimizer))
def test_every_optimizer_is_built(name):
    pytest.importorskip("timm")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert build_optimizer(OptimConfig(name=name), model).param_groups


@pytest.mark.parametrize("kind", get_args(measures.Norm))
def test_every_norm_is_built(kind):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.BatchNorm2d(4))
    replace_batch_norm(model, kind, ghost_size=2, position=SamplePosition(), world=World())
    assert isinstance(model[1], torch.nn.BatchNorm2d) == (kind == "local")


def test_the_measures_of_a_layer_are_listed():
    values = torch.linspace(1, 0.5, 10).double()
    layer = LayerSpectrum("fc", "", True, 11, 10, values, 1e-9, 0)
    assert {*layer.measures()} == {name for name, known in measures.MEASURES.items() if known.per_layer}


def test_the_other_measures_are_listed():
    scale = NoiseScale()
    scale.add(4.0, 1.0, 1.0, 8.0)
    names = {*scale.metrics(), "hessian/trace", *(f"hessian/eigenvalue_{n + 1}" for n in range(NUM_EIGENVALUES))}
    assert names <= {*measures.MEASURES}
