"""What runs say together: arms against a baseline, seed by seed, claims, and the report."""
