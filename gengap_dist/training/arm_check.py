"""Checks every arm of a study against its data and its network before the first run, and says how long each trains."""

from collections.abc import Mapping
from typing import Any

import torch

from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.process_group import World
from gengap_dist.distributed.runtime_context import LastValue, RuntimeContext
from gengap_dist.errors import UsageError
from gengap_dist.parallel.memory_model import state_copies
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.layers import select_layers
from gengap_dist.training.algorithms.rank_penalty import RankPenalty
from gengap_dist.training.checks import check_auto_micro_size, check_norm, check_parameters, startup_checks
from gengap_dist.training.lr_schedule import Schedule
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.run_cost import FOLDER_BYTES, ArmFacts
from gengap_dist.training.setup import build_model, load_data, two_samples
from gengap_dist.training.tasks import build_task

OF_NETWORK = {"data", "task", "model", "batch", "train"}  # sections of which a network and its samples may depend


def check_arms(
    arms: Mapping[str, RunConfig], context: RuntimeContext, *, data_here: bool = True
) -> dict[str, ArmFacts]:
    """Facts of each arm. The last data set is kept in `context`, and arms with the same network share it.

    Args:
        arms: their settings, by name.
        context: of this process.
        data_here: whether the data are read and the networks built. On a Ray cluster they may be on its nodes only:
            then an arm is checked by the number of its samples, if that is known, and else it is left out.

    Raises:
        UsageError: the first problem, with the name of its arm: its runs would be refused.
    """
    networks, facts = LastValue[Any](), dict[str, ArmFacts]()
    for name in sorted(arms, key=lambda name: arms[name].model_dump_json(include=OF_NETWORK)):
        try:
            if data_here:
                facts[name] = _checked(arms[name], context, networks)
            elif sizes := _sizes(arms[name]):
                facts[name] = _length(arms[name], sizes.num_train)
        except UsageError as error:
            raise UsageError(f"study arm {name}: {error}") from None
    return {name: facts[name] for name in arms if name in facts}


def _sizes(config: RunConfig) -> datasets.Sizes | None:
    try:
        return datasets.sizes(config.data)
    except UsageError:
        return None


def _length(config: RunConfig, num_train: int) -> ArmFacts:
    sampler = EpochSampler.of(config, num_train)
    num_steps = Schedule.of(config, sampler).num_steps
    return ArmFacts(num_steps=num_steps, num_epochs=num_steps / sampler.steps_per_epoch)


def _checked(config: RunConfig, context: RuntimeContext, networks: LastValue[Any]) -> ArmFacts:
    num_ranks, device, world = config.launch.num_processes, config.launch.device, World()
    for check in startup_checks(config, num_ranks, None if device == "auto" else device):
        check()
    splits = context.data.get(
        datasets.data_key(config.data, config.seed), lambda: load_data(config, world, lambda done, total, note: None)
    )
    facts = _length(config, len(splits.train))
    task = build_task(config, splits.spec)
    key = config.model_copy(update={"seed": 0}).model_dump_json(include=OF_NETWORK)
    model = networks.get(key, lambda: build_model(config, splits, task, world))
    inputs = two_samples(config, splits, world)[0]
    check_parameters(config, model, num_ranks)
    if config.probe.enabled:
        with eval_context(model):
            select_layers(model, inputs[:1], config.probe.layers)
    check_auto_micro_size(config, model)
    if config.batch.micro_size != "auto":
        check_norm(config, model, EpochSampler.of(config, len(splits.train)).sizes(), num_ranks)
    build_optimizer(config.scaled_optim, model)
    if config.algorithm.rank_penalty is not None:
        RankPenalty(config, task).check(model, lambda: inputs[:1], len(splits.train), num_ranks)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = num_parameters * getattr(torch, config.train.dtype).itemsize
    copies = 2 + state_copies(config.optim)  # the last weights, the best, and the optimizer's
    disk_bytes = FOLDER_BYTES + weights * (config.checkpoint.keep * copies + config.mlflow.log_model)
    return facts._replace(num_parameters=num_parameters, disk_bytes=disk_bytes)
