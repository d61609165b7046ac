"""Arms x seeds: which runs a study has, how they are run, how they are compared."""
