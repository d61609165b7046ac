"""Profiles training steps: a trace of every rank and a summary of one screen."""
