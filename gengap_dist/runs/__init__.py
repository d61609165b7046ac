"""The run folder: written by rank 0, read by all other packages, and the only source of a run's results."""
