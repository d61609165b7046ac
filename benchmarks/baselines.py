"""Who takes part in `peers.py`, each doing the same work the way its own documentation teaches it.

A candidate trains on for ever, in a thread of its own, and calls `turn()` after every step: that is where it waits
while the others have theirs. All are on the same ranks, in the same process group, with the same network, pictures,
optimizer and number of threads.

To the peers' favour: pictures lie decoded and padded in memory, so what a sample costs is PIL and torchvision's
transforms; nobody logs to disk, draws a bar, checkpoints or looks at the loss. gengap_dist does all it does in a run:
it is `trainer.run` itself, with every step's loss, accuracy, gradient norm, noise scale and rate in the record. Only probes
and evaluation are left out, which the others have none of.
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
from gengap_dist.data.batch_loader import Normalise
from gengap_dist.distributed.phase_timer import PhaseTimer
from gengap_dist.distributed.process_group import World
from gengap_dist.training.trainer import run


class Workload(NamedTuple):
    """A network, its pictures and a global batch."""

    title: str
    model: str
    data: dict[str, Any]
    """Settings of DataConfig, but for the root."""
    folder: str
    """Where they lie below the data folder."""
    global_size: int
    whole_share: bool = False
    """Whether a rank's share is one micro-batch, as everybody else has it: batch norm's statistics must be the same."""
    lr: float = 0.02
    weight_decay: float = 0.0
    untimed: int = 3
    """Steps at the start of a turn that do not count."""
    rounds: int = 15

    def settings(self, root: Path, **more: Any) -> RunConfig:
        """The run that gengap_dist makes of it; everything that is not set is the default."""
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
    """Where a candidate's thread waits for its turn."""

    def __init__(self, work: Callable[["Turn"], None]) -> None:
        """A thread for `work`, which is called with this turn and calls it after every step."""
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
        """A step is done."""
        self._left -= 1
        if not self._left:
            self._over.release()
            self._go.acquire()

    def steps(self, number: int) -> None:
        """Let it take so many steps, and wait.

        Raises:
            RuntimeError: if it failed.
        """
        self._left = number
        self._go.release()
        self._over.acquire()
        if self._error or not self._thread.is_alive():
            raise RuntimeError("a candidate stopped") from self._error


class Mode(NamedTuple):
    """How the others compute; ours is told by settings."""

    autocast: torch.dtype | None = None
    channels_last: bool = False
    compile: bool = False

    @property
    def order(self) -> torch.memory_format:
        """Of images in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Field(NamedTuple):
    """What all candidates are given."""

    workload: Workload
    splits: datasets.Splits
    world: World
    root: Path
    parts: int = 1
    """Micro-batches of a share, whose gradients are added up."""
    mode: Mode = Mode()

    @property
    def share(self) -> int:
        """Samples of one rank in a step."""
        return self.workload.global_size // self.world.size

    @property
    def micro_size(self) -> int:
        """Samples of one rank in a pass."""
        return self.share // self.parts

    def network(self) -> nn.Module:
        """The same network with the same weights for everybody, on the rank's device."""
        torch.manual_seed(0)
        config, splits = self.workload.settings(self.root), self.splits
        model = models.from_config(config, splits.num_classes, splits.in_channels, self.world).train()
        return model.to(self.world.device, memory_format=self.mode.order)  # pyright: ignore[reportCallIssue]

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network as the mode has it called."""
        return torch.compile(model, dynamic=False) if self.mode.compile else model

    def loss(self, net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """A micro-batch's part of the mean loss of a share."""
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
        """Torchvision's, from a PIL picture to a tensor."""
        from torchvision import transforms

        steps: list[Any] = []
        if "augment" in self.workload.data:
            steps += [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        mean, std = ([float(x) / 255 for x in v] for v in (self.splits.mean_C, self.splits.std_C))
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def dataset(self) -> "Pictures":
        """The training pictures, one by one."""
        return Pictures(self.splits.train, self.transform())

    def loader(self, *, workers: int, sampler: Any = None) -> DataLoader[Any]:
        """As the tutorials make it."""
        return DataLoader(
            self.dataset(), self.micro_size, shuffle=sampler is None, sampler=sampler, num_workers=workers,
            persistent_workers=workers > 0, drop_last=True, pin_memory=self.world.device.type == "cuda",
        )  # fmt: skip


def come_to_rest() -> None:
    """Wait until the loaders' processes have read ahead what they may."""
    before = -1.0
    while (now := sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())) > before:
        before = now
        time.sleep(0.1)


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's own data sets of pictures in memory do for a sample: an array, a PIL picture, a transform."""

    def __init__(self, images: datasets.Images, transform: Any) -> None:
        """`images`, one by one."""
        assert isinstance(images.pixels, Tensor)
        self.arrays = images.pixels.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels, self.transform = images.labels.tolist(), transform

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
    for number, (images, labels) in enumerate(_for_ever(field.loader(workers=workers, sampler=sampler), sampler), 1):
        field.loss(net, images, labels).backward()
        if number % field.parts == 0:
            optimizer.step()
            optimizer.zero_grad()
            turn()


