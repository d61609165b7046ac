"""One rank's whole run, from config to result: the only place that picks concrete classes.

Every launcher ends here, on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gengap_dist import checkpoint, models
from gengap_dist.batching import BatchPlan, Span
from gengap_dist.config import DataConfig, RunConfig, UsageError, difference
from gengap_dist.data import catalog
from gengap_dist.data.order import Order, stream
from gengap_dist.data.resident import Batches, Normalise
from gengap_dist.loop import Score, blocks, evaluate, train_step
from gengap_dist.models.norm import GhostBatchNorm1d, average_buffers, has_batch_norm
from gengap_dist.optim.build import build as build_optimizer
from gengap_dist.optim.schedule import lr_at
from gengap_dist.probes import LayerSpectrum, measure, metrics
from gengap_dist.probes.cadence import evenly, log_spaced
from gengap_dist.probes.capture import observing
from gengap_dist.strategies import STRATEGIES
from gengap_dist.tracking.record import DIVERGED, FINISHED, NoRecord, Record, read_info
from gengap_dist.world import World, connect, environment

PROBE_BLOCK = 128  # probe images in one pass; never cut by ranks, so spectra do not depend on their number
FLUSH_EVERY = 32  # steps whose sums meet the other ranks' in one all-reduce

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words."""


