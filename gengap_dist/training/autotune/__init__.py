"""Settings chosen by measurements on this machine: micro-batch size and memory format."""
