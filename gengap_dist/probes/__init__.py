"""Measurements of a network while it trains; each leaves the network as it found it."""

from gengap_dist.probes.rank_loss import measure, metrics
from gengap_dist.probes.spectrum import LayerSpectrum

__all__ = ["LayerSpectrum", "measure", "metrics"]