class Diverged(Exception):
    """The loss is no longer a number; that is a result, not a crash."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"train/loss was {loss} at step {step}")
        self.step = step


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    world: World | None = None,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Any]:
    """Train, measure, record; the result as it stands in run.json, the same on every rank. Collective.

    Args:
        config: the run.
        out: its folder, made ready by the launcher (`record.prepare_folder`).
        resume: go on from the folder's checkpoint, if there is one.
        world: this process's place among the ranks; None connects as the environment says.
        progress: called on every rank after every step.

    Raises:
        UsageError: if the config does not fit the data, the model or the machine.
    """
    world = world or connect(config.launch)
    record = Record(out) if world.rank == 0 else NoRecord()
    session = _Session(config, out, world, record, progress)
    session.start(resume)
    try:
        session.train()
        result = session.result()
        record.finish(FINISHED, result)
    except Diverged as error:
        result = {"diverged_at_step": error.step}
        record.finish(DIVERGED, result, str(error))
    world.barrier()  # when any rank returns, the folder is complete
    return result


def probe_once(config: RunConfig, world: World, weights: Path | None = None) -> list[LayerSpectrum]:
    """Spectra of the config's probe set under an untrained network, or under a checkpoint's. Collective.

    Raises:
        UsageError: if the config does not fit the data or the model, or the checkpoint cannot be used.
    """
    splits = _load_data(config, world, lambda done, total, note: None)
    model = _build_model(config, splits, world)
    if weights is not None:
        checkpoint.restore(model, checkpoint.load(weights)["model"], weights)
    normalise = Normalise(splits, world.device, getattr(torch, config.train.dtype))
    train_set = splits.train.to(world.device)
    batches = _probe_batches(train_set, _probe_indices(config, len(train_set)), normalise, world)
    return measure(model, batches, layers=config.probe.layers, views=config.probe.views, world=world)


class _Session:
    """What a run holds between steps, on one rank."""

    def __init__(self, config: RunConfig, out: Path, world: World, record: NoRecord, progress: Progress) -> None:
        self.config, self.out, self.world, self.record, self.progress = config, out, world, record, progress
        splits = _load_data(config, world, progress)
        self.facts = {"data": catalog.summary(splits, config.data) if world.rank == 0 else None}
        self.train_set, self.val_set, self.test_set = (
            images.to(world.device) for images in (splits.train, splits.val, splits.test)
        )
        self.normalise = Normalise(splits, world.device, getattr(torch, config.train.dtype))
        self.batches = Batches(self.train_set, self.normalise, config.data.augment, config.seed)
        self.order = Order(len(self.train_set), config.batch.global_size, config.seed)
        self.num_steps = config.train.steps or config.train.epochs * self.order.steps_per_epoch
        self.probe_indices = _probe_indices(config, len(self.train_set)).to(world.device)

        self.model = _build_model(config, splits, world)
        self._plans: dict[int, list[Span]] = {}
        self._check_norm()

        optimizer = build_optimizer(config.optim, self.model.parameters())
        name = config.launch.strategy
        name = ("ddp" if world.size > 1 else "single") if name == "auto" else name
        if (name == "single") != (world.size == 1):
            raise UsageError(
                f"launch.strategy ({name}) does not fit {world.size} rank(s): single is for one, ddp for more; use auto"
            )
        self.strategy = STRATEGIES[name](world)
        self.strategy.setup(self.model, optimizer)
        self.facts |= {
            "world_size": world.size,
            "device": str(world.device.type),
            "launcher": "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "local",
            "strategy": name,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "steps_per_epoch": self.order.steps_per_epoch,
            "num_steps": self.num_steps,
            "num_probe_samples": len(self.probe_indices),
            "norm_size": sorted(self._plan(config.batch.global_size).norm_sizes())
            if has_batch_norm(self.model)
            else None,
        }
        self.step = 0
        self.best: dict[str, Any] = {}
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []
        self._saved_at = time.monotonic()
        self.probe_seconds = self.eval_seconds = self.train_seconds = 0.0
        self.probe_due = log_spaced(config.probe.per_decade)
        self.eval_due = evenly(config.train.num_evals, self.num_steps)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _plan(self, global_size: int) -> BatchPlan:
        batch = self.config.batch
        return BatchPlan(global_size, self.world.size, batch.micro_size, batch.ghost_size)

    def _check_norm(self) -> None:
        batch = self.config.batch
        if batch.ghost_size and not any(isinstance(m, GhostBatchNorm1d) for m in self.model.modules()):
            raise UsageError(
                f"batch.ghost_size ({batch.ghost_size}) has no effect on {self.config.model.name}, which has no ghost "
                "batch norm: set batch.ghost_size=null, or choose model.name=mlp"
            )
        if not has_batch_norm(self.model):
            return
        tail = len(self.train_set) % batch.global_size
        for size in filter(None, (batch.global_size, tail)):
            if 1 in self._plan(size).norm_sizes():
                raise UsageError(
                    f"batch.global_size ({batch.global_size}) on {self.world.size} rank(s) leaves batch norm a group "
                    f"of one sample in a step of {size}: choose another global_size, a larger micro_size or fewer ranks"
                )

    # -- start and resume ---------------------------------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        path = self.out / "checkpoints" / "last.pt"
        if resume and path.exists():
            self._check_same_run()
            state = checkpoint.load(path)
            checkpoint.restore(self.model, state["model"], path)
            self.strategy.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = state["step"], state["best"]
            self.probe_seconds, self.eval_seconds, self.train_seconds = state["timers"]
            self.record.start(self.config, self.facts)
            self.record.resume(self.step, state["seconds"], state["held"])
            return
        self.record.start(self.config, self.facts)
        self.record.resume(0, 0.0, {})
        self.observe()

    def _check_same_run(self) -> None:
        if changed := difference(read_info(self.out)["config"], self.config):
            name, before, now = changed
            raise UsageError(
                f"{name} ({now}) was {before} when the run in {self.out} began: "
                "resume with the settings it was started with, or choose a new --out"
            )

    def save(self) -> None:
        """Write the checkpoint. Collective."""
        average_buffers(self.model, self.world)
        self.record.flush(before=self.step)
        if self.world.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.strategy.optimizer.state_dict(),
                "step": self.step,
                "best": self.best,
                "seconds": self.record.seconds(),
                "timers": [self.probe_seconds, self.eval_seconds, self.train_seconds],
                "held": self.record.held(),
            }
            checkpoint.save(self.out / "checkpoints" / "last.pt", state)
        self._saved_at = time.monotonic()

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every step from the current one to the last, with what is due in between. Collective."""
        config, order = self.config, self.order
        self.model.train()
        began = time.monotonic()
        while self.step < self.num_steps:
            lr = lr_at(
                self.step,
                config.optim,
                global_size=config.batch.global_size,
                steps_per_epoch=order.steps_per_epoch,
                num_steps=self.num_steps,
            )
            for group in self.strategy.optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed((config.seed * 1_000_003 + self.step) * 65_537 + self.world.rank)  # dropout and the like
            indices, epoch = order.indices(self.step), order.epoch(self.step)
            if len(indices) not in self._plans:
                self._plans[len(indices)] = self._plan(len(indices)).micro_batches(self.world.rank)
            sums, norm = train_step(self.strategy, self.batches, indices, epoch, self._plans[len(indices)])
            self.step += 1
            last = self.step == self.num_steps
            if self.step % config.train.log_every == 0 or last:
                self._pending.append((self.step, sums / len(indices), norm, lr))
            self.progress(self.step, self.num_steps, "")
            if len(self._pending) >= FLUSH_EVERY or self._due():
                save_due = self._flush()
                self.train_seconds += time.monotonic() - began
                self.observe()
                if save_due or last:
                    self.save()
                began = time.monotonic()

    def _due(self) -> bool:
        return self.step == self.num_steps or self.probe_due(self.step) or self.eval_due(self.step)

    def _epoch(self, step: int) -> float:
        epoch, at = divmod(step, self.order.steps_per_epoch)
        return epoch + at * self.config.batch.global_size / len(self.train_set)

    def _flush(self) -> bool:
        """Record the pending steps; whether rank 0's clock asks for a checkpoint. Collective."""
        steps, means, norms, lrs = zip(*self._pending, strict=True) if self._pending else ((), (), (), ())
        overdue = time.monotonic() - self._saved_at > self.config.checkpoint.every_seconds and self.world.rank == 0
        clock = torch.tensor([[float(overdue), 0.0]], dtype=torch.float64, device=self.world.device)
        *values, (save_due, _) = self.world.sum(torch.cat([*(m[None] for m in means), clock])).tolist()
        norms = torch.stack(norms).tolist() if norms else []
        self._pending.clear()
        for step, (loss, accuracy), norm, lr in zip(steps, values, norms, lrs, strict=True):
            self.record.log(
                step,
                self._epoch(step),
                {"train/loss": loss, "train/accuracy": accuracy, "train/grad_norm": norm, "train/lr": lr},
            )
            if not math.isfinite(loss):
                raise Diverged(step, loss)
        return bool(save_due)

    # -- measurements -------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Validate and probe, whichever is due at this step. Collective."""
        edge = self.step in (0, self.num_steps)
        validate = len(self.val_set) and (edge or self.eval_due(self.step))
        probe = self.config.probe.enabled and (edge or self.probe_due(self.step))
        if not (validate or probe):
            return
        average_buffers(self.model, self.world)
        if validate:
            self.validate()
        if probe:
            self.probe()

    def validate(self) -> None:
        """Score the validation images, and remember the model if it is the best so far. Collective."""
        began = time.monotonic()
        score = self._score(self.val_set)
        if score.accuracy > self.best.get("accuracy", -1.0):
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"step": self.step, "accuracy": score.accuracy, "model": state}
        self.record.log(self.step, self._epoch(self.step), {"val/loss": score.loss, "val/accuracy": score.accuracy})
        self.eval_seconds += time.monotonic() - began
        self.progress(self.step, self.num_steps, f"val {score.accuracy:.1%}")

    def probe(self) -> None:
        """Measure the activation spectra of the fixed probe set. Collective."""
        began = time.monotonic()
        spectra = measure(
            self.model,
            _probe_batches(self.train_set, self.probe_indices, self.normalise, self.world),
            layers=self.config.probe.layers,
            views=self.config.probe.views,
            world=self.world,
        )
        self.record.spectra(self.step, spectra)
        seconds = time.monotonic() - began
        self.probe_seconds += seconds
        self.record.log(self.step, self._epoch(self.step), metrics(spectra) | {"probe_seconds/near_rank_loss": seconds})

    def _score(self, images: catalog.Images) -> Score:
        return evaluate(self.model, images, self.normalise, self.world)

    def result(self) -> dict[str, Any]:
        """Score the last and the best model on the test images: the only time they are touched. Collective."""
        average_buffers(self.model, self.world)
        train, test = self._score(self.train_set), self._score(self.test_set)
        out = {
            "train_full/loss": train.loss,
            "train_full/accuracy": train.accuracy,
            "test/loss": test.loss,
            "test/accuracy": test.accuracy,
            "train_test_gap": train.accuracy - test.accuracy,
        }
        if self.best:
            self.model.load_state_dict(self.best["model"])
            out["test_at_best_val/accuracy"] = self._score(self.test_set).accuracy
        self.record.log(self.step, self._epoch(self.step), out)
        samples = self._epoch(self.step) * len(self.train_set)
        return out | {
            "best_val_step": self.best.get("step"),
            "best_val/accuracy": self.best.get("accuracy"),
            "num_steps": self.step,
            "train_seconds": round(self.train_seconds, 3),
            "probe_seconds": round(self.probe_seconds, 3),
            "eval_seconds": round(self.eval_seconds, 3),
            "images_per_second": round(samples / max(self.train_seconds, 1e-9), 1),
        }


