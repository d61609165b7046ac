"""Add a training algorithm without changing the package: Lookahead (Zhang et al. 2019, arXiv 1907.08610), on two ranks.

    python examples/own_algorithm.py [OUT]

Every K steps the weights go back to a + ALPHA (w - a), where a are the weights after the last such step: w = a then.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.launchers import LocalLauncher
from gengap_dist.training import trainer
from gengap_dist.training.algorithms import AlgorithmSetup, TrainingAlgorithm
from gengap_dist.training.step_metrics import StepResult

K, ALPHA = 5, 0.5
SETTINGS = {"train.steps": 60, "batch.global_size": 256, "mlflow.enabled": False, "probe.num_samples": [256]}


class Lookahead(TrainingAlgorithm):
    """Plain steps, and a step back every K of them. All ranks have the same weights, so nothing is communicated."""

    def __init__(self, setup: AlgorithmSetup) -> None:
        super().__init__(setup)
        self.anchor = [parameter.detach().clone() for parameter in self.strategy.model.parameters()]

    def step(self, step: int, lr: float, momentum: float) -> StepResult:
        result = super().step(step, lr, momentum)
        if (step + 1) % K == 0:
            with torch.no_grad():
                for parameter, anchor in zip(self.strategy.model.parameters(), self.anchor, strict=True):
                    anchor.lerp_(parameter, ALPHA)
                    parameter.copy_(anchor)
        return result

    def state(self) -> dict[str, Any]:  # saved in checkpoints, so that a run can be resumed
        return {"anchor": self.anchor}

    def load(self, state: Mapping[str, Any]) -> None:
        self.anchor = [anchor.clone() for anchor in state["anchor"]]


run = partial(trainer.run, build_algorithm=Lookahead)  # what every rank executes


def main(out: Path) -> None:
    launcher = LocalLauncher(2, "own_algorithm:run")
    try:
        result = launcher.run(validate(RunConfig, nested(SETTINGS)), out, resume=False, progress=lambda *about: None)
    finally:
        launcher.close()
    print(f"Lookahead: test accuracy {result['test/accuracy']:.1%} after {result['num_steps']} steps; see {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lookahead"))
