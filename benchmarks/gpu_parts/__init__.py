"""The parts of `gpu.py`: each lists its items, does one of them, and writes its section of the page."""
