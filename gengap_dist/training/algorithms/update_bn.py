"""Recomputes running statistics of batch norm for weights that were not trained, such as averages."""

from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from gengap_dist.compat.batch_norm_base import BatchNormBase
from gengap_dist.data.batch_loader import BatchLoader
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import ReplacedBatchNorm, frozen_running_stats, has_batch_norm
from gengap_dist.models.sample_position import position_of
from gengap_dist.training.evaluation import EVAL_BLOCK

MAX_SAMPLES = 8192  # training samples that are used, unless one block has more
MAX_SAMPLES_UNTRAINED = 1024


@torch.no_grad()
def recompute_running_stats(
    model: nn.Module, batches: BatchLoader, world: World, block_size: int | None, max_samples: int | None = None
) -> None:
    """Set running statistics to the mean over blocks of training samples, augmented as in epoch 0. Collective.

    Blocks do not depend on the number of ranks, and each is normalised by its own statistics, as in training. Samples
    are drawn at random, because image folders are sorted by class.

    Args:
        model: the unsharded network, equal on all ranks.
        batches: training samples.
        world: the ranks.
        block_size: samples per block; None: EVAL_BLOCK, or all if there are fewer.
        max_samples: maximum number of samples; None: MAX_SAMPLES.
    """
    batch_norms = [module for module in model.modules() if isinstance(module, BatchNormBase)]
    layers = [layer for layer in batch_norms if layer.track_running_stats]
    if not layers:
        return
    size = min(block_size or EVAL_BLOCK, len(batches.samples))
    num_samples = max(size, min(max_samples or MAX_SAMPLES, len(batches.samples)) // size * size)  # whole blocks
    drawn = torch.randperm(len(batches.samples), generator=torch.Generator().manual_seed(0))
    sums = [torch.zeros(3, layer.num_features, dtype=torch.float64, device=world.device) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(frozen_running_stats(model))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for layer, total in zip(layers, sums, strict=True):
            stack.callback(layer.register_forward_pre_hook(partial(_add_statistics, total=total)).remove)
        for layer in batch_norms:
            if isinstance(layer, ReplacedBatchNorm | nn.SyncBatchNorm):  # treat a block as one group
                stack.callback(layer.__dict__.pop, "forward")
                layer.forward = partial(_normalize_by_block, layer)
        model.train()
        position = position_of(model)
        for start, stop in blocks(num_samples, size, world):
            position.move_to(start, num_samples, 1, 0)
            inputs, _ = batches(drawn[start:stop], epoch=0)
            model(inputs)
    totals = world.all_reduce(torch.cat([total.flatten() for total in sums]), "running statistics")
    for layer, total_of_layer in zip(layers, totals.split([total.numel() for total in sums]), strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var, count = total_of_layer.view(3, -1)
        layer.running_mean.copy_(mean / count)
        layer.running_var.copy_(var / count)


def untrained_with_statistics(
    model: nn.Module, batches: BatchLoader, world: World, block_size: int | None
) -> nn.Module:
    """The untrained network for evaluation: with batch norm, a copy with recomputed running statistics. Collective.

    The initial running statistics, 0 and 1, do not match any data: activations of a deep network would grow or shrink
    from layer to layer, and an untrained network would lose ranks that it has in its first step.
    """
    if has_batch_norm(model):
        model = deepcopy(model)
        recompute_running_stats(model, batches, world, block_size, MAX_SAMPLES_UNTRAINED)
    return model


def _add_statistics(layer: nn.Module, args: tuple[Any, ...], *, total: Tensor) -> None:
    (inputs,) = args
    var, mean = torch.var_mean(inputs, [dim for dim in range(inputs.ndim) if dim != 1])
    total += torch.stack([mean, var, torch.ones_like(mean)])  # a layer may be called several times


def _normalize_by_block(layer: Any, input: Tensor) -> Tensor:
    return batch_norm(input, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
