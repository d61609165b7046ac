"""Checks before a run: predicts its resources on a cluster, and tests whether this machine can run it."""
