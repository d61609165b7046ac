"""The same global batch gives the same training, whatever the number of ranks and the micro-batches.

Every algorithm and norm is in tests/training/algorithms/test_world_size_law.py.
"""

import numpy as np
import pytest
import torch

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.runs.run_folder import prepare_folder, read_metrics
from tests.conftest import FULL, config, weights

pytestmark = pytest.mark.processes

NUM_STEPS = 20 if FULL else 10
SIZES = [(1, 7), (1, 128), (2, 128), (3, 7)] + FULL * [(2, 7), (3, 128)]  # ranks, samples of a micro-batch
CASES = {  # 100 splits unevenly; 1293 leaves a last step of one sample: ranks without any
    "100": {"batch__global_size": 100, "data__augment": ["crop", "flip"]},
    "ragged": {"batch__global_size": 1293, "train__steps": 4 if FULL else 3},
}


@pytest.fixture(scope="module")
def runs(pools, tmp_path_factory):
    """(case, ranks, micro_size) to (losses, gradient norms, weights, test accuracy), all trained for real."""
    out = {}
    for case, settings in CASES.items():
        for size, micro in SIZES:
            folder = tmp_path_factory.mktemp("law")
            prepare_folder(folder, "run.json", resume=False)
            given = {"train__steps": NUM_STEPS, "train__dtype": "float64", "train__num_evals": 2} | settings
            run = config(batch__micro_size=micro, launch__num_processes=size, probe__num_samples=64, **given)
            result = pools[size].run(run, folder, resume=False, progress=lambda *_: None)
            lines = list(read_metrics(folder))
            out[case, size, micro] = (
                np.array([line["train/loss"] for line in lines if "train/loss" in line]),
                np.array([line["train/grad_norm"] for line in lines if "train/loss" in line]),
                weights(folder),
                result["test/accuracy"],
            )
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("size", "micro"), SIZES)
def test_world_size_law(runs, case, size, micro):
    losses, norms, weights, accuracy = runs[case, size, micro]
    true_losses, true_norms, true_weights, true_accuracy = runs[case, 1, 128]
    assert len(losses) == CASES[case].get("train__steps", NUM_STEPS)
    assert losses[-1] != losses[0]
    assert np.abs(losses / true_losses - 1).max() < 1e-9
    assert np.abs(norms / true_norms - 1).max() < 1e-8
    for name, weight in weights.items():
        assert (weight - true_weights[name]).norm() <= 1e-9 * true_weights[name].norm(), name
    assert accuracy == true_accuracy


def test_gradient_is_the_mean_over_the_global_batch():
    """Against autograd on the whole batch at once, one step, no momentum: w_1 = w_0 - lr * mean gradient."""
    from gengap_dist import models
    from gengap_dist.config.sections import DataConfig, RunConfig
    from gengap_dist.data import datasets
    from gengap_dist.data.batch_loader import BatchLoader, Preprocess
    from gengap_dist.distributed.batch_plan import BatchPlan
    from gengap_dist.distributed.process_group import World
    from gengap_dist.parallel.strategies import Single
    from gengap_dist.training.step import Objective, StepBatch, train_step
    from gengap_dist.training.tasks import Classification

    splits = datasets.load(DataConfig())
    normalise = Preprocess(splits.pixels, torch.device("cpu"), torch.float64)
    torch.manual_seed(0)
    model = models.build("lenet5", DataSpec.images(10, 1)).double()
    twin = models.build("lenet5", DataSpec.images(10, 1)).double()
    twin.load_state_dict(model.state_dict())
    strategy = Single(RunConfig(), World())
    strategy.setup(model, lambda model: torch.optim.SGD(model.parameters(), lr=0.5))
    indices = torch.arange(50) * 3
    spans = BatchPlan(50, 1, 7).micro_batches(0)
    batches = BatchLoader(splits.train, normalise, DataConfig(), 0)
    sums, norm = train_step(strategy, batches, StepBatch(indices, 0, spans), Objective(Classification(splits.spec)))

    images, labels = normalise(splits.train.inputs[indices]), splits.train.targets[indices]
    loss = torch.nn.functional.cross_entropy(twin(images), labels)
    loss.backward()
    assert float(sums[0]) / 50 == pytest.approx(loss.item(), rel=1e-12)
    assert float(norm) == pytest.approx(
        float(torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()), rel=1e-12
    )
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours, theirs - 0.5 * theirs.grad, rtol=1e-12, atol=1e-15)
