"""Data sets by name: loaded into memory as uint8, checked, padded and split, or kept on disk (`data.streaming`).

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


CHUNK_SIZE = 1_024  # images copied or counted at a time, to keep temporaries small
MAX_GPU_MEMORY_FRACTION = 0.5  # largest fraction of free GPU memory that data.device=auto uses for images
NUM_MEAN_IMAGES = 4_096  # training images that give mean and standard deviation of a streamed data set


class Images(NamedTuple):
    """One split."""

    pixels: Tensor | StreamedImages | HostImages  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same images on a device; streamed images are copied there when indexed."""
        assert not isinstance(self.pixels, HostImages)  # already has its device
        return Images(self.pixels.to(device), self.labels.to(device))

    def on_host(self, device: torch.device) -> "Images":
        """The same images in host memory, copied to `device` when indexed; labels are on `device`."""
        assert isinstance(self.pixels, Tensor)
        return Images(HostImages(self.pixels, device), self.labels.to(device))

    def take(self, indices: Tensor, device_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [n, C, H, W] and labels [n] at `indices` [n] int64; `device_indices`: a copy on the labels' device."""
        if isinstance(self.pixels, Tensor):
            # 20 times as fast as indexing
            return self.pixels.index_select(0, device_indices), self.labels[device_indices]
        return self.pixels[indices], self.labels[device_indices]  # reading device_indices would synchronize the GPU

    def prefetch(self, indices: Tensor) -> None:
        """Announce that `indices` [n] are used next, so that images outside the device can be prefetched."""
        if not isinstance(self.pixels, Tensor):
            self.pixels.prefetch(indices)

    def fingerprint(self, root: Path) -> Iterator[Any]:
        """Bytes to hash: pixels (for streamed images paths and file sizes), then labels."""
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
    """[C] float64, mean of the training pixels without padding; of at most NUM_MEAN_IMAGES streamed images."""
    std_C: Tensor
    """[C] float64, standard deviation of the same pixels, at least 1 grey level."""

    @property
    def in_channels(self) -> int:
        """C, the number of channels."""
        return self.train.pixels.shape[1]

    def digest(self, root: Path = Path()) -> str:
        """Hex hash of all labels and pixels of all splits; for streamed images, of paths in `root` and file sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for images in (self.train, self.val, self.test):
            for part in images.fingerprint(root):
                digest.update(part)
        return digest.hexdigest()


def place_splits(splits: Splits, config: DataConfig, device: torch.device) -> Splits:
    """The splits with their images in the memory that `data.device` requests, for training on `device`.

    Raises:
        UsageError: if data.device=cuda and the images do not fit; nothing is copied then.
    """
    move = Images.to
    if device.type == "cuda" and not config.streaming:
        torch.cuda.empty_cache()  # memory cached by torch is also free
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(images.pixels.shape.numel() for images in (splits.train, splits.val, splits.test))
        if config.device == "cuda" and needed > free:
            raise UsageError(
                f"data.device (cuda) keeps the {needed / 2**30:.3g} GiB of {config.name} in the memory of every GPU, "
                f"and {torch.cuda.get_device_name(device)} has {free / 2**30:.3g} GiB free: choose data.device=auto, "
                "or cpu"
            )
        if config.device == "cpu" or (config.device == "auto" and needed > free * MAX_GPU_MEMORY_FRACTION):
            move = Images.on_host
    train, val, test = (move(images, device) for images in (splits.train, splits.val, splits.test))
    return splits._replace(train=train, val=val, test=test)


class _Raw(NamedTuple):
    """A data set as stored in its files: pixels [N, H, W] or [N, C, H, W] uint8, labels [N]."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    num_classes: int


Progress = Callable[[str, int, int], None]
"""Callback with the name of the task, the number of completed items, and their total."""


def _silent(task: str, done: int, total: int) -> None:
    """Report no progress."""


def _digits(config: DataConfig, progress: Progress) -> _Raw:
    """The 1,797 handwritten digits of the UCI test set (Alpaydin & Kaynak 1998, as in scikit-learn); 8 x 8, 0 to 16.

    Every fifth image is a test image: the data set has no split of its own.
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
}  # those of imagefolder are read from disk


def _torchvision(config: DataConfig, progress: Progress) -> _Raw:
    from torchvision import datasets  # slow import, and digits do not need it

    class_name, folder = TORCHVISION[config.name]
    cls = getattr(datasets, class_name)
    data_folder = config.root / folder
    try:
        train, test = (cls(str(config.root), train=part, download=config.download) for part in (True, False))
    except Exception as error:  # torchvision raises many error types, RuntimeError for missing files
        if "not found" in str(error):
            files = cls.resources if "MNIST" in class_name else [*cls.train_list, *cls.test_list]
            names = ", ".join(Path(name).name.removesuffix(".gz") for name, _ in files)
            raise UsageError(
                f"data.root ({config.root}) does not contain {config.name}: {data_folder} needs the unmodified files "
                f"{names}; copy them there, or let torchvision download them with --data.download true"
            ) from None
        raise UsageError(
            f"data.root ({config.root}): the files of {config.name} in {data_folder} are damaged or cannot be "
            f"downloaded ({type(error).__name__}: {error}); remove them and copy them again or use --data.download true"
        ) from None
    sets = []
    for part in (train, test):
        pixels = torch.as_tensor(part.data)
        sets += [pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels, torch.as_tensor(part.targets).long()]
    return _Raw(*sets, num_classes=len(train.classes))


def list_image_folders(config: DataConfig) -> "list[ImageFolder]":
    """The image files in root/train/CLASS and root/test/CLASS, as [train, test]; no file is opened.

    Raises:
        UsageError: if a folder is missing or empty, or the two have different classes.
    """
    from torchvision.datasets import ImageFolder

    folders: list[ImageFolder] = []
    for part in ("train", "test"):
        folder = config.root / part
        try:
            folders.append(ImageFolder(str(folder)))
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"data.root ({config.root}) is not an image folder: {folder} needs one sub-folder of images per class "
                f"({error}); arrange the files as {folder}/CLASS/IMAGE.jpg"
            ) from None
    if unmatched := sorted(set(folders[0].classes) ^ set(folders[1].classes)):
        raise UsageError(
            f"data.root ({config.root}): class {unmatched[0]} is not in both train/ and test/: make them match"
        )
    return folders


def _imagefolder(config: DataConfig, progress: Progress) -> _Raw:
    """root/train/CLASS/*.jpg and root/test/CLASS/*.jpg, decoded once, resized to image_size, three channels."""
    size = config.image_size
    sets: list[Tensor] = []
    folders = list_image_folders(config)
    for part, listing in zip(("train", "test"), folders, strict=True):
        _check_memory(len(listing.samples) * 3 * size * size, config)
        pixels = torch.empty(len(listing.samples), 3, size, size, dtype=torch.uint8)

        def decode(job: tuple[int, str], pixels: Tensor = pixels) -> None:
            position, path = job
            pixels[position] = read_image(path, size)

        with ThreadPoolExecutor() as pool:
            jobs = [(position, path) for position, (path, _) in enumerate(listing.samples)]
            for done, _ in enumerate(pool.map(decode, jobs), 1):
                if done % 500 == 0:
                    progress(f"reading {part} images", done, len(jobs))
        sets += [pixels, torch.tensor(listing.targets)]
    return _Raw(*sets, num_classes=len(folders[0].classes))


LOADERS: dict[str, Callable[[DataConfig, Progress], _Raw]] = {
    "digits": _digits,
    **dict.fromkeys(TORCHVISION, _torchvision),
    "imagefolder": _imagefolder,
}


def _check_memory(num_bytes: int, config: DataConfig) -> None:
    if num_bytes > config.memory_gib * 2**30:
        raise UsageError(
            f"data.memory_gib ({config.memory_gib}) is less than the {num_bytes / 2**30:.1f} GiB that {config.name} "
            "needs: raise it if the machine has the memory, or choose a smaller data.image_size"
        )


class Sizes(NamedTuple):
    """Size of a data set."""

    num_train: int
    num_val: int
    num_test: int
    num_classes: int
    in_channels: int
    num_bytes: int
    """Memory in bytes: 1 per pixel, 8 per label; of streamed images, only the prefetched ones."""


def sizes(config: DataConfig) -> Sizes:
    """Size of the data set that `load` would return, without opening an image; only imagefolder reads file names.

    Raises:
        UsageError: if an image folder is missing, or the data set exceeds data.memory_gib.

    >>> sizes(DataConfig(name="cifar10"))
    Sizes(num_train=45000, num_val=5000, num_test=10000, num_classes=10, in_channels=3, num_bytes=184800000)
    """
    if config.name == "imagefolder":
        train, test = list_image_folders(config)
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


def _select_and_pad(pixels: Tensor, size: int, indices: Tensor) -> Tensor:
    """Images `indices` [n] of [N, C, H, W] uint8, zero-padded on all sides to [n, C, size, size]."""
    channels, height, width = pixels.shape[1:]
    if max(height, width) > size:
        raise UsageError(
            f"data.image_size ({size}) is smaller than the {height} x {width} images: "
            f"choose at least {max(height, width)}"
        )
    left, top = (size - width) // 2, (size - height) // 2
    out = pixels.new_zeros(len(indices), channels, size, size)
    center = out[:, :, top : top + height, left : left + width]
    for target, chunk in zip(center.split(CHUNK_SIZE), indices.split(CHUNK_SIZE), strict=True):
        target.copy_(pixels[chunk])
    return out


def check_labels(labels: Tensor, num_classes: int, split_name: str) -> None:
    """Refuse labels that are not a class.

    Raises:
        UsageError: if a label is outside 0 .. num_classes - 1.
    """
    invalid = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(invalid):
        position = int(invalid[0])
        raise UsageError(
            f"the {split_name} labels contain {int(labels[position])} at position {position}, outside 0 to "
            f"{num_classes - 1}: fix the labels of the data set"
        )


def load(config: DataConfig, progress: Progress = _silent) -> Splits:
    """The data set `data.name`, with the validation split drawn by `data.split_seed`.

    Raises:
        UsageError: if files are missing or damaged, labels are out of range, or the data set exceeds data.memory_gib.
    """
    if config.streaming:
        return _streamed(config)
    raw = LOADERS[config.name](config, progress)
    for split_name, pixels, labels in (
        ("training", raw.train_pixels, raw.train_labels),
        ("test", raw.test_pixels, raw.test_labels),
    ):
        if len(pixels) != len(labels) or not len(pixels):
            raise UsageError(
                f"data.root ({config.root}): {config.name} contains {len(pixels)} {split_name} images for "
                f"{len(labels)} labels; copy its files again"
            )
        check_labels(labels, raw.num_classes, split_name)
    pixels, test_pixels = (p if p.ndim == 4 else p[:, None] for p in (raw.train_pixels, raw.test_pixels))
    _check_memory((len(pixels) + len(test_pixels)) * pixels.shape[1] * config.image_size**2, config)
    train, val = _train_val_positions(len(pixels), config)
    test = torch.arange(len(test_pixels))
    return Splits(
        Images(_select_and_pad(pixels, config.image_size, train), _training_labels(raw.train_labels[train], config)),
        Images(_select_and_pad(pixels, config.image_size, val), raw.train_labels[val]),
        Images(_select_and_pad(test_pixels, config.image_size, test), raw.test_labels),
        raw.num_classes,
        *_mean_and_std(pixels[chunk] for chunk in train.split(CHUNK_SIZE)),
    )


def _streamed(config: DataConfig) -> Splits:
    """An image folder kept on disk; only the images for mean and std are read. The splits are those of `load`."""
    pool = ThreadPoolExecutor(config.workers, thread_name_prefix="image-reader")
    folders = list_image_folders(config)
    images, test = (StreamedImages([path for path, _ in part.samples], config.image_size, pool) for part in folders)
    labels, test_labels = (torch.tensor(part.targets) for part in folders)
    train, val = _train_val_positions(len(images), config)
    train_images = images.subset(train)
    chosen = np.random.default_rng([config.split_seed, 4]).permutation(len(train))[:NUM_MEAN_IMAGES]
    return Splits(
        Images(train_images, _training_labels(labels[train], config)),
        Images(images.subset(val), labels[val]),
        Images(test, test_labels),
        len(folders[0].classes),
        *_mean_and_std([train_images[torch.from_numpy(chosen)]]),
    )


def _train_val_positions(num: int, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Positions of the training and the validation images among `num` images, both in ascending order."""
    permutation = torch.from_numpy(np.random.default_rng([config.split_seed, 0]).permutation(num))
    num_val = _num_val(num, config)
    return permutation[num_val:].sort().values, permutation[:num_val].sort().values


def _training_labels(labels: Tensor, config: DataConfig) -> Tensor:
    if not config.shuffle_labels:
        return labels
    shuffled = np.random.default_rng([config.split_seed, 3]).permutation(len(labels))
    return labels[torch.from_numpy(shuffled)]


def _mean_and_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """[C] mean and standard deviation of images in parts [n, C, H, W] uint8; exact, from counts of the 256 levels.

    >>> _mean_and_std([torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)])
    (tensor([100.], dtype=torch.float64), tensor([100.], dtype=torch.float64))
    """
    histograms = ([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(1)] for part in parts)
    counts = torch.stack([torch.stack(part) for part in histograms]).sum(0).double()  # [C, 256]
    levels = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ levels / total
    variance = counts @ levels.square() / total - mean.square()
    return mean, variance.clamp_min(1.0).sqrt()


def summary(splits: Splits, config: DataConfig) -> dict[str, Any]:
    """Description of a data set for run.json: name, sizes, normalisation and its number of images, digest."""
    return {
        "name": config.name,
        "root": None if config.name == "digits" else str(config.root.resolve()),
        "num_train": len(splits.train),
        "num_val": len(splits.val),
        "num_test": len(splits.test),
        "num_classes": splits.num_classes,
        "mean": splits.mean_C.tolist(),
        "std": splits.std_C.tolist(),
        "num_mean": min(len(splits.train), NUM_MEAN_IMAGES) if config.streaming else len(splits.train),
        "shuffle_labels": config.shuffle_labels,
        "shape": list(splits.train.pixels.shape[1:]),
        "digest": splits.digest(config.root),
    }
