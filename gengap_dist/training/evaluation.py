"""Evaluates a network on a set of images, with the same result on any number of ranks."""

import math
import time
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gengap_dist.config.sections import TrainConfig
from gengap_dist.data.batch_loader import Normalise
from gengap_dist.data.datasets import Images, Splits
from gengap_dist.distributed.batch_plan import blocks
from gengap_dist.distributed.process_group import World
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.cadence import evenly
from gengap_dist.training.setup import Diverged
from gengap_dist.training.state import TrainState

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


@final
class Evaluator:
    """Validates during a run, keeps the best network, and evaluates the last and the best one at the end."""

    def __init__(
        self, config: TrainConfig, splits: Splits, normalise: Normalise, world: World, state: TrainState
    ) -> None:
        """Evaluate on `splits`, which are on this rank's device, while `state` changes."""
        self.config, self.splits, self.normalise, self.world, self.state = config, splits, normalise, world, state
        self.planned = evenly(config.num_evals, state.num_steps)
        """Whether a validation pass is planned after a number of steps."""
        self.seconds = 0.0
        """Seconds of all validation passes."""
        self.best: dict[str, Any] = {}
        """`step`, `accuracy` on the validation images, and `model`, a state dict; empty before the first validation."""
        self.target_step: int | None = None
        """The step at which train.target_accuracy was reached."""

    def due(self) -> bool:
        """Whether to validate now."""
        return len(self.splits.val) > 0 and (self.state.at_first_or_last or self.planned(self.state.step))

    def validate(self, model: nn.Module) -> Score:
        """Evaluate on the validation images, and keep the model if it is the best so far. Collective.

        Ends the run at this step if train.target_accuracy is reached and train.stop_at_target is set.
        """
        start_time = time.monotonic()
        score = self._score(model, self.splits.val)
        if score.accuracy > self.best.get("accuracy", -1.0):
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            self.best = {"step": self.state.step, "accuracy": score.accuracy, "model": weights}
        target = self.config.target_accuracy
        if self.target_step is None and target is not None and score.accuracy >= target:
            self.target_step = self.state.step
            self._stop_at_target()
        self.seconds += time.monotonic() - start_time
        return score

    def _stop_at_target(self) -> None:
        if self.config.stop_at_target and self.target_step is not None:
            self.state.num_steps = self.target_step

    def final_scores(self, model: nn.Module) -> dict[str, float]:
        """Metrics of the last and of the best model on the test images, which are used only here. Collective.

        Raises:
            Diverged: if the loss on the training images is not finite.
        """
        train, test = self._score(model, self.splits.train), self._score(model, self.splits.test)
        if not math.isfinite(train.loss):  # the loss of a step belongs to the weights before it
            raise Diverged(self.state.step, train.loss, "train_full/loss")
        scores = {
            "train_full/loss": train.loss,
            "train_full/accuracy": train.accuracy,
            "test/loss": test.loss,
            "test/accuracy": test.accuracy,
            "train_test_gap": train.accuracy - test.accuracy,
        }
        if self.best:
            # `model` is for reading, and torch's functional_call changes a layer that has two names
            best_model = deepcopy(model)
            best_model.load_state_dict(self.best["model"])
            scores["test_at_best_val/accuracy"] = self._score(best_model, self.splits.test).accuracy
        return scores

    def _score(self, model: nn.Module, images: Images) -> Score:
        return evaluate(model, images, self.normalise, self.world)

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
