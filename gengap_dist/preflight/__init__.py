"""Before a run: what it will take on a cluster, and whether this machine can do it."""
