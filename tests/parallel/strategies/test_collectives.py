"""World, buffers and evaluation on 1, 2 and 3 real ranks."""

import pytest
import torch
from torch import nn

from gengap_dist import models
from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import average_buffers
from gengap_dist.training.evaluation import evaluate
from gengap_dist.training.tasks import Classification


def talk(world: World) -> dict:
    total = world.all_reduce(torch.tensor([world.rank + 1.0, 1.0], dtype=torch.float64))
    heights = [of + world.rank for of in range(world.size)]  # ragged, rank 0 sends itself nothing
    chunks = [torch.full((world.rank + to, 2), 10.0 * world.rank + to) for to in range(world.size)]
    swapped = world.all_to_all(chunks, heights)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(world.rank)
    norm.num_batches_tracked.fill_(7)
    average_buffers(norm, world)
    splits = datasets.load(DataConfig())
    scores = {}
    for name in ("lenet5", "mlp"):
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(1)
            model = models.build(name, DataSpec.images(10, 1), widths=(32,)).to(dtype)
            normalise = Preprocess(splits.pixels, world.device, dtype)
            task = Classification(splits.spec)
            scores[name, dtype] = evaluate(model, splits.test, normalise, task, world)  # 360 does not divide into 250s
            few = datasets.Samples(splits.test.inputs[:7], splits.test.targets[:7])  # fewer images than one block
            scores[name, dtype, "few"] = evaluate(model, few, normalise, task, world)
    return {
        "sum": total.tolist(),
        "swapped": [chunk.tolist() for chunk in swapped],
        "mean": norm.running_mean.tolist(),
        "tracked": int(norm.num_batches_tracked),
        "scores": scores,
    }


@pytest.fixture(scope="module")
def said(crews) -> dict[int, list[dict]]:
    return {size: crews[size](talk) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_world(said, size):
    for rank, answer in enumerate(said[size]):
        assert answer["sum"] == [size * (size + 1) / 2, size]
        assert answer["swapped"] == [[[10.0 * of + rank] * 2] * (of + rank) for of in range(size)]
        assert answer["mean"] == [(size - 1) / 2] * 2
        assert answer["tracked"] == 7


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_is_the_same_number_on_any_world(said, size):
    assert all(answer["scores"] == said[1][0]["scores"] for answer in said[size])


def test_evaluation_counts_every_image_once(said):
    splits = datasets.load(DataConfig())
    torch.manual_seed(1)
    model = models.build("lenet5", DataSpec.images(10, 1)).double().eval()
    normalise = Preprocess(splits.pixels, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        logits = model(normalise(splits.test.inputs))
    score = said[3][0]["scores"]["lenet5", torch.float64]
    assert score["accuracy"] == float((logits.argmax(1) == splits.test.targets).double().mean())
    assert score["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, splits.test.targets)), rel=1e-12)
