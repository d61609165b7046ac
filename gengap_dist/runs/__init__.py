"""The run folder: the truth on disk, written by rank 0 and read by everything else."""
