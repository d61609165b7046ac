"""The names of metrics and of layers: put together and taken apart here and nowhere else.

A metric of a layer is `<measure>/<layer>[/<view>][/centred][/<probe set>][/<threshold>]`. The layer is the one segment
after the measure, whatever it is called: `/`, `%` and control characters in it are written as %XX, X hexadecimal. All
other names, such as `nc1` and `train/loss`, are measures without a layer, and stay as they are.
"""

import re
from functools import lru_cache
from typing import NamedTuple, Self

from gengap_dist.config.measures import LAYER_MEASURES, MEASURES, OTHER, OWN_BATCH, VIEWS, WEIGHT_VIEW, Measure
from gengap_dist.errors import UsageError

_KEY = rf"(?P<layer>.+?)(?:/(?P<view>{'|'.join((*VIEWS, WEIGHT_VIEW))}))?(?P<centred>/centred)?"
_LAYER_KEY = re.compile(_KEY, re.S)  # of old names with slashes in a layer, .+? takes as many segments as it must
_LAYER_METRIC = re.compile(
    rf"{_KEY}(?:/(?P<probe_set>n[0-9]+|{OWN_BATCH}))?(?:/(?P<threshold>(?:abs|rel)_1e-[0-9]+))?", re.S
)
_ESCAPED = re.compile(r"[/%\x00-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(r"%([0-9A-F]{2})")


class LayerKey(NamedTuple):
    """What a matrix was made of: names the spectra of a layer in files, figures and tables."""

    layer: str
    """Name of the layer, any text but the empty one."""
    view: str = ""
    """One of VIEWS or WEIGHT_VIEW; "" for [N, D]."""
    centred: bool = False
    """Whether column means were subtracted."""

    def format(self) -> str:
        """The key as text; `parse` is its inverse.

        >>> LayerKey("conv1", "pool", True).format(), LayerKey("a/b").format()
        ('conv1/pool/centred', 'a%2Fb')
        """
        layer = _ESCAPED.sub(lambda char: f"%{ord(char[0]):02X}", self.layer)
        return "/".join(filter(None, (layer, self.view, "centred" if self.centred else "")))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The key that `format` wrote.

        Raises:
            UsageError: if the text is empty.

        >>> LayerKey.parse("centred/centred"), LayerKey.parse("a%2Fb/pool")
        (LayerKey(layer='centred', view='', centred=True), LayerKey(layer='a/b', view='pool', centred=False))
        """
        if not (match := _LAYER_KEY.fullmatch(text)):
            raise UsageError(f"layer key ({text}) names no layer: give LAYER[/VIEW][/centred]")
        return cls(*_layer_parts(match))


class MetricKey(NamedTuple):
    """What a metric measures. Only a measure of layers has more than its name."""

    measure: str
    """As in config/measures.py, without its threshold; any other name if there is no layer."""
    layer: str = ""
    """Name of the layer; "" for a measure without one."""
    view: str = ""
    """As in LayerKey, and so is `centred`."""
    centred: bool = False
    probe_set: str = ""
    """n<N> or own_batch; "" for the fixed one."""
    threshold: str = ""
    """Of near-rank loss, abs_1e-<n> or rel_1e-<n>."""

    def format(self) -> str:
        """The metric's name; `parse` is its inverse.

        Raises:
            UsageError: if no name has these parts.

        >>> MetricKey("near_rank_loss", "fc2", "pool", True, "n64", "rel_1e-2").format()
        'near_rank_loss/fc2/pool/centred/n64/rel_1e-2'
        """
        key = LayerKey(self.layer, self.view, self.centred).format()
        name = "/".join(filter(None, (self.measure, key, self.probe_set, self.threshold)))
        if not name or MetricKey.parse(name) != self:
            raise UsageError(
                f"metric key ({self}) has a part that no metric has: take measures, views and probe sets that "
                "config/measures.py lists, and a layer for measures of layers only"
            )
        return name

    @classmethod
    @lru_cache(maxsize=2**16)  # a comparison asks for the same names of every run
    def parse(cls, name: str) -> Self:
        """The key of a metric's name. Old names with a slash in a layer may give another layer, view or probe set.

        Raises:
            UsageError: if the name is empty, or that of its layer is.

        >>> MetricKey.parse("effective_rank/n1/n64")
        MetricKey(measure='effective_rank', layer='n1', view='', centred=False, probe_set='n64', threshold='')
        >>> MetricKey.parse("hessian/trace").measure
        'hessian/trace'
        """
        measure, slash, rest = name.partition("/")
        if not slash or measure not in LAYER_MEASURES:
            if not name:
                raise UsageError("metric name () is empty: give the name of a metric, such as train/loss")
            return cls(name)
        if not (match := _LAYER_METRIC.fullmatch(rest)):
            raise UsageError(f"metric name ({name}) names no layer: give MEASURE/LAYER, such as {measure}/fc1")
        return cls(measure, *_layer_parts(match), match["probe_set"] or "", match["threshold"] or "")

    @property
    def known(self) -> Measure:
        """What is known of the measure at this threshold."""
        measure = MEASURES.get("/".join(filter(None, (self.measure, self.threshold))), OTHER)
        return measure if measure.per_layer == bool(self.layer) else OTHER

    @property
    def is_control(self) -> bool:
        """Whether it is of another matrix than the raw activations on the fixed probe set."""
        return self.centred or self.view == WEIGHT_VIEW or bool(self.probe_set)


def _layer_parts(match: re.Match[str]) -> tuple[str, str, bool]:
    layer = _ESCAPE.sub(lambda char: chr(int(char[1], 16)), match["layer"])
    return layer, match["view"] or "", bool(match["centred"])


def layer_metric(measure: str, key: str, probe_set: str = "") -> str:
    """The name of a layer's metric.

    Args:
        measure: as in config/measures.py, with its threshold.
        key: of the layer, see `LayerKey.format`.
        probe_set: n<N> or own_batch; "" for the fixed one.

    >>> layer_metric("near_rank_loss/abs_1e-2", "fc2/centred", "n64")
    'near_rank_loss/fc2/centred/n64/abs_1e-2'
    """
    name, _, threshold = measure.partition("/")
    return "/".join(filter(None, (name, key, probe_set, threshold)))
