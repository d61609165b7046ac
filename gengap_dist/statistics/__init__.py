"""Formulas over plain numbers: no runs, no settings. numpy and scipy only."""