_LOADED: dict[DataConfig, catalog.Splits] = {}  # the last data set: the runs of a study share it


def _load_data(config: RunConfig, world: World, progress: Progress) -> catalog.Splits:
    def report(what: str, done: int, total: int) -> None:
        progress(0, 0, f"{what} {done:,}/{total:,}")

    if config.data in _LOADED:
        return _LOADED[config.data]
    _LOADED.clear()
    local_rank = environment()[1]
    if config.data.download and local_rank == 0:
        catalog.load(config.data, report)  # one rank per machine fetches the files, the others find them
    if config.data.download:
        world.barrier()
    _LOADED[config.data] = catalog.load(config.data, report)
    return _LOADED[config.data]


def _probe_indices(config: RunConfig, num_train: int) -> Tensor:
    """The fixed probe set: training images drawn by split_seed, so that all arms and seeds measure the same ones."""
    num = min(config.probe.num_samples, num_train)
    return torch.from_numpy(np.sort(stream(config.data.split_seed, 2).permutation(num_train)[:num]))


def _probe_batches(images: catalog.Images, indices: Tensor, normalise: Normalise, world: World) -> Iterator[Tensor]:
    """This rank's blocks of the probe set."""
    for start, stop in blocks(len(indices), PROBE_BLOCK, world):
        yield normalise(images.pixels[indices[start:stop]])


