"""What the tests of strategies have real ranks do."""

import gc
import hashlib
import weakref
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.sampler import EpochSampler
from gengap_dist.distributed.batch_plan import BatchPlan
from gengap_dist.distributed.process_group import World
from gengap_dist.models.batch_norm import average_buffers
from gengap_dist.parallel.strategies import STRATEGIES
from gengap_dist.training.algorithms.base import gradient_function
from gengap_dist.training.optimizer import build_optimizer as build_optimizer
from gengap_dist.training.step import Objective, StepBatch, train_step
from gengap_dist.training.tasks import build_task
from tests.conftest import config

State = dict[str, Any]


def half_frozen(num_classes: int, in_channels: int) -> nn.Module:
    """A network of which some weights are not trained."""
    first = nn.Linear(32 * 32 * in_channels, 20)
    first.weight.requires_grad_(False)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(20, num_classes))


class Trainer:
    """A network and its strategy on one rank, as `run` builds them."""

    def __init__(self, name: str, world: World, settings: State, saved: State | None = None) -> None:
        self.world = World() if name == "single" else world
        self.config = config(**settings)
        splits = datasets.load(self.config.data)
        dtype = getattr(torch, self.config.train.dtype)
        self.batches = BatchLoader(
            splits.train, Preprocess(splits.pixels, self.world.device, dtype), self.config.data, 0
        )
        self.task = build_task(self.config, splits.spec)
        self.objective = Objective(self.task)
        self.order = EpochSampler(len(splits.train), self.config.batch.global_size, 0)
        torch.manual_seed(2)
        model = models.from_config(self.config, DataSpec.images(10, 1), self.world).to(dtype)
        if saved:
            model.load_state_dict(saved["model"])
        self.strategy = STRATEGIES[name](self.config, self.world)
        self.strategy.has_unused_parameters = self.config.model.name.endswith("with_unused")
        self.strategy.setup(model, partial(build_optimizer, self.config.scaled_optim))
        if saved:
            self.strategy.load_optimizer_state(saved["optimizer"])
        self.step = saved["step"] if saved else 0

    def train(self, steps: int, watch: bool = False) -> State:
        """Losses [steps], gradient norms [steps], and of each rank [steps, ranks] |g|^2 and 1/b for the noise scale."""
        strategy, batch, rows = self.strategy, self.config.batch, []
        strategy.track_local_grad_norm = watch
        strategy.model.train()
        for _ in range(steps):
            strategy.set_rates(0.02 + 0.001 * self.step, self.config.optim.momentum)
            indices, epoch = self.order.indices(self.step), self.order.epoch(self.step)
            plan = BatchPlan(len(indices), self.world.size, batch.micro_size, batch.ghost_size)
            spans = plan.micro_batches(self.world.rank, equal_counts=strategy.capabilities.sends_every_micro_batch)
            work = StepBatch(indices, epoch, spans)
            sums, norm = train_step(
                strategy, self.batches, work, self.objective, gradient_function(self.config.algorithm)
            )
            assert norm.shape == ()
            mine = torch.zeros(self.world.size, 2, dtype=torch.float64)
            mine[self.world.rank] = torch.stack([sums.local_squared_norm, sums.local_inverse_size])
            loss = self.world.all_reduce(sums.loss_sum.clone()) / len(indices)
            rows.append({"loss": float(loss), "norm": float(norm), "energy": self.world.all_reduce(mine).tolist()})
            self.step += 1
        return {key: [row[key] for row in rows] for key in ("loss", "norm", "energy")}

    def save(self) -> State:
        """What a checkpoint holds, on every rank."""
        average_buffers(self.strategy.model, self.world)
        with self.strategy.unsharded_model() as net:
            model = {key: value.clone() for key, value in net.state_dict().items()}
        saved: list[Any] = [{"model": model, "optimizer": self.strategy.optimizer_state(), "step": self.step}]
        if self.world.size > 1:
            dist.broadcast_object_list(saved)  # rank 0's, as if all had read its file
        return saved[0]


def trained(world: World, name: str, settings: State, steps: int, watch: bool = False) -> State:
    """What a rank knows after some steps, and whether all ranks know the same."""
    trainer = Trainer(name, world, settings)
    out = trainer.train(steps, watch)
    with trainer.strategy.unsharded_model() as net:
        mine = digest(net.state_dict())
    saved = trainer.save()
    with trainer.strategy.unsharded_model() as net:
        same = {key for key, value in saved["model"].items() if torch.equal(value, net.state_dict()[key])}
    return out | arrays(saved) | {"own": mine, "digest": digest(saved["model"]), "same": same == {*saved["model"]}}


def digest(state: dict[str, Tensor]) -> str:
    parameters = [value for value in state.values() if value.is_floating_point()]
    return hashlib.sha256(torch.cat([p.flatten() for p in parameters]).numpy().tobytes()).hexdigest()


def arrays(saved: State) -> State:
    """Tensors do not travel well between processes."""
    optimizer = {name: {key: v.numpy() for key, v in kept.items()} for name, kept in saved["optimizer"].items()}
    return saved | {"model": {key: v.numpy() for key, v in saved["model"].items()}, "optimizer": optimizer}


