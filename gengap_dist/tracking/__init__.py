"""Experiment trackers: upload of run folders to MLflow, and import of MLflow runs."""
