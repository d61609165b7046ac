"""The candidates of `peers.py`: each does the same training in the way that its own documentation shows.

A candidate trains without end, in its own thread, and calls `turn()` after every step, where it waits while the other
candidates have their turns. All use the same ranks, process group, network, images, optimizer and number of threads.

Simplifications in favour of the peers: images are decoded and padded in memory, so a sample costs only PIL and
torchvision's transforms; no peer logs to disk, draws a progress bar, writes checkpoints or reads the loss. gengap_dist
runs `trainer.run` with everything that a run does, and records loss, accuracy, gradient norm, noise scale and learning
rate of every step. Only probes and evaluation are turned off, because the peers have none.
"""

import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gengap_dist import models
from gengap_dist.config.loading import nested, validate
from gengap_dist.config.sections import RunConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.process_group import World
from gengap_dist.training.trainer import run


class Workload(NamedTuple):
    """A network, a data set and a global batch size."""

    title: str
    model: str
    data: dict[str, Any]
    """Settings of DataConfig, without the root."""
    folder: str
    """Sub-folder of the data folder."""
    global_size: int
    whole_share: bool = False
    """Whether a rank's share is one micro-batch, as for the peers, so that batch-norm statistics are the same."""
    lr: float = 0.02
    weight_decay: float = 0.0
    untimed: int = 3
    """Steps at the start of a turn that are not timed."""
    rounds: int = 15

    def settings(self, root: Path, **more: Any) -> RunConfig:
        """The config of the gengap_dist run; all other settings are the defaults."""
        given = {
            "data": {**self.data, "root": root / self.folder, "val_fraction": 0.0},
            "model.name": self.model,
            "batch.global_size": self.global_size,
            "optim": {"lr": self.lr, "weight_decay": self.weight_decay},
            "train": {"steps": 10**9, "num_evals": 1},
            "probe.enabled": False,
            "checkpoint.every_seconds": 1e9,
            "mlflow": {"enabled": False},
        }
        return validate(RunConfig, nested(given | more))


class Turn:
    """Runs a candidate in a thread that waits for its turn."""

    def __init__(self, work: Callable[["Turn"], None]) -> None:
        """Start a thread for `work`, which is called with this object and calls it after every step."""
        self._left, self._error = 0, None
        self._go, self._over = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[["Turn"], None]) -> None:
        try:
            self._go.acquire()
            work(self)
        except BaseException as error:
            self._error = error
        self._over.release()

    def __call__(self) -> None:
        """End a step; waits if it was the last one of the turn."""
        self._left -= 1
        if not self._left:
            self._over.release()
            self._go.acquire()

    def steps(self, number: int) -> None:
        """Let the candidate do `number` steps, and wait for them.

        Raises:
            RuntimeError: if the candidate failed.
        """
        self._left = number
        self._go.release()
        self._over.acquire()
        if self._error or not self._thread.is_alive():
            raise RuntimeError("a candidate stopped") from self._error