def tensors(saved: State) -> State:
    optimizer = {name: {key: torch.as_tensor(v) for key, v in k.items()} for name, k in saved["optimizer"].items()}
    return saved | {"model": {key: torch.as_tensor(v) for key, v in saved["model"].items()}, "optimizer": optimizer}


def ring(world: World, names: list[str], settings: State, each: int, start: State | None = None) -> State:
    """Every strategy goes on where the one before it stopped."""
    saved = tensors(start) if start else None
    for name in names:
        trainer = Trainer(name, world, settings, saved)
        trainer.train(each)
        saved = trainer.save()
    assert saved
    return arrays(saved)


def resumed(world: World, name: str, settings: State) -> bool:
    """Whether six steps are, bit for bit, three steps and three more of a new engine."""
    whole = Trainer(name, world, settings)
    whole.train(6)
    want = whole.save()
    first = Trainer(name, world, settings)
    first.train(3)
    second = Trainer(name, world, settings, first.save())
    second.train(3)
    got = second.save()
    keys = {name: {*kept} for name, kept in want["optimizer"].items()}
    assert keys == {name: {*kept} for name, kept in got["optimizer"].items()}
    pairs = [(want["model"][key], got["model"][key]) for key in want["model"]]
    pairs += [(want["optimizer"][name][key], got["optimizer"][name][key]) for name in keys for key in keys[name]]
    return all(torch.equal(*pair) for pair in pairs)


def blown_up(world: World, name: str, settings: State) -> list[float]:
    """Losses of three steps, the first of which throws the weights far away."""
    trainer = Trainer(name, world, settings)
    trainer.strategy.model.train()
    far = type(trainer.strategy).set_rates
    trainer.strategy.set_rates = lambda lr, momentum: far(trainer.strategy, 1e25, momentum)  # pyright: ignore
    return trainer.train(3)["loss"]


def small_energies(world: World, settings: State, size: int, steps: list[int]) -> dict[int, list[list[float]]]:
    """|g|^2 and 1/b of every rank's first micro-batch before some steps, by one backward pass each, on one rank."""
    trainer = Trainer("single", world, settings)
    model, batch, out = trainer.strategy.model, trainer.config.batch, {}
    for step in steps:
        trainer.train(step - trainer.step)
        indices, epoch = trainer.order.indices(step), trainer.order.epoch(step)
        plan = BatchPlan(len(indices), size, batch.micro_size, batch.ghost_size)
        out[step] = []
        for span in (plan.micro_batches(rank)[0] for rank in range(size)):
            images, labels = trainer.batches(indices[span.start : span.stop], epoch)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            out[step].append([float(sum(g.double().square().sum() for g in gradient)), 1 / span.size])
    return out


def forgotten(world: World, name: str, settings: State) -> bool:
    """Whether a trained network is gone once its strategy is closed."""
    trainer = Trainer(name, world, settings)
    trainer.train(2)
    model = weakref.ref(trainer.strategy.model)
    trainer.strategy.close()
    del trainer
    gc.collect()
    return model() is None


def sharding(world: World, name: str, settings: State) -> State:
    """How a strategy has laid out its parameters, how many process groups it has made, and left once it is closed."""
    groups = dist.distributed_c10d._world.pg_map  # every group of this process; pyright: ignore[reportPrivateUsage]
    before, trainer = len(groups), Trainer(name, world, settings)
    weight: Any = next(trainer.strategy.model.parameters())
    out = {"dimensions": weight.device_mesh.mesh_dim_names, "ranks": weight.device_mesh.mesh.tolist(),
           "share": weight.to_local().numel() / weight.numel(), "groups": len(groups) - before}  # fmt: skip
    trainer.strategy.close()
    return out | {"left": len(groups) - before}


def timeouts(world: World, name: str, settings: State) -> dict[str, timedelta]:
    """How long each backend of each process group waits for its ranks, once a strategy is set up."""
    Trainer(name, world, settings)
    groups = dist.distributed_c10d._world.pg_map  # every group of this process; pyright: ignore[reportPrivateUsage]
    backends = [(group, group._get_backend(device)) for group in groups for device in group._device_types]
    return {f"{group.group_desc} {backend.name()}": backend.options._timeout for group, backend in backends}


class Odd(nn.Module):
    """With a parameter that no pass uses, or a parameter without dimensions."""

    def __init__(self, num_inputs: int, num_classes: int, *, unused: bool, scalar: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, 12), nn.ReLU(), nn.Linear(12, num_classes))
        self.spare = nn.Linear(3, 3) if unused else None
        self.scale = nn.Parameter(torch.tensor(1.5)) if scalar else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.body(images)
        return out if self.scale is None else out * self.scale


def with_unused(num_classes: int, in_channels: int) -> nn.Module:
    return Odd(1024 * in_channels, num_classes, unused=True, scalar=False)


def with_scalar(num_classes: int, in_channels: int) -> nn.Module:
    return Odd(1024 * in_channels, num_classes, unused=False, scalar=True)
