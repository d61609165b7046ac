"""Train on two ranks of this machine, from Python: the result is that of one rank.

python examples/train_on_two_ranks.py [OUT]
"""

import sys
from pathlib import Path

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.launchers import LocalLauncher
from gengap_dist.training import ENTRY_POINT

SETTINGS = {
    "model.name": "lenet5",
    "batch.global_size": 256,
    "train.steps": 20,
    "train.dtype": "float64",  # so that the difference below is that of rounding in float64
    "probe.num_samples": [256],
    "mlflow.enabled": False,
}


def show(done: int, total: int, note: str) -> None:
    """Called after every step."""
    if note or done == total:
        print(f"step {done}/{total} {note}")


def main(out: Path) -> None:
    config, losses = validate(RunConfig, nested(SETTINGS)), []
    for num_ranks in (1, 2):
        launcher = LocalLauncher(num_ranks, ENTRY_POINT)  # ranks start once, and may do many runs
        try:
            result = launcher.run(config, out / f"{num_ranks}_ranks", resume=False, progress=show)
        finally:
            launcher.close()
        losses.append(result["test/loss"])
        print(f"{num_ranks} rank(s): test accuracy {result['test/accuracy']:.1%}, test loss {losses[-1]:.12f}")
    print(f"difference of the test losses: {abs(losses[0] - losses[1]):.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two_ranks"))
