"""Training of one network: the run, its steps, algorithms, evaluation and measurements."""

ENTRY_POINT = "gengap_dist.training.trainer:run"
"""The function that launchers call on every rank of a run."""