def _for_ever(loader: Any, sampler: Any = None) -> Iterator[Any]:
    epoch = 0
    while True:
        if sampler is not None:
            sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def lightning(field: Field, turn: Turn, *, workers: int = 1, **more: Any) -> None:
    """Lightning's Trainer, without logger, checkpoints, bar and summary, and with `more` of its settings."""
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # which the import has set to INFO
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

    several = field.world.size > 1
    trainer = L.Trainer(
        accelerator=field.world.device.type, devices=field.world.size, strategy="ddp" if several else "auto",
        max_epochs=-1, plugins=[TorchElasticEnvironment()] if several else None, callbacks=[Ends()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
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
    for images, labels in _for_ever(loader):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        turn()


def timm(field: Field, turn: Turn) -> None:
    """Timm's loader and optimizer in the loop of its training script, which is made for pictures of three channels."""
    from timm.data.loader import create_loader
    from timm.optim._optim_factory import create_optimizer_v2

    w, several = field.workload, field.world.size > 1
    model, criterion = field.network(), nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, opt="momentum", lr=w.lr, momentum=0.9, weight_decay=w.weight_decay)
    dataset: Any = field.dataset()
    loader = create_loader(
        dataset, input_size=(3, 32, 32), batch_size=field.share, is_training=True, use_prefetcher=False,
        num_workers=1, distributed=several,
    )  # fmt: skip
    dataset.transform = field.transform()  # not random resized crops: the same augmentation as everybody
    if several:
        model = DistributedDataParallel(model)
    for images, labels in _for_ever(loader, loader.sampler if several else None):
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turn()


def gengap(field: Field, turn: Turn, **more: Any) -> None:
    """This package: a whole run, with `more` settings than the defaults."""
    w, world = field.workload, replace(field.world, where=PhaseTimer(on_gpu=field.world.device.type == "cuda"))
    if w.whole_share:
        more = {"batch.micro_size": field.micro_size} | more
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if world.rank == 0 else Path()
        out = Path(_told(str(out), world))

        def progress(done: int, total: int, note: str) -> None:
            if not note:
                turn()

        run(w.settings(field.root, **more), out, world=world, progress=progress)


def _told(word: str, world: World) -> str:
    """Rank 0's word."""
    if world.size == 1:
        return word
    box = [word]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def limit(field: Field, turn: Turn, *, real: bool = False) -> None:
    """Forward, backward and step on one resident micro-batch, over and over: no data, no metrics, no record."""
    generator, device = torch.Generator().manual_seed(field.world.rank), field.world.device
    pixels = field.splits.train.pixels[: field.micro_size]
    assert isinstance(pixels, Tensor)
    images = torch.randn(pixels.shape, generator=generator).to(device, memory_format=field.mode.order)
    if real:
        images = Normalise(field.splits, device, torch.float32)(pixels.to(device))
    labels = torch.randint(field.splits.num_classes, (field.micro_size,), generator=generator).to(device)
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
    """Somebody who takes part."""

    work: Callable[[Field, Turn], None]
    kind: str
    """peer, ours or limit."""
    package: str = "torch"
    """What must be installed."""

    @property
    def installed(self) -> bool:
        """Whether it is."""
        return find_spec(self.package) is not None


PLAIN, AUTO, COMPILED = "gengap_dist", "gengap_dist, auto", "gengap_dist, compiled"


def candidates(workload: Workload) -> dict[str, Candidate]:
    """All that fit the workload, whether installed or not."""
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
        "limit": Candidate(limit, "limit"),
        "limit, real pictures": Candidate(partial(limit, real=True), "limit"),
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
