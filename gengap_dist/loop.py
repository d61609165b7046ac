"""Steps and evaluations: what every rank does, over and over.

Shapes: n samples of one micro-batch, C x H x W pixels, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gengap_dist.batching import Span
from gengap_dist.data.catalog import Images
from gengap_dist.data.resident import Batches, Normalise
from gengap_dist.probes.capture import observing
from gengap_dist.strategies import Strategy
from gengap_dist.world import World

EVAL_BLOCK = 250  # images in one evaluation pass; never cut by ranks, so the result is the same on any number of them


def train_step(
    strategy: Strategy, batches: Batches, indices: Tensor, epoch: int, spans: list[Span]
) -> tuple[Tensor, Tensor]:
    """One optimizer step on the global batch `indices`, this rank doing the micro-batches `spans`. Collective.

    Returns:
        [5] float64: this rank's sum of losses and number of correct predictions, before the update; then, if the
        strategy is watching, for the noise scale |G_b|^2 and 1/b of its first micro-batch, and 1; and the norm of the
        global gradient. Both stay on the device.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=strategy.world.device)
    watch = strategy.watching and 0 < spans[0].size < len(indices)
    where = strategy.world.where
    for number, span in enumerate(spans, 1):
        with strategy.micro_step(last=number == len(spans)):
            if not span.size:
                join_with_nothing(strategy, batches, epoch)
                continue
            with where.during("data"):
                images, labels = batches(indices[span.start : span.stop], epoch)
            logits = strategy.forward(images)
            loss_sum = cross_entropy(logits, labels, reduction="sum")
            strategy.backward(loss_sum / len(indices))
        sums[0] += loss_sum.detach()
        sums[1] += (logits.detach().argmax(1) == labels).sum()
        if watch and number == 1:
            share = span.size / len(indices)
            sums[2] = strategy.local_energy() / share**2
            sums[3], sums[4] = 1 / span.size, 1.0
    return sums, strategy.step()


def join_with_nothing(strategy: Strategy, batches: Batches, epoch: int) -> None:
    """A rank without samples meets the others' gradients with zeros: one image, in eval mode, times 0."""
    images, _ = batches(torch.zeros(1, dtype=torch.int64), epoch)
    strategy.model.eval()
    strategy.backward(strategy.forward(images).sum() * 0)
    strategy.model.train()


class Score(NamedTuple):
    """Mean loss and accuracy over a set of images."""

    loss: float
    accuracy: float


def blocks(num_samples: int, size: int, world: World) -> list[Span]:
    """This rank's blocks of 0 .. num_samples - 1: blocks are the same on any number of ranks, dealt out in turn.

    >>> blocks(7, 3, World(rank=0, size=2))
    [Span(start=0, stop=3), Span(start=6, stop=7)]
    """
    starts = range(world.rank * size, num_samples, world.size * size)
    return [Span(start, min(start + size, num_samples)) for start in starts]


def evaluate(model: nn.Module, images: Images, normalise: Normalise, world: World) -> Score:
    """Score over all of `images`, each counted once; the same number on any number of ranks. Collective.

    Every block's sums go to a place of their own in one vector, which is summed over ranks and then over blocks: the
    order of additions, too, does not depend on the number of ranks.
    """
    sums = torch.zeros(-(-len(images) // EVAL_BLOCK), 2, dtype=torch.float64, device=world.device)
    mine = blocks(len(images), EVAL_BLOCK, world)
    with observing(model):
        for number, (start, stop) in enumerate(mine, 1):
            inputs = normalise(images.pixels[start:stop])
            for coming in mine[number : number + 1]:
                images.expect(torch.arange(*coming))  # read while this block computes
            logits = model(inputs)
            labels = images.labels[start:stop]
            sums[start // EVAL_BLOCK, 0] = cross_entropy(logits.double(), labels, reduction="sum")
            sums[start // EVAL_BLOCK, 1] = (logits.argmax(1) == labels).sum()
    loss, accuracy = (world.sum(sums).sum(0) / len(images)).tolist()
    return Score(loss, accuracy)
