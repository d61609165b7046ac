"""Memory that one pass frees is kept for the next, where it computes on a CPU with glibc's malloc."""
