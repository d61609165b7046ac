"""Parallel training: strategies, execution switches, memory model and out-of-memory errors."""
