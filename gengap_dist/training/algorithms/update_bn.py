"""Running statistics of batch norm for weights that never trained: an average of networks has seen no batch."""

from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import ReplacedBatchNorm, frozen_running_stats, has_batch_norm
from gengap_dist.models.sample_position import position_of
from gengap_dist.training.evaluation import EVAL_BLOCK

MOST = 8192  # training images that are looked at, unless one block has more
MOST_UNTRAINED = 1024


@torch.no_grad()
def recompute_running_stats(
    model: nn.Module, batches: BatchLoader, world: World, block_size: int | None, most: int | None = None
) -> None:
    """Make running statistics the mean over blocks of training images, as epoch 0 sees them. Collective.

    Blocks are the same on any number of ranks, and each is normalised by its own statistics, as in training. Their
    images are drawn from all of them: image folders are sorted by class.

    Args:
        model: the plain network, equal on all ranks.
        batches: training images.
        world: the ranks.
        block_size: images in a block; None: EVAL_BLOCK, or all if there are fewer.
        most: images that are looked at; None: MOST.
    """
    every = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    layers = [layer for layer in every if layer.track_running_stats]
    if not layers:
        return
    size = min(block_size or EVAL_BLOCK, len(batches.images))
    num_images = max(size, min(most or MOST, len(batches.images)) // size * size)  # whole blocks
    drawn = torch.randperm(len(batches.images), generator=torch.Generator().manual_seed(0))
    sums = [torch.zeros(3, layer.num_features, dtype=torch.float64, device=world.device) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(frozen_running_stats(model))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for layer, total in zip(layers, sums, strict=True):
            stack.callback(layer.register_forward_pre_hook(partial(_add, total=total)).remove)
        for layer in every:
            if isinstance(
                layer, ReplacedBatchNorm | nn.SyncBatchNorm
            ):  # a block is one group, whatever else this layer does
                stack.callback(layer.__dict__.pop, "forward")
                layer.forward = partial(_by_itself, layer)
        model.train()
        position = position_of(model)
        for start, stop in blocks(num_images, size, world):
            position.at(start, num_images, 1, 0)
            images, _ = batches(drawn[start:stop], epoch=0)
            model(images)
    told = world.all_reduce(torch.cat([total.flatten() for total in sums]), "running statistics")
    for layer, found in zip(layers, told.split([total.numel() for total in sums]), strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var, count = found.view(3, -1)
        layer.running_mean.copy_(mean / count)
        layer.running_var.copy_(var / count)


def untrained_with_statistics(
    model: nn.Module, batches: BatchLoader, world: World, block_size: int | None
) -> nn.Module:
    """A network before its first step, as training sees it, to look at: a copy if it has batch norm. Collective.

    The running statistics it begins with, 0 and 1, are of no data: activations of a deep network would grow or fade
    from layer to layer, and an untrained network lose ranks that it has in its first step.
    """
    if has_batch_norm(model):
        model = deepcopy(model)
        recompute_running_stats(model, batches, world, block_size, MOST_UNTRAINED)
    return model


def _add(layer: nn.Module, args: tuple[Any, ...], *, total: Tensor) -> None:
    (images,) = args
    var, mean = torch.var_mean(images, [dim for dim in range(images.ndim) if dim != 1])
    total += torch.stack([mean, var, torch.ones_like(mean)])  # a network may call a layer several times


def _by_itself(layer: Any, input: Tensor) -> Tensor:
    return batch_norm(input, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
