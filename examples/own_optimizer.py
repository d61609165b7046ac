"""Train with an optimizer of your own: a sign step with momentum, Lion (Chen et al. 2023, arXiv 2302.06675).

    python examples/own_optimizer.py [OUT]

Every weight moves by the learning rate, up or down.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.training.trainer import run

SETTINGS = {"optim.name": "own_optimizer:lion", "optim.lr": 0.001, "optim.schedule": "cosine", "mlflow.enabled": False}


class Lion(torch.optim.Optimizer):
    """Steps along the sign of an average of gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("average", torch.zeros_like(w))
                w.sub_(torch.sign(0.9 * m + 0.1 * w.grad), alpha=group["lr"])
                m.lerp_(w.grad, 0.01)


def lion(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:  # what optim.name names
    return Lion(model.parameters(), {"lr": lr})


if __name__ == "__main__":
    result = run(validate(RunConfig, nested(SETTINGS)), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lion"))
    print(f"Lion: test accuracy {result['test/accuracy']:.1%} after {result['num_steps']} steps")
