"""Generated text: the same on every machine."""

from pathlib import Path

import numpy as np

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on"]


def write_documents(folder: Path, num_bytes: int, seed: int = 0) -> Path:
    """Documents of about 5 to 150 bytes in two folders: sentences of a small language."""
    rng = np.random.default_rng(seed)
    number, written = 0, 0
    while written < num_bytes:
        words = [WORDS[n] for n in rng.zipf(1.5, size=int(rng.choice([1, 2, 4, 40]))) % len(WORDS)]
        path = folder / f"{number % 2}" / f"{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        written += path.write_text(" ".join(words) + f" {number}\n")
        number += 1
    return folder
