"""Train one network: the run, its steps, algorithms, evaluation and measurements."""

ENTRY_POINT = "gengap_dist.training.trainer:run"
"""What launchers call on every rank for a run."""
