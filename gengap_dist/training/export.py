"""Exports the network of a run as a graph (torch.export): inputs as they are stored in, outputs of the network out.

The format is not a pickle: it loads without this package, loading executes no code, and the number of samples is
dynamic. Normalisation is part of the graph. The model is the one that was evaluated at the end of the run, in eval
mode: the last weights, or their average if the algorithm averages weights.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gengap_dist import models
from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.loading import validate
from gengap_dist.config.own_code import own_code
from gengap_dist.config.sections import RunConfig
from gengap_dist.data.datasets import recorded_spec
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.runs import checkpoint
from gengap_dist.runs.links import check_links
from gengap_dist.runs.run_folder import read_info
from gengap_dist.runs.schema import ExportedModel, TensorDescription

FILE = "model/model.pt2"  # in the run folder

Settings = RunConfig | dict[str, Any]


class Scorer(nn.Module):
    """Inputs as float32 (of pixels, grey levels 0 to 255), tokens as int64, to the outputs of the network."""

    def __init__(self, network: nn.Module, pixels: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        """`network`, which computes in `dtype`; for images with mean and standard deviation of `pixels`, [C] each."""
        super().__init__()
        self.network, self.dtype, self.is_normalised = network, dtype, pixels is not None
        if pixels is not None:
            mean, std = (values.to(dtype)[:, None, None] for values in pixels)
            self.register_buffer("mean", mean)
            self.register_buffer("scale", 1 / std)

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, ...] to [n, ...]."""
        if inputs.dtype != torch.int64:  # tokens
            inputs = inputs.to(self.dtype)
        if self.is_normalised:
            inputs = (inputs - self.get_buffer("mean")) * self.get_buffer("scale")
        return self.network(inputs)


def load_network(folder: Path | str, *, own_model: str | None = None) -> nn.Module:
    """The network of the run in `folder` at its last checkpoint, in eval mode, on the CPU.

    It receives inputs as in training: images normalised. One of `transformers:NAME` has `save_pretrained`.

    Args:
        folder: the run folder.
        own_model: if the network is code of a user, its `module.path:factory`, as a word that it may be executed.

    Raises:
        UsageError: if there is no run or no undamaged checkpoint, or the network cannot be built or needs `own_model`.
    """
    folder = Path(folder)
    check_links(folder)
    info = read_info(folder)
    config = validate(RunConfig, info.config)
    if (name := own_code({"model": {"name": config.model.name}}).get("model.name")) not in (None, own_model):
        raise UsageError(
            f"model.name ({name}) is code that {folder} names, and nothing in a folder is executed without your word: "
            f"if you trust it, add own_model={name!r}"
        )
    path = checkpoint.latest(folder / "checkpoints", warnings.warn)
    if path is None or info.data is None:
        raise UsageError(f"{folder} has no checkpoint yet: train the run, or give the folder of another")
    return _restored(path, config, info.data).eval()


def _restored(path: Path, config: RunConfig, data: dict[str, Any]) -> nn.Module:
    """The network that a checkpoint stands for, in training mode, on the CPU."""
    network = models.from_config(config, recorded_spec(data), World()).to(getattr(torch, config.train.dtype))
    checkpoint.restore(network, checkpoint.evaluated_state(path / "model.pt"), path)
    return network


def scorer(folder: Path, config: RunConfig, data: dict[str, Any], num_steps: int) -> Scorer:
    """The network of the run in `folder` after its last step, in eval mode, on the CPU.

    Raises:
        UsageError: if there is no complete checkpoint of that step, or the network cannot be built.
    """
    path = checkpoint.checkpoints_by_step(folder / "checkpoints").get(num_steps)
    if path is None or checkpoint.describe_damage(path):
        raise UsageError(f"{folder} has no complete checkpoint of its last step")
    pixels = (torch.tensor(data["mean"]), torch.tensor(data["std"])) if "mean" in data else None
    return Scorer(_restored(path, config, data), pixels, getattr(torch, config.train.dtype)).eval()


def export(folder: Path, settings: Settings, data: dict[str, Any], num_steps: int) -> ExportedModel:
    """Write the graph of the run in `folder` after its last step to model/model.pt2.

    Args:
        folder: the run folder.
        settings: the config of the run.
        data: see `datasets.summary`.
        num_steps: number of steps of the run.

    Raises:
        Exception: any error while the network is built or traced.
    """
    config = RunConfig.model_validate(settings)
    model = scorer(folder, config, data, num_steps)
    path, spec = folder / FILE, recorded_spec(data)
    path.parent.mkdir(exist_ok=True)
    inputs = spec.zero_inputs(2, torch.float32)  # 2 samples: torch.export would specialise a batch of 1
    with warnings.catch_warnings(), fast_imports():  # the first export imports the compiler
        warnings.simplefilter("ignore")
        graph = torch.export.export(model, (inputs,), dynamic_shapes=[{0: torch.export.Dim.AUTO}])
        torch.export.save(graph, path)
    return ExportedModel(
        file=FILE,
        torch=torch.__version__,
        input=TensorDescription(dtype=str(inputs.dtype).removeprefix("torch."), shape=[-1, *spec.input_shape]),
        output=TensorDescription(dtype=config.train.dtype, shape=[-1, *spec.output_shape]),
        metadata={
            "input": "pixels, grey levels 0 to 255, not normalised" if spec.is_image else "as in the data set",
            "output": "logits" if spec.num_classes else "as the targets of the data set",
        },
    )


def try_export(folder: Path, settings: Settings, data: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """What run.json says about the exported model of a run: `model`, or in `model_error` why there is none."""
    try:
        return {"model": export(folder, settings, data, num_steps)}
    except Exception as error:  # with a user's own model torch.export may raise anything
        return {"model_error": " ".join(f"{type(error).__name__}: {error}".split())}
