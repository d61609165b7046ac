"""Which layers the probe of a run measures, and with how many samples for each unit: known before the first step."""

import warnings
from typing import NamedTuple

from torch import Tensor, nn

from gengap_dist.config.metric_key import LayerKey
from gengap_dist.config.sections import ProbeConfig
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.layer_view import build_layer_views
from gengap_dist.probes.layers import last_hidden_layer, select_layers

MIN_SAMPLES = 1_024
ROWS_PER_UNIT = 8  # of the probe set that `auto` chooses; near-rank loss is then nearly that of many more samples
FEW_ROWS_PER_UNIT = 4  # below it, near-rank loss depends much on the number of samples
SAMPLES_STEP = 128
MAX_INPUT_BYTES = 2**30  # of the probe set that `auto` chooses


class ProbedLayers(NamedTuple):
    """The measured layers of a network."""

    last_hidden: str | None = None
    """Name of the last one before the output of the network; None: there is none."""
    shapes: dict[str, tuple[int, int]] = {}
    """Layer key, see `config.metric_key`, to rows of one sample and number of units."""

    def samples_per_unit(self, num_samples: int) -> dict[str, float]:
        """N / D by layer key: rows of the matrix of `num_samples` samples, for each of its columns.

        >>> ProbedLayers("fc", {"conv/channel": (4, 2), "fc": (1, 100)}).samples_per_unit(50)
        {'conv/channel': 100.0, 'fc': 0.5}
        """
        return {key: round(num_samples * rows / units, 3) for key, (rows, units) in self.shapes.items()}

    def num_samples(self, rows_per_unit: int) -> int:
        """The smallest number of samples with so many rows for each unit of every matrix; `flatten` does not count.

        >>> ProbedLayers("fc", {"conv/channel": (4, 2), "fc": (1, 100), "conv/flatten": (1, 999)}).num_samples(8)
        800
        """
        counted = (shape for key, shape in self.shapes.items() if LayerKey.parse(key).view != "flatten")
        return max((-(-rows_per_unit * units // rows) for rows, units in counted), default=0)


def find_probed_layers(model: nn.Module, example: Tensor, config: ProbeConfig) -> ProbedLayers:
    """What the probe will measure of a network, from one pass of `example` [n, ...]; the network is not changed.

    A network that cannot be measured has none: its first measurement says why.
    """
    if not config.enabled:
        return ProbedLayers()
    with warnings.catch_warnings(), eval_context(model):
        warnings.simplefilter("ignore")  # the first measurement warns
        try:
            layers = select_layers(model, example, config.layers)
            views = build_layer_views(layers, config.views, 1)
            last = last_hidden_layer(model, example, layers)
        except Exception:  # of any network
            return ProbedLayers()
    shapes = {LayerKey(view.layer.name, view.view).format(): (view.rows_per_input, view.num_units) for view in views}
    return ProbedLayers(last, shapes)


def probe_set_sizes(config: ProbeConfig, layers: ProbedLayers, sample_bytes: int, num_train: int) -> list[int]:
    """Sizes of the probe sets of a run in ascending order, without repetition: the last is that of the probe set.

    Args:
        config: with numbers of samples, or `auto`.
        layers: the measured layers.
        sample_bytes: of one input.
        num_train: samples of the training set, of which no set has more.

    >>> wide = ProbedLayers("fc", {"fc": (1, 300)})
    >>> probe_set_sizes(ProbeConfig(), wide, 4_096, 50_000), probe_set_sizes(ProbeConfig(), wide, 4_096, 1_294)
    ([2432], [1294])
    >>> probe_set_sizes(ProbeConfig(num_samples=(64, 4_000)), wide, 4_096, 1_294)
    [64, 1294]
    """
    wanted = -(-max(MIN_SAMPLES, layers.num_samples(ROWS_PER_UNIT)) // SAMPLES_STEP) * SAMPLES_STEP
    automatic = min(wanted, max(MIN_SAMPLES, MAX_INPUT_BYTES // sample_bytes))
    return sorted({min(automatic if size == "auto" else size, num_train) for size in config.num_samples})


def warn_of_sizes(config: ProbeConfig, layers: ProbedLayers, num_samples: int, num_train: int) -> None:
    """Warn of a training set that is smaller than the probe set asked for, and of few samples for each unit."""
    asked = max((size for size in config.num_samples if size != "auto"), default=0)
    if asked > num_train:
        warnings.warn(
            f"probe.num_samples ({asked:,}) is more than the {num_train:,} training samples: all of them are measured",
            stacklevel=3,
        )
    few = {key: rows for key, rows in layers.samples_per_unit(num_samples).items() if rows < FEW_ROWS_PER_UNIT}
    if few:
        worst = min(few, key=lambda key: few[key])
        rows, units = layers.shapes[worst]
        needed = -(-FEW_ROWS_PER_UNIT * units // rows)
        remedy = f"set probe.num_samples={needed:,}" if needed <= num_train else "compare equal probe sets only"
        warnings.warn(
            f"few samples for each unit: the probe set of {num_samples:,} gives {worst} a matrix with {few[worst]:g} "
            f"rows for each of its {units:,} columns, and near-rank loss depends on the number of "
            f"samples below {FEW_ROWS_PER_UNIT}: {remedy}",
            stacklevel=3,
        )
