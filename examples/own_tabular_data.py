"""Train on a table of your own: breast cancer, 569 tumours with 30 measured columns (scikit-learn).

    python examples/own_tabular_data.py [OUT]

The same from the command line, in this folder: gengap train --data.name own_tabular_data:tumours --model.name mlp
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.training.trainer import run

SETTINGS = {
    "data.name": "own_tabular_data:tumours", "model.name": "mlp", "model.widths": [32], "model.norm": "none",
    "train.epochs": 20, "mlflow.enabled": False,
}  # fmt: skip


def tumours() -> dict[str, tuple[np.ndarray, np.ndarray]]:  # what data.name names
    from sklearn.datasets import load_breast_cancer

    table: Any = load_breast_cancer()
    columns, is_benign = table.data, table.target
    order = np.random.default_rng(0).permutation(len(columns))
    train, test = order[:450], order[450:]
    columns = (columns - columns[train].mean(0)) / columns[train].std(0)
    # without "val", data.val_fraction of the training rows are held out
    return {"train": (columns[train], is_benign[train]), "test": (columns[test], is_benign[test])}


if __name__ == "__main__":
    result = run(validate(RunConfig, nested(SETTINGS)), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tumours"))
    print(f"tumours: test accuracy {result['test/accuracy']:.1%} after {result['num_steps']} steps")
