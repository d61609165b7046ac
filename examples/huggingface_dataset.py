"""Train on a Hugging Face data set: rows of two interleaved spirals, made here (pip install datasets).

    python examples/huggingface_dataset.py [OUT]

A set from a file or from the Hub is used in the same way: rename its columns to inputs and targets.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.training.trainer import run

SETTINGS = {
    "data.name": "huggingface_dataset:spirals", "model.name": "mlp", "model.widths": [64, 64], "model.norm": "none",
    "optim.lr": 0.2, "train.epochs": 20, "mlflow.enabled": False,
}  # fmt: skip


def spirals() -> Any:  # what data.name names: a datasets.DatasetDict
    from datasets import Dataset

    rng = np.random.default_rng(0)
    label, angle = rng.integers(0, 2, 1_500), rng.uniform(1, 7, 1_500)
    points = np.stack([np.cos(angle + np.pi * label), np.sin(angle + np.pi * label)], 1) * angle[:, None] / 4
    rows = Dataset.from_dict({"point": points + rng.normal(0, 0.03, points.shape), "spiral": label})
    rows = rows.rename_columns({"point": "inputs", "spiral": "targets"})
    return rows.with_format("numpy").train_test_split(test_size=0.2, seed=0)


if __name__ == "__main__":
    result = run(validate(RunConfig, nested(SETTINGS)), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/spirals"))
    print(f"spirals: test accuracy {result['test/accuracy']:.1%} after {result['num_steps']} steps")
