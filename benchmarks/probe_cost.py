"""Cost of a probe of flattened activations, against the usual method: gather all rows on rank 0, SVD in float64.

    python benchmarks/probe_cost.py [--rounds 3] [--only ResNet-56]

Two ranks have N = 1,024 rows of the layers of ResNet-56 and VGG-16 on 32 x 32 images. Both methods get the same rows in
memory (the forward pass is not timed) and give the same singular values; they take turns, and results are medians over
rounds. Peak memory is the VmHWM of rank 0 minus its memory before; bytes are those sent over the loopback device.
"""

import argparse
import ctypes
import gc
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gengap_dist.config.sections import LaunchConfig
from gengap_dist.distributed.process_group import World, destroy_process_group, init_process_group
from gengap_dist.distributed.worker_pool import free_port
from gengap_dist.probes import measure

NUM_SAMPLES, NUM_RANKS = 1024, 2
LAYERS = {  # model: width of its flattened layers, and how many of each it has
    "ResNet-56": {16_384: 19, 8_192: 18, 4_096: 18},
    "VGG-16": {65_536: 2, 32_768: 2, 16_384: 3, 8_192: 3, 2_048: 3},
}


def usual(rows_ND: Tensor, world: World) -> Tensor:
    """Gather all rows on rank 0, and compute svdvals there in float64."""
    parts = [torch.empty_like(rows_ND) for _ in range(world.size)]
    dist.all_gather(parts, rows_ND)
    if world.rank:
        return torch.empty(0)
    return torch.linalg.svdvals(torch.cat(parts).double()) / NUM_SAMPLES**0.5


def ours(rows_ND: Tensor, world: World) -> Tensor:
    """The probe as called by a run: batches of 128 through a layer."""
    model = nn.Sequential(nn.Identity())
    (spectrum,) = measure(model, rows_ND.split(128), layers="0", centred=(False,), world=world)
    return spectrum.singular_values


METHODS = {"usual": usual, "gengap_dist": ours}


