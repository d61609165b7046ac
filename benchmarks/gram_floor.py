"""Measures the smallest detectable singular value: prints the noise on matrices of known rank.

    python benchmarks/gram_floor.py

Half of the D singular values of each matrix are exactly zero. The first of them, as computed from the
Gram matrix and by TSQR, relative to the largest, is noise; `sqrt(eps)` is 1.5e-8, `eps` 2.2e-16. In float32 matrices
these values are zero only to 1e-8, see the last column.
"""

import torch

from gengap_dist.probes.spectra.gram import GramAccumulator, SpectrumAccumulator
from gengap_dist.probes.spectra.tsqr import QRAccumulator

EPS = torch.finfo(torch.float64).eps
NUM_SAMPLES = 2048


def noise(units: int, dtype: torch.dtype, seed: int) -> tuple[float, float, float]:
    """The first singular value that should be zero, relative to the largest: by Gram, by TSQR, and by a direct SVD."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, units // 2)
    left, right = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((NUM_SAMPLES, rank), (rank, units))
    )
    shift = 3.0 * (seed % 2)  # every other matrix has the large mean of ReLU units, which adds one to the rank
    matrix = (left @ right + shift).to(dtype).double()
    accumulators: list[SpectrumAccumulator] = [
        GramAccumulator(units, torch.device("cpu")),
        QRAccumulator(units, torch.device("cpu")),
    ]
    for rows in matrix.split(128):
        for accumulator in accumulators:
            accumulator.add(rows.T.clone())
    first_zero = rank + seed % 2
    spectra = [*(accumulator.singular_values() for accumulator in accumulators), torch.linalg.svdvals(matrix)]
    by_gram, by_tsqr, direct = (float(values[first_zero] / values[0]) for values in spectra)
    return by_gram, by_tsqr, direct


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N = {NUM_SAMPLES}")
    print("dtype           D   Gram / s1   in sqrt(eps)   TSQR / s1   in eps   direct SVD / s1")
    for dtype in (torch.float64, torch.float32):
        for units in (6, 16, 64, 256, 512, 1024):
            results = [noise(units, dtype, seed) for seed in range(8 if units < 512 else 2)]
            gram, tsqr, direct = (max(column) for column in zip(*results, strict=True))
            shown = f"{gram:11.1e} {gram / EPS**0.5:14.2f} {tsqr:11.1e} {tsqr / EPS:8.1f} {direct:17.1e}"
            print(f"{str(dtype)[6:]:8} {units:8} {shown}")


if __name__ == "__main__":
    main()
