"""Measurements of a network while it trains; each leaves the network as it found it."""

from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
from gengap_dist.probes.spectra.measure import measure, metrics

__all__ = ["LayerSpectrum", "measure", "metrics"]