class Replay(nn.Module):
    """A network whose layers return stored rows: inputs are row numbers."""

    def __init__(self, layers: dict[int, int], generator: torch.Generator) -> None:
        """Random rows for every layer of a model in LAYERS."""
        super().__init__()
        widths = [width for width, count in layers.items() for _ in range(count)]
        self.layers = nn.ModuleList(nn.Identity() for _ in widths)
        shape = (NUM_SAMPLES // NUM_RANKS,)
        self.rows = [torch.randn(*shape, width, generator=generator).relu_() for width in widths]

    def forward(self, numbers_n1: Tensor) -> None:
        """[n, 1] row numbers."""
        for layer, rows in zip(self.layers, self.rows, strict=True):
            layer(rows[numbers_n1[:, 0]])


def whole_model(name: str, world: World) -> float:
    """Seconds for all flattened layers of a model in one call, as in a run."""
    model = Replay(LAYERS[name], torch.Generator().manual_seed(world.rank))
    numbers = torch.arange(NUM_SAMPLES // NUM_RANKS)[:, None].split(128)
    world.barrier()
    began = time.perf_counter()
    measure(model, numbers, layers="layers.*", centred=(False,), world=world)
    world.barrier()
    return time.perf_counter() - began


def status(key: str) -> float:
    """A value of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def loopback_bytes() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def one(method: str, rows_ND: Tensor, world: World) -> tuple[dict[str, float], Tensor]:
    """Seconds, additional peak MiB, MiB sent; and the singular values."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory must not hide the memory of this call
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = status("VmRSS")
    world.barrier()
    sent, began = loopback_bytes(), time.perf_counter()
    values = METHODS[method](rows_ND, world)
    world.barrier()
    seconds = time.perf_counter() - began
    figures = {"s": seconds, "peak": status("VmHWM") - before, "wire": (loopback_bytes() - sent) / 2**20}
    return figures, values


def rank_main(rank: int, port: int, models: list[str], widths: list[int], rounds: int, results: Any) -> None:
    """Main function of a rank: every width with both methods, in turns."""
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # as torchrun does
    world = init_process_group("cpu", LaunchConfig().timeout_seconds)
    for width in widths:
        generator = torch.Generator().manual_seed(rank)
        mixing = torch.randn(512, width, generator=torch.Generator().manual_seed(99)) / 512**0.5
        # half of the directions strong, the rest weak: like ReLU activations, with many weak directions
        rows_ND = torch.randn(NUM_SAMPLES // NUM_RANKS, 512, generator=generator) @ mixing
        rows_ND = (rows_ND + 1e-3 * torch.randn(rows_ND.shape, generator=generator)).relu_()
        for method in METHODS:  # warm up
            one(method, rows_ND[:, :1024].contiguous(), world)
        for number in range(rounds):
            values = {}
            for method in sorted(METHODS, reverse=bool(number % 2)):
                figures, values[method] = one(method, rows_ND, world)
                if rank == 0:
                    results.put((width, method, figures))
            if rank == 0:
                error = float((values["usual"] - values["gengap_dist"]).abs().max() / values["usual"][0])
                results.put((width, "error", {"error": error}))
    for name in models:
        for _ in range(rounds):
            seconds = whole_model(name, world)
            if rank == 0:
                results.put((name, "gengap_dist", {"s": seconds}))
    results.put(None)
    destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*LAYERS], help="one of the two models")
    options = parser.parse_args()
    models = {name: LAYERS[name] for name in LAYERS if options.only in (None, name)}
    widths = sorted({width for layers in models.values() for width in layers})
    context = get_context("spawn")
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=rank_main, args=(rank, port, [*models], widths, options.rounds, results))
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    seen: dict[tuple[int | str, str, str], list[float]] = {}  # width of a layer, or name of a model
    running = NUM_RANKS
    while running:
        if (message := results.get(timeout=600)) is None:
            running -= 1
            continue
        width, way, figures = message
        for key, value in figures.items():
            seen.setdefault((width, way, key), []).append(value)
    for process in ranks:
        process.join()
    print(f"torch {torch.__version__}, {NUM_RANKS} ranks of 1 thread, N = {NUM_SAMPLES}, medians of {options.rounds}")
    heads = ("D", "usual s", "ours s", "times as fast", "usual MiB", "ours MiB", "share", "wire", "ours", "error / s1")
    widest = (8, 9, 8, 22, 11, 10, 7, 8, 6, 12)
    print("".join(f"{head:>{width}}" for head, width in zip(heads, widest, strict=True)))
    medians = {key: statistics.median(values) for key, values in seen.items()}
    for width in widths:
        pairs = zip(seen[width, "usual", "s"], seen[width, "gengap_dist", "s"], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        usual_medians, own_medians = ([medians[width, way, key] for key in ("s", "peak", "wire")] for way in METHODS)
        times = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        cells = [
            f"{width:,}",
            f"{usual_medians[0]:.2f}",
            f"{own_medians[0]:.2f}",
            times,
            f"{usual_medians[1]:.0f}",
            f"{own_medians[1]:.0f}",
            f"{own_medians[1] / usual_medians[1]:.2f}",
        ]
        cells += [f"{usual_medians[2]:.0f}", f"{own_medians[2]:.0f}", f"{max(seen[width, 'error', 'error']):.0e}"]
        print("".join(f"{cell:>{column_width}}" for cell, column_width in zip(cells, widest, strict=True)))
    for name, layers in models.items():
        one_by_one = sum(medians[width, "usual", "s"] * count for width, count in layers.items())
        seconds = medians[name, "gengap_dist", "s"]
        print(
            f"all {sum(layers.values())} flattened layers of {name}: usual, layer by layer, {one_by_one:.0f} s; "
            f"gengap_dist, in one call, {seconds:.1f} s: {one_by_one / seconds:.1f} times as fast"
        )


if __name__ == "__main__":
    main()
