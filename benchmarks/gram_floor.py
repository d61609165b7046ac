"""How small a singular value can a float64 Gram matrix show? Prints the noise on matrices whose rank is known.

    python benchmarks/gram_floor.py

Half of the D singular values of each matrix are exactly zero. What the Gram matrix makes of the first of them, relative
to the largest, is noise; `sqrt(eps)` is 1.5e-8. Float32 matrices are only zero to 1e-8 there, see the last column.
"""

import torch

EPS = torch.finfo(torch.float64).eps
NUM_SAMPLES = 2048


def noise(units: int, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """The first singular value that should be zero, relative to the largest: by Gram matrix, and by a direct SVD."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, units // 2)
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((NUM_SAMPLES, rank), (rank, units))
    )
    shift = 3.0 * (seed % 2)  # every other matrix has the large mean of ReLU units, which adds one to the rank
    matrix = (left @ right + shift).to(dtype).double()
    gram = torch.zeros(units, units, dtype=torch.float64)
    for rows in matrix.split(128):
        gram.addmm_(rows.T, rows)
    by_gram = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    direct = torch.linalg.svdvals(matrix)
    first = rank + seed % 2
    return float(by_gram[first] / by_gram[0]), float(direct[first] / direct[0])


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N = {NUM_SAMPLES}")
    print("dtype           D   Gram noise / s1   in sqrt(eps)   direct SVD / s1")
    for dtype in (torch.float64, torch.float32):
        for units in (6, 16, 64, 256, 512, 1024):
            results = [noise(units, dtype, seed) for seed in range(8 if units < 512 else 2)]
            worst, direct = (max(column) for column in zip(*results, strict=True))
            print(f"{str(dtype)[6:]:8} {units:8} {worst:17.1e} {worst / EPS**0.5:14.2f} {direct:17.1e}")


if __name__ == "__main__":
    main()
