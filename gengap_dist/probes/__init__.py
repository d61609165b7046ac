"""Measurements of a network during training. No measurement changes the network."""

from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
from gengap_dist.probes.spectra.measure import measure, metrics

__all__ = ["LayerSpectrum", "measure", "metrics"]
