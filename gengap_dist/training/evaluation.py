"""Evaluates a network on a set of samples, with the same result on any number of ranks."""

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from gengap_dist.config.sections import TrainConfig
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.datasets import Samples, Splits
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.cadence import evenly
from gengap_dist.training.setup import Diverged
from gengap_dist.training.state import TrainState
from gengap_dist.training.tasks import Task

EVAL_BLOCK = (
    250  # samples in one pass; blocks are not split between ranks, so the result does not depend on their number
)


TO_TARGET = ("updates_to_target", "epochs_to_target")  # None if it was not reached
Score = dict[str, float]
"""Metrics of a set of samples, `loss` first, by the names that `Task.metrics` gives."""


@final
class BlockSums:
    """A task's sums over samples that pass through a network in blocks; identical on any number of ranks.

    The sums of each block have their own row in one tensor, which is summed over ranks and then over blocks. So the
    order of additions does not depend on the number of ranks either.
    """

    def __init__(self, task: Task, num_samples: int, block_size: int, world: World, *, each: bool = False) -> None:
        """For `num_samples` samples in blocks of `block_size`; with `each`, also which samples are right."""
        self.task, self.block_size, self.world, self.each = task, block_size, world, each
        num_blocks = -(-num_samples // block_size)
        self._sums = torch.zeros(num_blocks, 4, dtype=torch.float64, device=world.device)
        self._correct = torch.zeros(num_samples if each else 0, dtype=torch.uint8, device=world.device)
        self._is_each_known = False

    def add(self, start: int, outputs: Tensor, targets: Tensor) -> None:
        """Add the block of this rank whose first sample is `start`."""
        row = self._sums[start // self.block_size]
        row[0] = self.task.loss_sum(outputs.double(), targets)
        row[1] = self.task.metric_sum(outputs, targets)
        row[2] = self.task.num_targets(targets).sum()
        if self.each and (correct := self.task.correct(outputs, targets)) is not None:
            row[3].fill_(1.0)
            self._correct[start : start + len(targets)] = correct

    def score(self) -> Score:
        """The task's metrics over all samples, each counted once. Collective."""
        totals = self.world.all_reduce_to_cpu(self._sums, "scores").sum(0)
        loss, metric, num_targets, num_known = totals.tolist()
        self._is_each_known = self.each and num_known == len(self._sums)
        return self.task.metrics(loss / num_targets, metric / num_targets)

    def correct(self) -> np.ndarray | None:
        """Whether each sample is right, [N] bool; None if the task does not know. Collective, after `score`."""
        if not self._is_each_known:
            return None
        return self.world.all_reduce_to_cpu(self._correct, "right samples").bool().numpy()


def evaluate(model: nn.Module, samples: Samples, preprocess: Preprocess, task: Task, world: World) -> Score:
    """The task's metrics over all `samples`, each counted once; identical on any number of ranks. Collective."""
    sums = BlockSums(task, len(samples), task.spec.block_size(EVAL_BLOCK), world)
    add_blocks(sums, model, samples, preprocess)
    return sums.score()


def add_blocks(sums: BlockSums, model: nn.Module, samples: Samples, preprocess: Preprocess) -> None:
    """Pass this rank's blocks of `samples` through a network, and add them to `sums`."""
    own_blocks = blocks(len(samples), sums.block_size, sums.world)
    with eval_context(model):
        for number, (start, stop) in enumerate(own_blocks, 1):
            inputs = preprocess(samples.inputs[start:stop])
            for next_block in own_blocks[number : number + 1]:
                samples.prefetch(torch.arange(*next_block))  # read while this block computes
            sums.add(start, model(inputs), samples.targets[start:stop])


@final
class Evaluator:
    """Validates during a run, keeps the best network, and evaluates the last and the best one at the end.

    Only validations that are planned choose the best network and notice the target: `validate`. Those that go with
    measurements of probes are recorded and nothing else (`score_validation`), so that no result depends on `probe`.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        splits: Splits,
        preprocess: Preprocess,
        world: World,
        state: TrainState,
    ) -> None:
        """Evaluate `task` on `splits`, which are on this rank's device, while `state` changes."""
        self.config, self.task, self.splits, self.preprocess = config, task, splits, preprocess
        self.world, self.state = world, state
        self.planned = evenly(config.num_evals, state.num_steps)
        """Whether a validation pass is planned after a number of steps."""
        self.seconds = 0.0
        """Seconds of all planned validations."""
        self.best: dict[str, Any] = {}
        """`step`, the task's metric on the validation samples by its name, and `model`, a state dict; empty before the
        first validation."""
        self.target_step: int | None = None
        """The step at which train.target_accuracy or train.target_loss was reached."""
        self.test_correct: np.ndarray | None = None
        """Whether the last network is right about each test sample, [M] bool, after `final_scores`; None: not known."""

    def due(self) -> bool:
        """Whether to validate now."""
        return len(self.splits.val) > 0 and (self.state.at_first_or_last or self.planned(self.state.step))

    def validate(self, model: nn.Module) -> Score:
        """Evaluate on the validation samples, and keep the model if it is the best so far. Collective.

        Ends the run at this step if the target is reached and train.stop_at_target is set.

        Raises:
            UsageError: if the untrained network is at train.target_loss.
        """
        start_time = time.monotonic()
        score = self._score(model, self.splits.val)
        metric = self.task.metric
        value = score[metric.name]
        if not math.isnan(value) and (not self.best or metric.is_better(value, self.best[metric.name])):
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            self.best = {"step": self.state.step, metric.name: value, "model": weights}
        if self.target_step is None and self._is_at_target(score):
            self.target_step = self.state.step
            self._stop_at_target()
        self.seconds += time.monotonic() - start_time
        return score

    def score_validation(self, model: nn.Module) -> Score:
        """The score on the validation samples, without consequences; {} if there are none. Collective."""
        return self._score(model, self.splits.val) if len(self.splits.val) else {}

    def _is_at_target(self, score: Score) -> bool:
        accuracy, loss = self.config.target_accuracy, self.config.target_loss
        if loss is None:
            return accuracy is not None and score["accuracy"] >= accuracy
        if score["loss"] <= loss and not self.state.step:
            raise UsageError(
                f"train.target_loss ({loss:g}) is not below the validation loss of the untrained network, "
                f"{score['loss']:.4g}: choose a smaller loss, or null"
            )
        return score["loss"] <= loss

    def _stop_at_target(self) -> None:
        if self.config.stop_at_target and self.target_step is not None:
            self.state.num_steps = self.target_step

    def final_scores(self, model: nn.Module) -> dict[str, float]:
        """Metrics of the last and of the best model on the test samples, which are used only here. Collective.

        `train_test_gap` is positive if the metric is better on the training samples.

        Raises:
            Diverged: if the loss on the training samples is not finite.
        """
        train = self._score(model, self.splits.train)
        block_size = self.task.spec.block_size(EVAL_BLOCK)
        of_each = BlockSums(self.task, len(self.splits.test), block_size, self.world, each=True)
        add_blocks(of_each, model, self.splits.test, self.preprocess)
        test, self.test_correct = of_each.score(), of_each.correct()
        if not math.isfinite(train["loss"]):  # the loss of a step belongs to the weights before it
            raise Diverged(self.state.step, train["loss"], "train_full/loss")
        scores = {f"train_full/{name}": value for name, value in train.items()}
        scores |= {f"test/{name}": value for name, value in test.items()}
        metric = self.task.metric
        sign = 1 if metric.higher_is_better else -1
        scores["train_test_gap"] = sign * (train[metric.name] - test[metric.name])
        if self.best:
            # `model` is for reading, and torch's functional_call changes a layer that has two names
            best_model = deepcopy(model)
            best_model.load_state_dict(self.best["model"])
            scores[f"test_at_best_val/{metric.name}"] = self._score(best_model, self.splits.test)[metric.name]
        return scores

    def _score(self, model: nn.Module, samples: Samples) -> Score:
        return evaluate(model, samples, self.preprocess, self.task, self.world)

    def summary(self, epochs_done: Callable[[int], float]) -> dict[str, Any]:
        """What the result says: the best validation, the way to the target (if there is one), and seconds.

        Args:
            epochs_done: epochs after a number of steps.
        """
        target: dict[str, Any] = {}
        if self.config.has_target:
            reached = self.target_step
            target = dict(zip(TO_TARGET, (reached, None if reached is None else epochs_done(reached)), strict=True))
        name = self.task.metric.name
        best = {"best_val_step": self.best.get("step"), f"best_val/{name}": self.best.get(name)}
        return best | target | {"eval_seconds": round(self.seconds, 3)}

    def state_dict(self) -> dict[str, Any]:
        """The state without the best model's weights."""
        best = {key: value for key, value in self.best.items() if key != "model"}
        return {"best": best, "target_step": self.target_step, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any], best_weights: Mapping[str, Tensor]) -> None:
        """Continue from `state`, and the weights of the best model (empty if there is none)."""
        self.best, self.target_step, self.seconds = dict(state["best"]), state["target_step"], state["seconds"]
        if self.best:
            self.best["model"] = dict(best_weights)
        self._stop_at_target()
