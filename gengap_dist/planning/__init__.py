"""What a run will take on a cluster, known before it starts: layout, memory, traffic, time, and what is refused."""