class Mode(NamedTuple):
    """Precision and memory format of the peers; gengap_dist gets them as settings."""

    autocast: torch.dtype | None = None
    channels_last: bool = False
    compile: bool = False

    @property
    def order(self) -> torch.memory_format:
        """Memory format of images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Field(NamedTuple):
    """The inputs of every candidate."""

    workload: Workload
    splits: datasets.Splits
    world: World
    root: Path
    parts: int = 1
    """Micro-batches of a rank's share, whose gradients are accumulated."""
    mode: Mode = Mode()

    @property
    def share(self) -> int:
        """Samples of one rank per step."""
        return self.workload.global_size // self.world.size

    @property
    def micro_size(self) -> int:
        """Samples of one rank per forward and backward pass."""
        return self.share // self.parts

    def network(self) -> nn.Module:
        """The network with the same weights for every candidate, on the rank's device."""
        torch.manual_seed(0)
        config, splits = self.workload.settings(self.root), self.splits
        model = models.from_config(config, splits.spec, self.world).train()
        return model.to(self.world.device, memory_format=self.mode.order)  # pyright: ignore[reportCallIssue]

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network, compiled if the mode asks for it."""
        return torch.compile(model, dynamic=False) if self.mode.compile else model

    def loss(self, net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The contribution of a micro-batch to the mean loss of a rank's share."""
        images = images.to(self.world.device, non_blocking=True, memory_format=self.mode.order)
        labels = labels.to(self.world.device, non_blocking=True)
        kind = self.mode.autocast
        with torch.autocast(images.device.type, dtype=kind) if kind else nullcontext():
            loss = nn.functional.cross_entropy(net(images), labels)
        return loss if self.parts == 1 else loss / self.parts

    def optimizer(self, model: nn.Module, **switches: Any) -> torch.optim.Optimizer:
        """SGD with momentum."""
        w = self.workload
        return torch.optim.SGD(model.parameters(), lr=w.lr, momentum=0.9, weight_decay=w.weight_decay, **switches)

    def transform(self) -> Any:
        """Torchvision's transform from a PIL image to a tensor."""
        from torchvision import transforms

        steps: list[Any] = []
        if "augment" in self.workload.data:
            steps += [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        assert self.splits.pixels is not None
        mean, std = ([float(x) / 255 for x in v] for v in self.splits.pixels)
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def dataset(self) -> "ImageDataset":
        """The training images, one by one."""
        return ImageDataset(self.splits.train, self.transform())

    def loader(self, *, workers: int, sampler: Any = None) -> DataLoader[Any]:
        """A DataLoader as in the tutorials."""
        return DataLoader(
            self.dataset(), self.micro_size, shuffle=sampler is None, sampler=sampler, num_workers=workers,
            persistent_workers=workers > 0, drop_last=True, pin_memory=self.world.device.type == "cuda",
        )  # fmt: skip


def wait_until_idle() -> None:
    """Wait until the loaders' processes have read ahead what they may."""
    before = -1.0
    while (now := sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())) > before:
        before = now
        time.sleep(0.1)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Same work per sample as torchvision's in-memory data sets: an array, a PIL image, a transform."""

    def __init__(self, images: datasets.Samples, transform: Any) -> None:
        """`images`, one by one."""
        assert isinstance(images.inputs, Tensor)
        self.arrays = images.inputs.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels, self.transform = images.targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def torch_ddp(field: Field, turn: Turn, *, workers: int) -> None:
    """Torch's tutorials: DistributedDataParallel, DistributedSampler, DataLoader."""
    model, sampler = field.network(), None
    if field.world.size > 1:
        model = DistributedDataParallel(model)
    optimizer, net = field.optimizer(model), field.compiled(model)
    if field.world.size > 1:
        sampler = DistributedSampler(range(len(field.splits.train)), drop_last=True)  # pyright: ignore
    for number, (images, labels) in enumerate(_endless(field.loader(workers=workers, sampler=sampler), sampler), 1):
        field.loss(net, images, labels).backward()
        if number % field.parts == 0:
            optimizer.step()
            optimizer.zero_grad()
            turn()


