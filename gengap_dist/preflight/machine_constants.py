"""Constants of the time model for a machine: a JSON file, by default in the user's cache folder.

The file is written by `calibrate` or by hand. Sizes found by batch.micro_size=auto are in `training.autotune.cache`.
"""

import json
from pathlib import Path

from pydantic import NonNegativeFloat

from gengap_dist.config.loading import validate
from gengap_dist.config.sections import FrozenModel, RunConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.runs.own_files import default_path, read_own, write_own
from gengap_dist.runs.run_folder import write_atomically


class LinkConstants(FrozenModel):
    """A link's latency and bandwidth."""

    alpha: NonNegativeFloat
    """Seconds per message."""
    beta: NonNegativeFloat
    """Seconds per byte of one rank."""


class ComputeConstants(FrozenModel):
    """Compute time of a rank."""

    seconds_per_sample: NonNegativeFloat
    """Forward and backward of one sample."""
    seconds_per_update: NonNegativeFloat
    """Gradient norm and optimizer step."""


class Constants(FrozenModel):
    """Constants of a machine; unknown ones are null."""

    where: str = ""
    """Description of the measured machine."""
    inside: LinkConstants | None = None
    """Between the ranks of one node."""
    between: LinkConstants | None = None
    """Between nodes: not measured by this program, read from a file."""
    compute: dict[str, ComputeConstants] = {}
    """Compute constants by `workload_name`."""


def workload_name(config: RunConfig, spec: DataSpec, micro_size: int) -> str:
    """Name of the computation of one micro-batch.

    >>> workload_name(RunConfig(), DataSpec.images(num_classes=10, in_channels=1), 64)
    'lenet5 1x32x32 float32 sgd micro_size=64'
    """
    model, shape = config.model, "x".join(map(str, spec.input_shape))
    sizes = {"mlp": model.widths, "gpt": (model.depth, model.width, model.heads)}.get(model.name)
    sizes = sizes or [f"{key}={value}" for key, value in model.options.items()]
    words = [model.name + (f"[{','.join(map(str, sizes))}]" if sizes else "")]
    words += [shape, config.train.autocast or config.train.dtype, *config.data.augment]
    words += [f"norm={config.norm}{config.batch.ghost_size or ''}"] if config.norm != "local" else []
    words += [
        name
        for name in ("channels_last", "compile", "activation_checkpointing", "deterministic")
        if getattr(config.train, name)
    ]
    return " ".join([*words, config.optim.name, f"micro_size={micro_size}"])


def load(path: Path | None) -> Constants:
    """The constants in `path`, or in the user's cache folder, which may not exist yet.

    Raises:
        UsageError: if the given file is missing, a file does not contain constants, or others may have written that in
            the cache folder.
    """
    file = path or default_path()
    try:
        if path is None and not file.exists():
            return Constants()
        return validate(Constants, json.loads(file.read_bytes() if path else read_own(file)))
    except OSError as error:
        raise UsageError(
            f"--constants ({file}) cannot be read: {error.strerror}; give the path of a JSON file"
        ) from None
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--constants ({file}) does not contain constants ({error}): measure them with --calibrate"
        ) from None


def save(constants: Constants, path: Path | None) -> str:
    """Write constants to `path`, or to the user's cache folder; returns why they could not be written, if so."""
    file, content = path or default_path(), json.dumps(constants.model_dump(mode="json"), indent=1) + "\n"
    try:
        if path is None:
            write_own(file, content)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    except OSError as error:
        return f"{file} cannot be written ({error.strerror}): the constants are used now, and the next plan has none"
    return ""