def _build_model(config: RunConfig, splits: catalog.Splits, world: World) -> nn.Module:
    """The network with the weights that the seed gives it, on this rank's device.

    Raises:
        UsageError: if there is no such model, or its output does not match the images and classes.
    """
    torch.manual_seed(int(stream(config.seed, 0).integers(2**62)))
    dtype = getattr(torch, config.train.dtype)
    model = models.build(
        config.model.name,
        num_classes=splits.num_classes,
        in_channels=splits.in_channels,
        image_size=config.data.image_size,
        widths=config.model.widths,
        ghost_size=config.batch.ghost_size,
    ).to(world.device, dtype)
    images = Normalise(splits, world.device, dtype)(splits.train.pixels[:2].to(world.device))
    with observing(model):
        try:
            logits = model(images)
        except RuntimeError as error:
            raise UsageError(
                f"model.name ({config.model.name}) cannot take images of {list(images.shape[1:])} "
                f"({str(error).splitlines()[0]}): change the model, or data.image_size"
            ) from None
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != [len(images), splits.num_classes]:
        raise UsageError(
            f"model.name ({config.model.name}) puts out {shape} for {len(images)} images, "
            f"needs {[len(images), splits.num_classes]}: its last layer must have one unit for each of the classes"
        )
    return model
