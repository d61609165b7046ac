"""Measures the smallest detectable singular value, and what a measurement costs.

    python benchmarks/gram_floor.py [--only cost]

The first table is the noise on matrices of known rank.

Half of the D singular values of each matrix are exactly zero. The first of them, as computed from the
Gram matrix and by TSQR, relative to the largest, is noise; `sqrt(eps)` is 1.5e-8, `eps` 2.2e-16. In float32 matrices
these values are zero only to 1e-8, see the last column.

The second table is a measurement of the default probe set of digits, in seconds of the processor: the forward pass
alone, and the parts of a measurement of all layers in the default views; medians of rounds in turns. `bare` is what
a plain program would add for the same spectra: one float64 product X' X of each matrix, whose rows are there already,
and its eigenvalues, raw and centred. A product that computes one triangle only takes down to half of the first.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.models import build
from gengap_dist.probes import LayerSpectrum, measure
from gengap_dist.probes.activations import eval_context
from gengap_dist.probes.spectra.cost import PARTS, MeasurementCost
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


MODELS = {"lenet5": {"image_size": 28}, "mlp": {"image_size": 8}, "resnet20": {"image_size": 32}}
NUM_PROBED, BLOCK = 1024, 128


def measurement(model: nn.Module, inputs: torch.Tensor) -> tuple[dict[str, float], list[LayerSpectrum]]:
    """Seconds of the processor: of the forward pass alone, of a measurement, and of its parts; and the spectra."""
    batches = inputs.split(BLOCK)
    began = time.process_time()
    with eval_context(model):
        for batch in batches:
            model(batch)
    alone = time.process_time() - began
    cost, began = MeasurementCost(clock=time.process_time), time.process_time()
    spectra = measure(model, batches, cost=cost)
    seconds = {"alone": alone, "measurement": time.process_time() - began, **cost.seconds()}
    return seconds | {"bare": bare(spectra)}, spectra


def bare(spectra: list[LayerSpectrum]) -> float:
    """Seconds of the processor: of one product for each matrix, and of the eigenvalues of each spectrum."""
    seconds, num_blocks = 0.0, NUM_PROBED // BLOCK
    for spectrum in spectra:
        rows = torch.randn(spectrum.num_samples // num_blocks, spectrum.num_units, dtype=torch.float64)
        gram, began = rows.new_zeros(spectrum.num_units, spectrum.num_units), time.process_time()
        for _ in range(num_blocks):
            gram.addmm_(rows.T, rows)
        if spectrum.centred:  # raw and centred spectra come from one product
            began = time.process_time()
        torch.linalg.eigvalsh(gram)
        seconds += time.process_time() - began
    return seconds


def costs(rounds: int) -> None:
    """Print the second table."""
    parts = "".join(f"{part:>14}" for part in (*PARTS, "rest"))
    heads = f"{'bare':>14}  all / alone  plain / alone   largest floor / s1"
    print(f"\nms of a measurement  forward alone{parts}{heads}")
    for name, options in MODELS.items():
        torch.manual_seed(0)
        size = options["image_size"]
        model = build(name, DataSpec.images(num_classes=10, in_channels=1, image_size=size))
        inputs = torch.randn(NUM_PROBED, 1, size, size)
        taken = [measurement(model, inputs) for _ in range(rounds + 1)][1:]  # the first one warms up
        seconds = {key: statistics.median(each[key] for each, _ in taken) for key in taken[0][0]}
        rest = seconds["measurement"] - sum(seconds[part] for part in PARTS)
        shown = "".join(
            f"{1000 * value:14.1f}" for value in (*(seconds[part] for part in PARTS), rest, seconds["bare"])
        )
        floor = max(s.floor / float(s.singular_values[0]) for s in taken[0][1])
        ratio, plain = seconds["measurement"] / seconds["alone"], 1 + seconds["bare"] / seconds["alone"]
        print(f"{name:19} {1000 * seconds['alone']:14.1f}{shown} {ratio:12.2f} {plain:14.2f} {floor:20.1e}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["noise", "cost"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.only != "cost":
        noises()
    if options.only != "noise":
        costs(options.rounds)


def noises() -> None:
    """Print the first table."""
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
