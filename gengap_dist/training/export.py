"""A finished run's network as a model that MLflow serves: pixels in, logits out.

It is kept as an exported graph (torch.export), not as a pickle: it loads without this package and its classes, loading
it executes nothing, and the number of images is free. Normalisation is part of it, so nobody has to know the training
images' mean. What it computes is what the run was scored with: its last weights, or their average where the algorithm
has one, in eval mode.
"""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint


class Scorer(nn.Module):
    """Pixels [n, C, H, W], grey levels 0 to 255 as float32, to logits [n, num_classes]."""

    def __init__(self, network: nn.Module, mean_C: Tensor, std_C: Tensor) -> None:
        """`network` behind the normalisation it was trained with."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean_C[:, None, None])
        self.register_buffer("scale", 1 / std_C[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, C, H, W] to [n, num_classes]."""
        mean, scale = self.get_buffer("mean"), self.get_buffer("scale")
        return self.network((pixels.to(mean.dtype) - mean) * scale)


def scorer(folder: Path, info: dict[str, Any]) -> Scorer:
    """The network of the run in `folder`, as its last checkpoint has it, in eval mode, on the CPU.

    Raises:
        UsageError: if there is no whole checkpoint, or the network cannot be built.
    """
    config, data = RunConfig.model_validate(info["config"]), info["data"]
    if "mean" not in data:
        raise UsageError(f"{folder} does not say how its images were normalised: it was written by an older version")
    path = checkpoint.latest(folder / "checkpoints", tell=lambda message: None)
    if path is None or int(path.name.removeprefix("step_")) != info["result"]["num_steps"]:
        raise UsageError(f"{folder} has no whole checkpoint of its last step")
    network = models.from_config(config, data["num_classes"], data["shape"][0], World())
    dtype = getattr(torch, config.train.dtype)
    checkpoint.restore(network.to(dtype), checkpoint.evaluated_state(path / "model.pt"), path)
    return Scorer(network, torch.tensor(data["mean"]).to(dtype), torch.tensor(data["std"]).to(dtype)).eval()


@cache
def prepare() -> Callable[..., None]:
    """Import what `export` needs, which takes longer than exporting; MLflow's save_model."""
    with fast_imports(
        "pytorch_lightning"
    ):  # MLflow offers to watch its training, and it brings half of what is installed
        from mlflow.pytorch import save_model
        from mlflow.utils import requirements_utils

        rehearsed = torch.export.export(nn.Identity(), (torch.ones(2),))  # which imports the rest
        torch.export.save(rehearsed, io.BytesIO())
    # It would read which files every installed package has, to warn of requirements that are not: these all are.
    if getattr(requirements_utils, "_MODULES_TO_PACKAGES", {}) is None:
        requirements_utils._MODULES_TO_PACKAGES = {}
    return save_model


def export(folder: Path, info: dict[str, Any], to: Path, **about: Any) -> None:
    """Write the run's model with its signature into the new folder `to`.

    Args:
        folder: the run's.
        info: its run.json.
        to: where MLflow's files go.
        about: what else MLflow's own description of it says (run_id, model_id).

    Raises:
        Exception: whatever keeps a network from being built or traced.
    """
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    save_model = prepare()
    model, data = scorer(folder, info), info["data"]
    pixels = np.zeros((2, *data["shape"]), np.float32)  # two: one image would be traced as the only number there is
    logits_dtype = np.dtype(info["config"]["train"]["dtype"])
    save_model(
        model,
        str(to),
        mlflow_model=Model(**about),
        signature=ModelSignature(
            Schema([TensorSpec(pixels.dtype, (-1, *data["shape"]))]),
            Schema([TensorSpec(logits_dtype, (-1, data["num_classes"]))]),
        ),
        input_example=pixels,
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"mlflow=={mlflow.__version__}", "numpy"],
        metadata={"input": "pixels, grey levels 0 to 255, not normalised", "output": "logits"},
    )
