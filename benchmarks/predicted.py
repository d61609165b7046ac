"""Step times predicted as in `gengap plan`, for measured points and for much larger clusters.

A step is the compute time of a rank's samples, one update, and the messages of the alpha-beta model, without overlap.
"""

from typing import Any, Literal, NamedTuple

from gengap_dist import models
from gengap_dist.config.loading import validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.distributed.process_group import World
from gengap_dist.preflight import communication_model
from gengap_dist.preflight.batch_layout import Cluster, layout
from gengap_dist.preflight.communication_model import Link
from gengap_dist.preflight.machine_constants import ComputeConstants
from gengap_dist.preflight.plan import step_seconds
from gengap_dist.training.algorithms.base import batch_plan_for
from gengap_dist.training.checks import strategy_name

Mode = Literal["strong", "weak"]
MODES: tuple[Mode, ...] = ("strong", "weak")

DATA = {"lenet5": "fashion_mnist", "resnet56": "cifar10", "vgg16": "cifar10"}  # for the shape and number of images
TITLES = {"lenet5": "LeNet-5", "resnet56": "ResNet-56", "vgg16": "VGG-16"}

MAX_RANKS, PER_NODE = 4096, 8
STRONG_SIZE, WEAK_SIZE = 16_384, 64  # images of a simulated step: in total, and per rank
ACCELERATOR = ComputeConstants(seconds_per_sample=1 / 20_000, seconds_per_update=1e-3)


class Task(NamedTuple):
    """A network to train, its data sizes and the bytes of its gradients."""

    config: RunConfig
    sizes: datasets.Sizes
    gradient_bytes: int


def task(model: str, micro_size: int, device: str = "cpu") -> Task:
    """Training of `model` without probes."""
    settings: dict[str, Any] = {"model": {"name": model}, "data": {"name": DATA[model]}, "launch": {"device": device}}
    settings |= {"batch": {"micro_size": micro_size}, "probe": {"enabled": False}, "mlflow": {"enabled": False}}
    config = validate(RunConfig, settings)
    sizes = datasets.sizes(config.data)
    network = models.from_config(config, sizes.spec, World())
    return Task(config, sizes, sum(p.numel() * p.itemsize for p in network.parameters() if p.requires_grad))


def predict(
    task: Task, global_size: int, cluster: Cluster, compute: ComputeConstants, inside: Link, between: Link
) -> float:
    """Seconds of one step of `global_size` images on `cluster`."""
    num_ranks = cluster.num_ranks
    batch = layout(batch_plan_for(task.config, global_size, num_ranks))
    gradient_bytes, num_micro = task.gradient_bytes, batch.micro_batches_per_rank[1]
    messages = communication_model.step_messages(
        strategy_name(task.config, num_ranks), gradient_bytes, gradient_bytes, num_micro
    )
    return sum(step_seconds(cluster, batch, messages, compute, inside, between))


class Links(NamedTuple):
    """The links of a simulated cluster."""

    name: str
    inside: Link
    between: Link
    words: str
    """Where the constants come from."""


INFINIBAND = Links(
    "NVLink 4 + 400 Gbit/s InfiniBand",
    Link(alpha=3.4e-6, beta=1 / 450e9),
    Link(alpha=9.6e-6, beta=1 / 50e9),
    "8 GPUs a node; inside 450 GB/s each way a GPU (vendor's nominal 900 both ways), 3.4 µs a message; between nodes a "
    "400 Gbit/s port for each GPU (nominal 50 GB/s), 9.6 µs. Latencies are those of NCCL's own tuning table (ring, "
    "Simple).",
)
ETHERNET = Links(
    "PCIe 4 + 100 Gbit/s Ethernet",
    Link(alpha=5.7e-6, beta=1 / 31.5e9),
    Link(alpha=30e-6, beta=PER_NODE / 12.5e9),
    "8 GPUs a node; inside x16 slots of nominal 31.5 GB/s each way, 5.7 µs (NCCL's table); between nodes one "
    "100 Gbit/s port (nominal 12.5 GB/s) that 8 GPUs share, 30 µs (assumed).",
)


def cores(inside: Link) -> Links:
    """Machines like this one, with the measured link inside a node, connected by Ethernet."""
    words = (
        f"8 ranks of one core a node; inside as measured here between two ({inside.alpha * 1e6:.0f} µs, "
        f"{inside.beta * 1e9:.2f} ns a byte), between nodes the 100 Gbit/s Ethernet above."
    )
    return Links("CPU cores + 100 Gbit/s Ethernet", inside, ETHERNET.between, words)


def size_of(mode: Mode, num_ranks: int) -> int:
    """Images of a simulated step.

    >>> size_of("strong", 8), size_of("weak", 8)
    (16384, 512)
    """
    return STRONG_SIZE if mode == "strong" else WEAK_SIZE * num_ranks


def curve(task: Task, mode: Mode, compute: ComputeConstants, links: Links) -> list[dict[str, float]]:
    """Simulated steps on 1, 2, 4, ... MAX_RANKS ranks; efficiency is images/s per rank over that of a single rank."""
    rows: list[dict[str, float]] = []
    for num_ranks in (2**power for power in range(MAX_RANKS.bit_length())):
        cluster = Cluster(max(1, num_ranks // PER_NODE), min(num_ranks, PER_NODE))
        size = size_of(mode, num_ranks)
        seconds = predict(task, size, cluster, compute, links.inside, links.between)
        speed = size / seconds
        single_rank_speed = rows[0]["images_per_second"] if rows else speed
        rows.append(
            {"ranks": num_ranks, "global_size": size, "seconds": seconds, "images_per_second": speed}
            | {"efficiency": speed / num_ranks / single_rank_speed}
        )
    return rows