def _endless(loader: Any, sampler: Any = None) -> Iterator[Any]:
    epoch = 0
    while True:
        if sampler is not None:
            sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def lightning(field: Field, turn: Turn, *, workers: int = 1, **more: Any) -> None:
    """Lightning's Trainer, without logger, checkpoints, bar and summary, and with the extra settings `more`."""
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # the import sets it to INFO
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = field.network(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, labels = batch
            loss = self.criterion(self.net(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return field.optimizer(self)

    class Ends(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (batch_idx + 1) % field.parts == 0:
                turn()

    is_distributed = field.world.size > 1
    trainer = L.Trainer(
        accelerator=field.world.device.type, devices=field.world.size, strategy="ddp" if is_distributed else "auto",
        max_epochs=-1, plugins=[TorchElasticEnvironment()] if is_distributed else None, callbacks=[Ends()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=field.parts, **more,
    )  # fmt: skip
    trainer.fit(Module(), field.loader(workers=workers))


def accelerate(field: Field, turn: Turn) -> None:
    """Hugging Face Accelerate's loop."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = field.network()
    model, optimizer, loader = accelerator.prepare(model, field.optimizer(model), field.loader(workers=1))
    criterion = nn.CrossEntropyLoss()
    for images, labels in _endless(loader):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        turn()


def timm(field: Field, turn: Turn) -> None:
    """Timm's loader and optimizer in the loop of its training script, which needs images with three channels."""
    from timm.data.loader import create_loader
    from timm.optim._optim_factory import create_optimizer_v2

    workload, is_distributed = field.workload, field.world.size > 1
    model, criterion = field.network(), nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(
        model, opt="momentum", lr=workload.lr, momentum=0.9, weight_decay=workload.weight_decay
    )
    dataset: Any = field.dataset()
    loader = create_loader(
        dataset, input_size=(3, 32, 32), batch_size=field.share, is_training=True, use_prefetcher=False,
        num_workers=1, distributed=is_distributed,
    )  # fmt: skip
    dataset.transform = field.transform()  # not random resized crops: the same augmentation as all candidates
    if is_distributed:
        model = DistributedDataParallel(model)
    for images, labels in _endless(loader, loader.sampler if is_distributed else None):
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turn()


def gengap(field: Field, turn: Turn, **more: Any) -> None:
    """This package: a complete run, with the settings `more` besides the defaults."""
    w, world = field.workload, replace(field.world, timer=PhaseTimer(on_gpu=field.world.device.type == "cuda"))
    if w.whole_share:
        more = {"batch.micro_size": field.micro_size} | more
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if world.rank == 0 else Path()
        out = Path(_broadcast_str(str(out), world))

        def progress(done: int, total: int, note: str) -> None:
            if not note:
                turn()

        run(w.settings(field.root, **more), out, world=world, progress=progress)


def _broadcast_str(word: str, world: World) -> str:
    """The string of rank 0."""
    if world.size == 1:
        return word
    box = [word]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def synthetic_baseline(field: Field, turn: Turn, *, real: bool = False) -> None:
    """Forward, backward and optimizer step on the same resident micro-batch: no data loading, metrics or logging."""
    generator, device = torch.Generator().manual_seed(field.world.rank), field.world.device
    pixels = field.splits.train.inputs[: field.micro_size]
    assert isinstance(pixels, Tensor)
    images = torch.randn(pixels.shape, generator=generator).to(device, memory_format=field.mode.order)
    if real:
        images = Preprocess(field.splits.pixels, device, torch.float32)(pixels.to(device))
    labels = torch.randint(field.splits.spec.num_classes or 0, (field.micro_size,), generator=generator).to(device)
    model = field.network()
    if field.world.size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, net = field.optimizer(model, fused=True), field.compiled(model)
    while True:
        optimizer.zero_grad(set_to_none=False)
        for _ in range(field.parts):
            field.loss(net, images, labels).backward()
        optimizer.step()
        turn()


class Candidate(NamedTuple):
    """One candidate of the comparison."""

    work: Callable[[Field, Turn], None]
    kind: str
    """peer, ours or limit (the synthetic baseline)."""
    package: str = "torch"
    """Package that must be installed."""

    @property
    def installed(self) -> bool:
        """Whether the package is installed."""
        return find_spec(self.package) is not None


PLAIN, AUTO, COMPILED = "gengap_dist", "gengap_dist, auto", "gengap_dist, compiled"


def candidates(workload: Workload) -> dict[str, Candidate]:
    """All candidates for the workload, installed or not."""
    found = {
        "torch DDP, DataLoader, no worker": Candidate(partial(torch_ddp, workers=0), "peer"),
        "torch DDP, DataLoader, 1 worker a rank": Candidate(partial(torch_ddp, workers=1), "peer"),
        "Lightning Trainer": Candidate(lightning, "peer", "lightning"),
        "Accelerate": Candidate(accelerate, "peer", "accelerate"),
    }
    if workload.model.startswith("resnet"):
        found["timm"] = Candidate(timm, "peer", "timm")
    found[PLAIN] = Candidate(gengap, "ours")
    tuned = {"train.channels_last": "auto"} if workload.whole_share else {"batch.micro_size": "auto"}
    found[AUTO] = Candidate(partial(gengap, **{"train.channels_last": "auto"} | tuned), "ours")
    if workload.model.startswith("resnet"):
        found[COMPILED] = Candidate(partial(gengap, **{"train.compile": True}), "ours")
    return found | {
        "limit": Candidate(synthetic_baseline, "limit"),
        "limit, real pictures": Candidate(partial(synthetic_baseline, real=True), "limit"),
    }


_CIFAR10 = {"name": "imagefolder", "augment": ["crop", "flip"]}
WORKLOADS = {
    "lenet5_512": Workload("LeNet-5 x Fashion-MNIST, 512", "lenet5", {"name": "fashion_mnist"}, "", 512),
    "lenet5_8192": Workload("LeNet-5 x Fashion-MNIST, 8,192", "lenet5", {"name": "fashion_mnist"}, "", 8192, rounds=7),
    "mlp_4096": Workload("BN-MLP x MNIST, 4,096", "f1", {"name": "mnist", "image_size": 28}, "", 4096, True),
    "resnet56_128": Workload(
        "ResNet-56 x CIFAR-10, crop and flip, 128", "resnet56", _CIFAR10, "cifar10-jpeg", 128, True, 0.1, 1e-4, 1, 11
    ),
    "resnet56_1024": Workload(
        "ResNet-56 x CIFAR-10, crop and flip, 1,024", "resnet56", _CIFAR10, "cifar10-jpeg", 1024, True, 0.1, 1e-4, 1, 6
    ),
}

warnings.filterwarnings("ignore", module="lightning|accelerate|timm")
