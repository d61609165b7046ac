"""Ranks: process group, phase timer, stall detection, preemption, batch plan and launchers."""
