"""Exports the network of a finished run as an MLflow model: pixels in, logits out.

The format is an exported graph (torch.export), not a pickle: it loads without this package, loading executes no code,
and the number of images is dynamic. Normalisation is part of the graph. The model is the one that was evaluated at the
end of the run, in eval mode: the last weights, or their average if the algorithm averages weights.
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
from gengap_dist.data.datasets import recorded_spec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint


class Scorer(nn.Module):
    """Pixels [n, C, H, W], grey levels 0 to 255 as float32, to logits [n, num_classes]."""

    def __init__(self, network: nn.Module, mean_C: Tensor, std_C: Tensor) -> None:
        """`network` with the normalisation of its training."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean_C[:, None, None])
        self.register_buffer("scale", 1 / std_C[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, C, H, W] to [n, num_classes]."""
        mean, scale = self.get_buffer("mean"), self.get_buffer("scale")
        return self.network((pixels.to(mean.dtype) - mean) * scale)


def scorer(folder: Path, info: dict[str, Any]) -> Scorer:
    """The network of the run in `folder`, from its last checkpoint, in eval mode, on the CPU.

    Raises:
        UsageError: if there is no complete checkpoint of the last step, or the network cannot be built.
    """
    config, data = RunConfig.model_validate(info["config"]), info["data"]
    if "mean" not in data:
        raise UsageError(
            f"{folder} does not contain the normalisation of its images: it was written by an older version"
        )
    path = checkpoint.latest(folder / "checkpoints", report=lambda message: None)
    if path is None or int(path.name.removeprefix("step_")) != info["result"]["num_steps"]:
        raise UsageError(f"{folder} has no complete checkpoint of its last step")
    network = models.from_config(config, recorded_spec(data), World())
    dtype = getattr(torch, config.train.dtype)
    checkpoint.restore(network.to(dtype), checkpoint.evaluated_state(path / "model.pt"), path)
    return Scorer(network, torch.tensor(data["mean"]).to(dtype), torch.tensor(data["std"]).to(dtype)).eval()


@cache
def prepare() -> Callable[..., None]:
    """Import the modules that `export` needs, which takes longer than the export; returns MLflow's save_model."""
    # MLflow imports pytorch_lightning for autologging, with many dependencies
    with fast_imports("pytorch_lightning"):
        from mlflow.pytorch import save_model
        from mlflow.utils import requirements_utils

        warmup_program = torch.export.export(nn.Identity(), (torch.ones(2),))  # imports the remaining modules
        torch.export.save(warmup_program, io.BytesIO())
    # MLflow would read the files of all installed packages to warn about missing requirements; here none is missing.
    if getattr(requirements_utils, "_MODULES_TO_PACKAGES", {}) is None:
        requirements_utils._MODULES_TO_PACKAGES = {}
    return save_model


def export(folder: Path, info: dict[str, Any], to: Path, **about: Any) -> None:
    """Write the run's model with its signature into the new folder `to`.

    Args:
        folder: the run folder.
        info: its run.json.
        to: folder for MLflow's files.
        about: further fields of the MLflow model description (run_id, model_id).

    Raises:
        Exception: any error while the network is built or traced.
    """
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    save_model = prepare()
    model, data = scorer(folder, info), info["data"]
    pixels = np.zeros((2, *data["shape"]), np.float32)  # 2 images: torch.export would specialise a batch of 1
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
