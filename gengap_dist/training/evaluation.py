"""Evaluates a network on a set of images, with the same result on any number of ranks."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gengap_dist.data.batch_loader import Normalise
from gengap_dist.data.datasets import Images
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.activations import eval_context

EVAL_BLOCK = (
    250  # images in one pass; blocks are not split between ranks, so the result does not depend on their number
)


class Score(NamedTuple):
    """Mean loss and accuracy over a set of images."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, images: Images, normalise: Normalise, world: World) -> Score:
    """Loss and accuracy over all `images`, each counted once; identical on any number of ranks. Collective.

    The sums of each block have their own row in one tensor, which is summed over ranks and then over blocks. So the
    order of additions does not depend on the number of ranks either.
    """
    sums = torch.zeros(-(-len(images) // EVAL_BLOCK), 2, dtype=torch.float64, device=world.device)
    own_blocks = blocks(len(images), EVAL_BLOCK, world)
    with eval_context(model):
        for number, (start, stop) in enumerate(own_blocks, 1):
            inputs = normalise(images.pixels[start:stop])
            for next_block in own_blocks[number : number + 1]:
                images.prefetch(torch.arange(*next_block))  # read while this block computes
            logits = model(inputs)
            labels = images.labels[start:stop]
            sums[start // EVAL_BLOCK, 0] = cross_entropy(logits.double(), labels, reduction="sum")
            sums[start // EVAL_BLOCK, 1] = (logits.argmax(1) == labels).sum()
    loss, accuracy = (world.all_reduce_to_cpu(sums, "scores").sum(0) / len(images)).tolist()
    return Score(loss, accuracy)
