"""Score a network on a set of images, with the same result on any number of ranks."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist.data.batch_loader import Normalise
from gengap_dist.data.datasets import Images
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.activations import eval_context

EVAL_BLOCK = 250  # images in one evaluation pass; never cut by ranks, so the result is the same on any number of them


class Score(NamedTuple):
    """Mean loss and accuracy over a set of images."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, images: Images, normalise: Normalise, world: World) -> Score:
    """Score over all of `images`, each counted once; the same number on any number of ranks. Collective.

    Every block's sums go to a place of their own in one vector, which is summed over ranks and then over blocks: the
    order of additions, too, does not depend on the number of ranks.
    """
    sums = torch.zeros(-(-len(images) // EVAL_BLOCK), 2, dtype=torch.float64, device=world.device)
    mine = blocks(len(images), EVAL_BLOCK, world)
    with eval_context(model):
        for number, (start, stop) in enumerate(mine, 1):
            inputs = normalise(images.pixels[start:stop])
            for coming in mine[number : number + 1]:
                images.prefetch(torch.arange(*coming))  # read while this block computes
            logits = model(inputs)
            labels = images.labels[start:stop]
            sums[start // EVAL_BLOCK, 0] = cross_entropy(logits.double(), labels, reduction="sum")
            sums[start // EVAL_BLOCK, 1] = (logits.argmax(1) == labels).sum()
    loss, accuracy = (world.all_reduce_to_cpu(sums, "scores").sum(0) / len(images)).tolist()
    return Score(loss, accuracy)
