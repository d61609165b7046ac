"""Statistical formulas on plain numbers, without runs or settings. Needs only numpy and scipy."""
