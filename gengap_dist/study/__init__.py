"""Studies: the runs of all arms and seeds, tuning trials, and how they are executed."""
