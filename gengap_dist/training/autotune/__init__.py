"""What is chosen by measuring this machine: micro-batches and memory format."""
