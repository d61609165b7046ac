"""The data sets by name: read whole into memory as uint8, checked, padded, split; or left on disk (`data.streaming`).

Shapes: N images, C channels, H = W = image_size.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import TORCHVISION
from gengap_dist.data.host_images import HostImages
from gengap_dist.data.streaming import PREFETCH_BYTES, StreamedImages, read_image
from gengap_dist.errors import UsageError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


CHUNK = 1_024  # pictures that are copied or counted at a time: temporaries are no second data set
SHARE_OF_GPU = 0.5  # of a GPU's free memory that data.device=auto gives to the images
MEAN_OF = 4_096  # training pictures that give the mean and deviation of a set left on disk


class Images(NamedTuple):
    """One split."""

    pixels: Tensor | StreamedImages | HostImages  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same images on a device; pictures on disk are put there when they are indexed."""
        assert not isinstance(self.pixels, HostImages)  # they are where they are to be
        return Images(self.pixels.to(device), self.labels.to(device))

    def kept_on_host(self, device: torch.device) -> "Images":
        """The same images in the machine's memory, put on a device when they are indexed; labels are there."""
        assert isinstance(self.pixels, Tensor)
        return Images(HostImages(self.pixels, device), self.labels.to(device))

    def take(self, indices: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [n, C, H, W] and labels [n] at [n] int64 positions, `there` being the same on the images' device."""
        if isinstance(self.pixels, Tensor):
            return self.pixels.index_select(0, there), self.labels[there]  # 20 times as fast as [there]
        return self.pixels[indices], self.labels[there]  # reading the numbers of `there` would wait for a GPU

    def prefetch(self, indices: Tensor) -> None:
        """Say that `indices` [n] are asked for next: what is not on the device yet is brought nearer."""
        if not isinstance(self.pixels, Tensor):
            self.pixels.prefetch(indices)

    def fingerprint(self, root: Path) -> Iterator[Any]:
        """What tells these images from others, as bytes: pixels, of pictures on disk their paths and sizes; labels."""
        if isinstance(self.pixels, StreamedImages):
            yield from self.pixels.fingerprint(root)
        else:
            pixels = self.pixels.pixels if isinstance(self.pixels, HostImages) else self.pixels
            yield np.ascontiguousarray(pixels.cpu().numpy()).data
        yield np.ascontiguousarray(self.labels.cpu().numpy()).data


class Splits(NamedTuple):
    """A data set ready for training; `val` may be empty."""

    train: Images
    val: Images
    test: Images
    num_classes: int
    mean_C: Tensor
    """[C] float64, mean of the training pixels, padding not counted; of pictures on disk, of at most MEAN_OF."""
    std_C: Tensor
    """[C] float64, their standard deviation, at least 1 grey level."""

    @property
    def in_channels(self) -> int:
        """C, the number of channels."""
        return self.train.pixels.shape[1]

    def digest(self, root: Path = Path()) -> str:
        """Hash of every label and pixel of every split, as hex; for pictures on disk, paths below `root` and sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for images in (self.train, self.val, self.test):
            for part in images.fingerprint(root):
                digest.update(part)
        return digest.hexdigest()


def placed(splits: Splits, config: DataConfig, device: torch.device) -> Splits:
    """The splits with their images where `data.device` wants them while `device` trains.

    Raises:
        UsageError: if all of them are to be in a GPU's memory and do not fit there; nothing is copied then.
    """
    move = Images.to
    if device.type == "cuda" and not config.streaming:
        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(images.pixels.shape.numel() for images in (splits.train, splits.val, splits.test))
        if config.device == "cuda" and needed > free:
            raise UsageError(
                f"data.device (cuda) keeps the {needed / 2**30:.3g} GiB of {config.name} in the memory of every GPU, "
                f"and {torch.cuda.get_device_name(device)} has {free / 2**30:.3g} GiB free: choose data.device=auto, "
                "or cpu"
            )
        if config.device == "cpu" or (config.device == "auto" and needed > free * SHARE_OF_GPU):
            move = Images.kept_on_host
    train, val, test = (move(images, device) for images in (splits.train, splits.val, splits.test))
    return splits._replace(train=train, val=val, test=test)


class _Raw(NamedTuple):
    """A data set as its files hold it: pixels [N, H, W] or [N, C, H, W] uint8, labels [N]."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    num_classes: int


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def _silent(what: str, done: int, total: int) -> None:
    """Nobody is watching."""


def _digits(config: DataConfig, progress: Progress) -> _Raw:
    """The 1,797 handwritten digits of the UCI test set (Alpaydin & Kaynak 1998, as in scikit-learn); 8 x 8, 0 to 16.

    Every fifth image is a test image: the set itself has no split.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels = torch.from_numpy(file["images"]).to(torch.int32) * 255 // 16
        labels = torch.from_numpy(file["labels"]).long()
    test = torch.arange(len(labels)) % 5 == 0
    pixels = pixels.to(torch.uint8)
    return _Raw(pixels[~test], labels[~test], pixels[test], labels[test], 10)


COUNTS = {  # name: training images, test images, classes, channels
    "digits": (1_437, 360, 10, 1),
    "mnist": (60_000, 10_000, 10, 1),
    "fashion_mnist": (60_000, 10_000, 10, 1),
    "cifar10": (50_000, 10_000, 10, 3),
    "cifar100": (50_000, 10_000, 100, 3),
}  # imagefolder's are on disk


def _torchvision(config: DataConfig, progress: Progress) -> _Raw:
    from torchvision import datasets  # slow import, and digits do not need it

    class_name, folder = TORCHVISION[config.name]
    cls = getattr(datasets, class_name)
    where = config.root / folder
    try:
        train, test = (cls(str(config.root), train=part, download=config.download) for part in (True, False))
    except Exception as error:  # torchvision raises many kinds, and RuntimeError for missing files
        if "not found" in str(error):
            files = cls.resources if "MNIST" in class_name else [*cls.train_list, *cls.test_list]
            names = ", ".join(Path(name).name.removesuffix(".gz") for name, _ in files)
            raise UsageError(
                f"data.root ({config.root}) does not hold {config.name}: {where} needs the files {names}, whole and "
                "unchanged; copy them there, or let torchvision fetch them with --data.download true"
            ) from None
        raise UsageError(
            f"data.root ({config.root}): the files of {config.name} in {where} are damaged or cannot be fetched "
            f"({type(error).__name__}: {error}); remove them, and copy them again or use --data.download true"
        ) from None
    sets = []
    for part in (train, test):
        pixels = torch.as_tensor(part.data)
        sets += [pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels, torch.as_tensor(part.targets).long()]
    return _Raw(*sets, num_classes=len(train.classes))


def listings(config: DataConfig) -> "list[ImageFolder]":
    """The pictures below root/train/CLASS and root/test/CLASS, none of them opened yet.

    Raises:
        UsageError: if a folder is missing or empty, or the two have different classes.
    """
    from torchvision.datasets import ImageFolder

    found: list[ImageFolder] = []
    for part in ("train", "test"):
        folder = config.root / part
        try:
            found.append(ImageFolder(str(folder)))
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"data.root ({config.root}) is not an image folder: {folder} needs one sub-folder of pictures per class "
                f"({error}); arrange the files as {folder}/CLASS/PICTURE.jpg"
            ) from None
    if odd := sorted(set(found[0].classes) ^ set(found[1].classes)):
        raise UsageError(f"data.root ({config.root}): class {odd[0]} is not in both train/ and test/: make them match")
    return found


def _imagefolder(config: DataConfig, progress: Progress) -> _Raw:
    """root/train/CLASS/*.jpg and root/test/CLASS/*.jpg, decoded once, resized to image_size, three channels."""
    size = config.image_size
    sets: list[Tensor] = []
    both = listings(config)
    for part, listing in zip(("train", "test"), both, strict=True):
        _check_memory(len(listing.samples) * 3 * size * size, config)
        pixels = torch.empty(len(listing.samples), 3, size, size, dtype=torch.uint8)

        def decode(job: tuple[int, str], pixels: Tensor = pixels) -> None:
            at, path = job
            pixels[at] = read_image(path, size)

        with ThreadPoolExecutor() as pool:
            jobs = [(at, path) for at, (path, _) in enumerate(listing.samples)]
            for done, _ in enumerate(pool.map(decode, jobs), 1):
                if done % 500 == 0:
                    progress(f"reading {part} pictures", done, len(jobs))
        sets += [pixels, torch.tensor(listing.targets)]
    return _Raw(*sets, num_classes=len(both[0].classes))


LOADERS: dict[str, Callable[[DataConfig, Progress], _Raw]] = {
    "digits": _digits,
    **dict.fromkeys(TORCHVISION, _torchvision),
    "imagefolder": _imagefolder,
}


def _check_memory(num_bytes: int, config: DataConfig) -> None:
    if num_bytes > config.memory_gib * 2**30:
        raise UsageError(
            f"data.memory_gib ({config.memory_gib}) is less than the {num_bytes / 2**30:.1f} GiB that {config.name} "
            "takes: raise it if the machine has the memory, or choose a smaller data.image_size"
        )


class Sizes(NamedTuple):
    """How large a data set is."""

    num_train: int
    num_val: int
    num_test: int
    num_classes: int
    in_channels: int
    num_bytes: int
    """In memory: a byte a pixel, 8 a label; of pictures left on disk, those that are read ahead."""


def sizes(config: DataConfig) -> Sizes:
    """What `load` would bring into memory, known without opening a picture; only imagefolder needs its files.

    Raises:
        UsageError: if an image folder is missing, or the set exceeds data.memory_gib.

    >>> sizes(DataConfig(name="cifar10"))
    Sizes(num_train=45000, num_val=5000, num_test=10000, num_classes=10, in_channels=3, num_bytes=184800000)
    """
    if config.name == "imagefolder":
        train, test = listings(config)
        num, num_test, num_classes, channels = len(train.samples), len(test.samples), len(train.classes), 3
    else:
        num, num_test, num_classes, channels = COUNTS[config.name]
    num_bytes = (num + num_test) * channels * config.image_size**2
    if config.streaming:
        num_bytes = min(num_bytes, PREFETCH_BYTES)
    else:
        _check_memory(num_bytes, config)
    num_val = _num_val(num, config)
    return Sizes(num - num_val, num_val, num_test, num_classes, channels, num_bytes + 8 * (num + num_test))


def _num_val(num: int, config: DataConfig) -> int:
    return int(num * config.val_fraction)


def _square(pixels: Tensor, size: int, which: Tensor) -> Tensor:
    """Those of [N, C, H, W] uint8 that `which` [n] says, as [n, C, size, size], zero-padded on all sides."""
    channels, height, width = pixels.shape[1:]
    if max(height, width) > size:
        raise UsageError(
            f"data.image_size ({size}) is smaller than the {height} x {width} images: "
            f"choose at least {max(height, width)}"
        )
    left, top = (size - width) // 2, (size - height) // 2
    out = pixels.new_zeros(len(which), channels, size, size)
    inside = out[:, :, top : top + height, left : left + width]
    for to, some in zip(inside.split(CHUNK), which.split(CHUNK), strict=True):
        to.copy_(pixels[some])
    return out


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels that are no class.

    Raises:
        UsageError: if a label is outside 0 .. num_classes - 1.
    """
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise UsageError(
            f"the {where} labels hold {int(labels[at])} at position {at}, outside 0 to {num_classes - 1}: "
            "mend the data set's labels"
        )


def load(config: DataConfig, progress: Progress = _silent) -> Splits:
    """A data set by name, its validation split held out by `data.split_seed`.

    Raises:
        UsageError: if files are missing or damaged, labels are out of range, or the set does not fit in memory.
    """
    if config.streaming:
        return _streamed(config)
    raw = LOADERS[config.name](config, progress)
    for where, pixels, labels in (
        ("training", raw.train_pixels, raw.train_labels),
        ("test", raw.test_pixels, raw.test_labels),
    ):
        if len(pixels) != len(labels) or not len(pixels):
            raise UsageError(
                f"data.root ({config.root}): {config.name} holds {len(pixels)} {where} images for {len(labels)} "
                "labels; copy its files again"
            )
        check_labels(labels, raw.num_classes, where)
    pixels, test_pixels = (p if p.ndim == 4 else p[:, None] for p in (raw.train_pixels, raw.test_pixels))
    _check_memory((len(pixels) + len(test_pixels)) * pixels.shape[1] * config.image_size**2, config)
    train, val = _parts(len(pixels), config)
    test = torch.arange(len(test_pixels))
    return Splits(
        Images(_square(pixels, config.image_size, train), _training_labels(raw.train_labels[train], config)),
        Images(_square(pixels, config.image_size, val), raw.train_labels[val]),
        Images(_square(test_pixels, config.image_size, test), raw.test_labels),
        raw.num_classes,
        *_mean_and_std(pixels[some] for some in train.split(CHUNK)),
    )


def _streamed(config: DataConfig) -> Splits:
    """An image folder that stays on disk but for the pictures whose mean is taken; the splits are `load`'s."""
    pool = ThreadPoolExecutor(config.workers, thread_name_prefix="pictures")
    listed = listings(config)
    pictures, test = (StreamedImages([path for path, _ in part.samples], config.image_size, pool) for part in listed)
    labels, test_labels = (torch.tensor(part.targets) for part in listed)
    train, val = _parts(len(pictures), config)
    train_pictures = pictures.subset(train)
    chosen = np.random.default_rng([config.split_seed, 4]).permutation(len(train))[:MEAN_OF]
    return Splits(
        Images(train_pictures, _training_labels(labels[train], config)),
        Images(pictures.subset(val), labels[val]),
        Images(test, test_labels),
        len(listed[0].classes),
        *_mean_and_std([train_pictures[torch.from_numpy(chosen)]]),
    )


def _parts(num: int, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Which of `num` training images are trained on, and which are held out; both in ascending order."""
    order = torch.from_numpy(np.random.default_rng([config.split_seed, 0]).permutation(num))
    num_val = _num_val(num, config)
    return order[num_val:].sort().values, order[:num_val].sort().values


def _training_labels(labels: Tensor, config: DataConfig) -> Tensor:
    if not config.shuffle_labels:
        return labels
    shuffled = np.random.default_rng([config.split_seed, 3]).permutation(len(labels))
    return labels[torch.from_numpy(shuffled)]


def _mean_and_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """[C] mean and standard deviation of pictures in parts [n, C, H, W] uint8, exact: they come from 256-bin counts.

    >>> _mean_and_std([torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)])
    (tensor([100.], dtype=torch.float64), tensor([100.], dtype=torch.float64))
    """
    counted = ([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(1)] for part in parts)
    counts = torch.stack([torch.stack(part) for part in counted]).sum(0).double()  # [C, 256]
    levels = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ levels / total
    variance = counts @ levels.square() / total - mean.square()
    return mean, variance.clamp_min(1.0).sqrt()


def summary(splits: Splits, config: DataConfig) -> dict[str, Any]:
    """What the record keeps of a data set: name, sizes, normalisation and how many images it is from, digest."""
    return {
        "name": config.name,
        "root": None if config.name == "digits" else str(config.root.resolve()),
        "num_train": len(splits.train),
        "num_val": len(splits.val),
        "num_test": len(splits.test),
        "num_classes": splits.num_classes,
        "mean": splits.mean_C.tolist(),
        "std": splits.std_C.tolist(),
        "num_mean": min(len(splits.train), MEAN_OF) if config.streaming else len(splits.train),
        "shuffle_labels": config.shuffle_labels,
        "shape": list(splits.train.pixels.shape[1:]),
        "digest": splits.digest(config.root),
    }
