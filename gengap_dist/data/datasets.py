"""Data sets by name: loaded into memory, checked, padded and split, or kept on disk (`data.streaming`, `data.text`).

Shapes: N samples; of images C channels, H = W = image_size; of tokens sequences of T.
"""

import hashlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.loading import as_text
from gengap_dist.config.sections import DataConfig
from gengap_dist.data import TORCHVISION
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.host_images import HostImages
from gengap_dist.data.image_folder import DECODING, ImageListing, list_images, read_image
from gengap_dist.data.mixing import is_mixed
from gengap_dist.data.reading import FirstPass, ReadInputs, SampleReader, Stored
from gengap_dist.data.streaming import PREFETCH_BYTES, StreamedImages
from gengap_dist.data.text import load_tokens
from gengap_dist.data.user import DatasetSource, OwnData, SampleKind, Source, StreamSource, load_user_data
from gengap_dist.distributed.cores import available_cores
from gengap_dist.errors import UsageError, first_of

CHUNK_SIZE = 1_024  # images copied or counted at a time, to keep temporaries small
MAX_GPU_MEMORY_FRACTION = 0.5  # largest fraction of free GPU memory that data.device=auto uses for images
OWN_TEST_FRACTION = 0.1  # of a user's training samples, if there is no test part
NUM_MEAN_IMAGES = 4_096  # training images that give mean and standard deviation of a streamed data set


class Arrays(NamedTuple):
    """A data set in memory; images are [N, H, W] or [N, C, H, W] uint8."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int
    facts: Mapping[str, Any] = {}
    """More for run.json."""


class Samples(NamedTuple):
    """One split."""

    inputs: Tensor | StreamedImages | HostImages | ReadInputs
    """[N, C, H, W] uint8 images, [N, T] tokens, or [N, ...] real numbers."""
    targets: Tensor
    """[N] int64 classes, [N, T] tokens as in `token_stream`, or [N, ...] real numbers."""

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.targets)

    @property
    def stream(self) -> StreamSource | None:
        """What reads them, if they are a stream that memory does not hold."""
        inputs = self.inputs
        return inputs.reader if isinstance(inputs, ReadInputs) and isinstance(inputs.reader, StreamSource) else None

    def to(self, device: torch.device) -> "Samples":
        """The same samples on a device; streamed images are copied there when indexed."""
        assert not isinstance(self.inputs, HostImages)  # already has its device
        return Samples(self.inputs.to(device), self.targets.to(device))

    def on_host(self, device: torch.device) -> "Samples":
        """The same samples with inputs in host memory, copied to `device` when indexed; targets are on `device`."""
        assert isinstance(self.inputs, Tensor)
        return Samples(HostImages(self.inputs, device), self.targets.to(device))

    def take(self, indices: Tensor, device_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [n, ...] and targets [n, ...] at `indices` [n] int64; `device_indices`: a copy where targets are."""
        if isinstance(self.inputs, Tensor):
            # 20 times as fast as indexing
            return self.inputs.index_select(0, device_indices), self.targets[device_indices]
        inputs = self.inputs.for_training(indices) if isinstance(self.inputs, ReadInputs) else self.inputs[indices]
        return inputs, self.targets[device_indices]  # reading device_indices would synchronize the GPU

    def prefetch(self, indices: Tensor) -> None:
        """Announce that `indices` [n] are used next, so that inputs outside the device can be prefetched."""
        if not isinstance(self.inputs, Tensor):
            self.inputs.prefetch(indices)

    def fingerprint(self, root: Path) -> Iterator[Any]:
        """Bytes to hash: inputs (for streamed images paths and file sizes), then targets."""
        if isinstance(self.inputs, StreamedImages):
            yield from self.inputs.fingerprint(root)
        else:
            assert not isinstance(self.inputs, ReadInputs)  # the digest was made while all was read
            inputs = self.inputs.pixels if isinstance(self.inputs, HostImages) else self.inputs
            yield np.ascontiguousarray(inputs.cpu().numpy()).data
        yield np.ascontiguousarray(self.targets.cpu().numpy()).data


class Splits(NamedTuple):
    """A data set ready for training; `val` may be empty."""

    train: Samples
    val: Samples
    test: Samples
    spec: DataSpec
    pixels: "PixelStatistics | None" = None
    """Of images; other inputs are not normalised."""
    facts: Mapping[str, Any] = {}
    """More of an image folder for run.json: class names, number of skipped files, how files are decoded."""
    known_digest: str | None = None
    """What `digest` returns, if it was made while the samples were read."""
    in_order: bool = False
    """Training samples are a stream, in whose order they are used."""

    def close(self) -> None:
        """End processes that read samples; they start again when samples are announced."""
        for part in (self.train, self.val, self.test):
            if isinstance(part.inputs, ReadInputs):
                part.inputs.reader.close()

    def digest(self, root: Path = Path()) -> str:
        """Hex hash of all targets and inputs of all splits; for streamed images, of paths in `root` and file sizes."""
        if self.known_digest is not None:
            return self.known_digest
        digest = hashlib.blake2b(digest_size=16)
        for samples in (self.train, self.val, self.test):
            for part in samples.fingerprint(root):
                digest.update(part)
        return digest.hexdigest()

    def target_digests(self) -> dict[str, str]:
        """Hex hash of the targets of each part."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {
            name: hashlib.blake2b(np.ascontiguousarray(part.targets.cpu().numpy()).data, digest_size=8).hexdigest()
            for name, part in parts.items()
        }


class PixelStatistics(NamedTuple):
    """Mean and standard deviation of the training pixels, without padding; of at most NUM_MEAN_IMAGES streamed images.

    Both are [C] float64, in grey levels.
    """

    mean_C: Tensor
    std_C: Tensor
    """At least 1."""


def place_splits(splits: Splits, config: DataConfig, device: torch.device) -> Splits:
    """The splits with their inputs in the memory that `data.device` requests, for training on `device`.

    Raises:
        UsageError: if data.device=cuda and the inputs do not fit; nothing is copied then.
    """
    move = Samples.to
    if device.type == "cuda" and not isinstance(splits.train.inputs, StreamedImages | ReadInputs):
        torch.cuda.empty_cache()  # memory cached by torch is also free
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(_num_bytes(samples.inputs) for samples in (splits.train, splits.val, splits.test))
        if config.device == "cuda" and needed > free:
            raise UsageError(
                f"data.device (cuda) keeps the {needed / 2**30:.3g} GiB of {config.name} in the memory of every GPU, "
                f"and {torch.cuda.get_device_name(device)} has {free / 2**30:.3g} GiB free: choose data.device=auto, "
                "or cpu"
            )
        if config.device == "cpu" or (config.device == "auto" and needed > free * MAX_GPU_MEMORY_FRACTION):
            move = Samples.on_host
    train, val, test = (move(samples, device) for samples in (splits.train, splits.val, splits.test))
    return splits._replace(train=train, val=val, test=test)


def _num_bytes(inputs: Tensor | StreamedImages | HostImages | ReadInputs) -> int:
    if isinstance(inputs, ReadInputs):
        return min(inputs.shape.numel() * inputs.stored.dtype.itemsize, PREFETCH_BYTES)
    return inputs.nbytes if isinstance(inputs, Tensor) else inputs.shape.numel()


Progress = Callable[[str, int, int], None]
"""Callback with the name of the task, the number of completed items, and their total."""


def _silent(task: str, done: int, total: int) -> None:
    """Report no progress."""


def _digits(config: DataConfig, progress: Progress) -> Arrays:
    """The 1,797 handwritten digits of the UCI test set (Alpaydin & Kaynak 1998, as in scikit-learn); 8 x 8, 0 to 16.

    Every fifth image is a test image: the data set has no split of its own.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels = torch.from_numpy(file["images"]).to(torch.int32) * 255 // 16
        labels = torch.from_numpy(file["labels"]).long()
    test = torch.arange(len(labels)) % 5 == 0
    pixels = pixels.to(torch.uint8)
    return Arrays(pixels[~test], labels[~test], pixels[test], labels[test], 10)


COUNTS = {  # name: training images, test images, classes, channels
    "digits": (1_437, 360, 10, 1),
    "mnist": (60_000, 10_000, 10, 1),
    "fashion_mnist": (60_000, 10_000, 10, 1),
    "cifar10": (50_000, 10_000, 10, 3),
    "cifar100": (50_000, 10_000, 100, 3),
}  # those of imagefolder are read from disk


MD5_OF_MNIST = {  # torchvision checks the archives only, and both have files of the same names
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def _check_digests(name: str, folder: Path) -> None:
    """Refuse files that are not those of the data set `name`.

    Raises:
        UsageError: names the file, and the data set that it belongs to, if that is known.
    """
    for file, expected in MD5_OF_MNIST.get(name, {}).items():
        with (folder / file).open("rb") as opened:
            found = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != expected:
            others = [other for other, digests in MD5_OF_MNIST.items() if digests[file] == found]
            belongs = f"is that of {others[0]}" if others else f"has the MD5 digest {found}, not {expected}"
            raise UsageError(
                f"data.name ({name}): {folder / file} {belongs}: copy the unmodified file, or give your own data as "
                "module.path:factory"
            )


def _torchvision(config: DataConfig, progress: Progress) -> Arrays:
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
    _check_digests(config.name, data_folder)
    sets = []
    for part in (train, test):
        pixels = torch.as_tensor(part.data)
        sets += [pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels, torch.as_tensor(part.targets).long()]
    return Arrays(*sets, num_classes=len(train.classes))


def list_image_folders(config: DataConfig) -> list[ImageListing]:
    """The image files in root/train/CLASS and root/test/CLASS, as [train, test]; no file is opened.

    Warns of files that are skipped.

    Raises:
        UsageError: if a folder is missing or empty, a file is in two classes, or the two have different classes.
    """
    listings: list[ImageListing] = []
    for part in ("train", "test"):
        folder = config.root / part
        try:
            listings.append(list_images(folder))
        except UsageError as error:
            raise UsageError(
                f"data.root ({config.root}) is not an image folder: {folder} needs one sub-folder of images per class "
                f"({error}); arrange the files as {folder}/CLASS/IMAGE.jpg, or set data.root to the folder that has "
                f"{folder.name}"
            ) from None
        if skipped := listings[-1].skipped:
            warnings.warn(
                f"{folder}: {len(skipped):,} file(s) are no images, or links to one that is listed, and are skipped: "
                f"{first_of(skipped)}",
                stacklevel=2,
            )
    if unmatched := sorted(set(listings[0].classes) ^ set(listings[1].classes)):
        raise UsageError(
            f"data.root ({config.root}): class {unmatched[0]} is not in both train/ and test/: make them match"
        )
    return listings


def _imagefolder(config: DataConfig, progress: Progress) -> Arrays:
    """root/train/CLASS/*.jpg and root/test/CLASS/*.jpg, decoded once, resized to image_size, three channels."""
    size = config.image_size
    sets: list[Tensor] = []
    folders, large = list_image_folders(config), threading.Lock()
    for part, listing in zip(("train", "test"), folders, strict=True):
        _check_memory(len(listing.paths) * 3 * size * size, config)
        pixels = torch.empty(len(listing.paths), 3, size, size, dtype=torch.uint8)

        def decode(job: tuple[int, str], pixels: Tensor = pixels) -> None:
            position, path = job
            pixels[position] = read_image(path, size, large)

        pool = ThreadPoolExecutor(available_cores().whole)
        try:
            jobs = [*enumerate(listing.paths)]
            for done, _ in enumerate(pool.map(decode, jobs), 1):
                if done % 500 == 0:
                    progress(f"reading {part} images", done, len(jobs))
        finally:  # an interrupted command does not wait for a file system that does not answer
            pool.shutdown(wait=False, cancel_futures=True)
        sets += [pixels, torch.tensor(listing.targets)]
    return Arrays(*sets, num_classes=len(folders[0].classes), facts=_folder_facts(folders))


LOADERS: dict[str, Callable[[DataConfig, Progress], Arrays]] = {
    "digits": _digits,
    **dict.fromkeys(TORCHVISION, _torchvision),
    "imagefolder": _imagefolder,
}


def _folder_facts(listings: Sequence[ImageListing]) -> dict[str, Any]:
    num_skipped = sum(len(listing.skipped) for listing in listings)
    return {"classes": listings[0].classes, "num_skipped_files": num_skipped, "decoding": DECODING}


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
    num_bytes: int
    """Memory in bytes: 1 per pixel, 8 per class; of streamed images, only the prefetched ones."""
    spec: DataSpec


def sizes(config: DataConfig) -> Sizes:
    """Size of the data set that `load` would return, without opening an image.

    Only imagefolder reads file names; tokens and a user's own data set are loaded.

    Raises:
        UsageError: if an image folder is missing, the data set exceeds data.memory_gib, or is smaller than
            data.num_train, or a user's own is not valid.

    >>> sizes(DataConfig(name="cifar10"))[:4]
    (45000, 5000, 10000, 184800000)
    """
    if config.is_own or config.is_tokens:
        splits = load(config)
        parts = splits.train, splits.val, splits.test
        num_bytes = sum(_num_bytes(samples.inputs) + samples.targets.nbytes for samples in parts)
        num_train, num_val, num_test = map(len, parts)
        return Sizes(num_train, num_val, num_test, num_bytes, splits.spec)
    if config.name == "imagefolder":
        train, test = list_image_folders(config)
        num, num_test, num_classes, channels = len(train.paths), len(test.paths), len(train.classes), 3
    else:
        num, num_test, num_classes, channels = COUNTS[config.name]
    sample_bytes = channels * config.image_size**2
    if not config.streaming:
        _check_memory((num + num_test) * sample_bytes, config)  # while it is loaded, without regard to the subset
    num_val = _num_val(num, config)
    num_train = _num_train(num - num_val, config)
    num_kept = num_train + num_val + num_test
    num_bytes = num_kept * sample_bytes
    if config.streaming:
        num_bytes = min(num_bytes, PREFETCH_BYTES)
    spec = DataSpec.images(num_classes, channels, config.image_size)
    return Sizes(num_train, num_val, num_test, num_bytes + 8 * num_kept, spec)


def _num_val(num: int, config: DataConfig) -> int:
    return int(num * config.val_fraction)


def _num_train(num: int, config: DataConfig) -> int:
    """Number of training samples that are used, of `num` that are not held out for validation."""
    if config.num_train is None:
        return num
    if config.num_train > num:
        raise UsageError(
            f"data.num_train ({config.num_train:,}) is more than the {num:,} training samples of {config.name} "
            f"that are not held out for validation: choose at most {num}, a smaller data.val_fraction, or "
            "data.num_train=null"
        )
    return config.num_train


def _select_and_pad(pixels: Tensor, size: int, indices: Tensor) -> Tensor:
    """Images `indices` [n] of [N, C, H, W] uint8, zero-padded on all sides to [n, C, size, size]."""
    channels, height, width = pixels.shape[1:]
    _check_image_size(height, width, size)
    left, top = (size - width) // 2, (size - height) // 2
    out = pixels.new_zeros(len(indices), channels, size, size)
    center = out[:, :, top : top + height, left : left + width]
    for target, chunk in zip(center.split(CHUNK_SIZE), indices.split(CHUNK_SIZE), strict=True):
        target.copy_(pixels[chunk])
    return out


def _check_image_size(height: int, width: int, size: int) -> None:
    if max(height, width) > size:
        raise UsageError(
            f"data.image_size ({size}) is smaller than the {height} x {width} images: "
            f"choose at least {max(height, width)}"
        )


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


def load(config: DataConfig, progress: Progress = _silent, *, seed: int = 0) -> Splits:
    """The data set `data.name`, with the validation split drawn by `data.split_seed`.

    Args:
        config: the data set.
        progress: reports what is read.
        seed: of the run; it draws the training subset with data.subset=per_seed, and has no effect otherwise.

    Raises:
        UsageError: if files are missing or damaged, labels are out of range, the data set exceeds data.memory_gib, or
            it has fewer training samples than data.num_train.
    """
    if config.is_own:
        return _own_splits(config, progress, seed)
    if config.streaming:
        return _streamed(config, seed)
    if config.is_tokens:
        return _token_splits(config, progress, seed)
    raw = LOADERS[config.name](config, progress)
    num_classes = raw.num_classes
    for split_name, pixels, labels in (
        ("training", raw.train_inputs, raw.train_targets),
        ("test", raw.test_inputs, raw.test_targets),
    ):
        if len(pixels) != len(labels) or not len(pixels):
            raise UsageError(
                f"data.root ({config.root}): {config.name} contains {len(pixels)} {split_name} images for "
                f"{len(labels)} labels; copy its files again"
            )
        check_labels(labels, num_classes, split_name)
    pixels, test_pixels = (p if p.ndim == 4 else p[:, None] for p in (raw.train_inputs, raw.test_inputs))
    if "rand_augment" in config.augment and pixels.shape[1] not in (1, 3):
        raise UsageError(
            f"data.augment (rand_augment) needs images with 1 or 3 channels, and those of {config.name} have "
            f"{pixels.shape[1]}: leave it out"
        )
    _check_memory((len(pixels) + len(test_pixels)) * pixels.shape[1] * config.image_size**2, config)
    train, val = _train_val_positions(len(pixels), config, seed)
    test = torch.arange(len(test_pixels))
    return Splits(
        Samples(_select_and_pad(pixels, config.image_size, train), _shuffled(raw.train_targets[train], config)),
        Samples(_select_and_pad(pixels, config.image_size, val), raw.train_targets[val]),
        Samples(_select_and_pad(test_pixels, config.image_size, test), raw.test_targets),
        DataSpec.images(num_classes, pixels.shape[1], config.image_size),
        _mean_and_std(pixels[chunk] for chunk in train.split(CHUNK_SIZE)),
        raw.facts,
    )


def _own_splits(config: DataConfig, progress: Progress, seed: int) -> Splits:
    """The splits of a user's data set, held in memory or read during training, with equal results."""
    data = load_user_data(config.name)
    stored = _stored(data.kind, config)
    places, drawn = _own_places(data, config, seed)
    is_held = _is_held(data, places, stored, config)
    first_pass = FirstPass(f"data.name ({config.name})", data.kind, stored, progress)
    readers = {} if is_held else _readers(data, stored, config)
    in_order = isinstance(data.parts["train"], StreamSource)
    if in_order and not is_held and is_mixed(config):
        raise UsageError(
            f"data.augment ({', '.join(config.augment)}) mixes each image with one from anywhere, and the iterable "
            f"data set that {config.name} returns is read in its own order: raise data.memory_gib "
            f"({config.memory_gib:g}) until memory holds it, or leave mixup and cutmix out"
        )
    splits: dict[str, Samples] = {}
    pixels = None
    with ExitStack() as on_error:
        for reader, _ in readers.values():
            on_error.callback(reader.close)
        for name, (source, positions) in places.items():
            read = None if id(source) not in readers else ReadInputs(*readers[id(source)], positions, stored)
            part = first_pass.begin(name, source, positions, read)
            if data.kind.is_image and name == "train":
                pixels = _mean_and_std(first_pass.chunks(part))
            else:
                deque(first_pass.chunks(part), maxlen=0)
            targets = _shuffled(part.targets, config) if name == "train" else part.targets
            first_pass.add_to_digest(targets)
            splits[name] = Samples(part.inputs if read is None else read, targets)
        on_error.pop_all()
    return Splits(
        **splits,
        spec=_own_spec(data.kind, stored, first_pass, config),
        pixels=pixels,
        facts={"drawn_from_train": drawn, "in_order": in_order},
        known_digest=first_pass.digest.hexdigest(),
        in_order=in_order,
    )


def _stored(kind: SampleKind, config: DataConfig) -> Stored:
    """How inputs of a user's data set are kept."""
    if not kind.is_image:
        if config.augment:
            raise UsageError(
                f"data.augment ({', '.join(config.augment)}) changes images, and the inputs of {config.name} are no "
                "uint8 images: set data.augment=[]"
            )
        return Stored(kind.input_shape, kind.input_dtype, is_image=False)
    *channels, height, width = kind.input_shape
    _check_image_size(height, width, config.image_size)
    return Stored((channels[0] if channels else 1, config.image_size, config.image_size), torch.uint8, is_image=True)


def _readers(data: OwnData, stored: Stored, config: DataConfig) -> dict[int, tuple[SampleReader | StreamSource, int]]:
    """What reads the sources that memory does not hold, and their number in it; arrays are in memory already."""
    sources = [each for each in data.parts.values() if isinstance(each, DatasetSource)]
    num_workers = min(config.workers, available_cores().whole)
    reader = SampleReader(config.name, sources, num_workers, stored.num_bytes) if sources else None
    found: dict[int, tuple[SampleReader | StreamSource, int]] = {}
    for source in data.parts.values():
        if isinstance(source, StreamSource):
            found[id(source)] = source, 0
        elif isinstance(source, DatasetSource) and reader is not None:
            found[id(source)] = reader, sources.index(source)
    return found


def _own_places(data: OwnData, config: DataConfig, seed: int) -> tuple[dict[str, tuple[Source, Tensor]], list[str]]:
    """Source and positions of train, val and test, and which of the last two are drawn from train."""
    train = data.parts["train"]
    positions = torch.arange(len(train))
    drawn = [name for name in ("val", "test") if name not in data.parts]
    if isinstance(train, StreamSource) and "test" in drawn:
        raise UsageError(
            f"data.name ({config.name}) returns an iterable data set, of which no test samples can be drawn: return "
            "test, and val unless data.val_fraction is 0"
        )
    places: dict[str, tuple[Source, Tensor]] = {}
    if "test" in drawn:
        shuffled = torch.from_numpy(np.random.default_rng([0, 9]).permutation(len(positions)))
        num_test = max(1, int(len(positions) * OWN_TEST_FRACTION))
        places["test"] = train, positions[shuffled[:num_test].sort().values]
        positions = positions[shuffled[num_test:].sort().values]
    if "val" in drawn:
        if isinstance(train, StreamSource):
            if config.val_fraction:
                raise UsageError(
                    f"data.val_fraction ({config.val_fraction}) cannot be held out of the iterable data set that "
                    f"{config.name} returns: return val, or set data.val_fraction=0"
                )
            chosen, val = _subset(positions, config, seed), positions[:0]
        else:
            chosen, val = _train_val_positions(len(positions), config, seed)
        places["val"], positions = (train, positions[val]), positions[chosen]
    else:
        positions = _subset(positions, config, seed)
    if not len(positions):
        raise UsageError(f"data.name ({config.name}) returns too few samples to hold some out: return more")
    for name in ("val", "test"):
        if name not in drawn:
            places[name] = data.parts[name], torch.arange(len(data.parts[name]))
    return {"train": (train, positions), "val": places["val"], "test": places["test"]}, drawn


def _is_held(data: OwnData, places: Mapping[str, tuple[Source, Tensor]], stored: Stored, config: DataConfig) -> bool:
    """Whether memory holds a user's data set.

    Raises:
        UsageError: if it consists of arrays that are larger than data.memory_gib.
    """
    num_bytes = stored.num_bytes + data.kind.num_bytes  # and targets, which are always held
    num_bytes *= sum(len(positions) for _, positions in places.values())
    if data.in_memory:
        _check_memory(num_bytes, config)
        return True
    return not config.streaming and num_bytes <= config.memory_gib * 2**30


def _own_spec(kind: SampleKind, stored: Stored, found: FirstPass, config: DataConfig) -> DataSpec:
    """What a user's data set gives to a network."""
    has_classes = not kind.target_dtype.is_floating_point
    if kind.is_image and not has_classes:
        raise UsageError(f"data.name ({config.name}) returns images with real targets: return one class for each image")
    if config.vocab_size is not None and not kind.is_token:
        raise UsageError(
            f"data.vocab_size ({config.vocab_size}) is for tokens, and {config.name} returns inputs of "
            f"{kind.describe('inputs')}: set it to null"
        )
    if kind.is_token:
        highest = max(found.largest_token, found.largest_class if kind.target_shape else -1)
        vocab_size = config.vocab_size or highest + 1
        if highest >= vocab_size:
            raise UsageError(
                f"data.vocab_size ({vocab_size:,}) has no token {highest:,}, which {config.name} returns: raise it, or "
                "correct the data set"
            )
        if has_classes and kind.target_shape:
            return DataSpec.tokens(vocab_size, kind.input_shape[0])
    num_classes = found.largest_class + 1 if has_classes else None
    output_shape = kind.target_shape if num_classes is None else (num_classes,)
    token = "id" if kind.is_token else None
    return DataSpec(stored.shape, output_shape, kind.target_shape, num_classes, kind.is_image, token)


def _token_splits(config: DataConfig, progress: Progress, seed: int) -> Splits:
    """The splits of a data set of tokens."""
    data = load_tokens(config, progress)
    train = Samples(*data.train)
    if config.num_train is not None:
        positions = _subset(torch.arange(len(train)), config, seed)
        train = Samples(*(part[positions] for part in data.train))
    return Splits(train, Samples(*data.val), Samples(*data.test), data.spec, facts=data.facts)


def _streamed(config: DataConfig, seed: int) -> Splits:
    """An image folder kept on disk; only the images for mean and std are read. The splits are those of `load`."""
    pool = ThreadPoolExecutor(config.workers, thread_name_prefix="image-reader")
    folders = list_image_folders(config)
    images, test = (StreamedImages(part.paths, config.image_size, pool) for part in folders)
    labels, test_labels = (torch.tensor(part.targets) for part in folders)
    train, val = _train_val_positions(len(images), config, seed)
    train_images = images.subset(train)
    chosen = np.random.default_rng([config.split_seed, 4]).permutation(len(train))[:NUM_MEAN_IMAGES]
    return Splits(
        Samples(train_images, _shuffled(labels[train], config)),
        Samples(images.subset(val), labels[val]),
        Samples(test, test_labels),
        DataSpec.images(len(folders[0].classes), 3, config.image_size),
        _mean_and_std([train_images[torch.from_numpy(chosen)]]),
        _folder_facts(folders),
    )


def _train_val_positions(num: int, config: DataConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the training and the validation images among `num` images, both in ascending order.

    The subset of data.num_train is drawn at random from the former, without regard to classes: like a smaller data set.
    """
    permutation = torch.from_numpy(np.random.default_rng([config.split_seed, 0]).permutation(num))
    num_val = _num_val(num, config)
    train, val = permutation[num_val:].sort().values, permutation[:num_val].sort().values
    return _subset(train, config, seed), val


def _subset(train: Tensor, config: DataConfig, seed: int) -> Tensor:
    """Those of the training positions [N] that data.num_train and data.subset draw."""
    if (num_train := _num_train(len(train), config)) == len(train):
        return train
    purpose = (5,) if config.subset == "fixed" else (6, seed)
    chosen = np.random.default_rng([config.split_seed, *purpose]).permutation(len(train))[:num_train]
    return train[torch.from_numpy(chosen).sort().values]


def data_key(config: DataConfig, seed: int) -> object:
    """What decides which data `load` returns: equal keys, the same data.

    >>> data_key(DataConfig(), 1) == data_key(DataConfig(), 2)
    True
    >>> drawn = DataConfig(num_train=9, subset="per_seed")
    >>> data_key(drawn, 1) == data_key(drawn, 2)
    False
    """
    return config, seed if config.subset == "per_seed" else 0


def _shuffled(targets: Tensor, config: DataConfig) -> Tensor:
    """The training targets, permuted if data.shuffle_labels is set."""
    if not config.shuffle_labels:
        return targets
    shuffled = np.random.default_rng([config.split_seed, 3]).permutation(len(targets))
    return targets[torch.from_numpy(shuffled)]


def _mean_and_std(parts: Iterable[Tensor]) -> PixelStatistics:
    """Mean and standard deviation of images in parts [n, C, H, W] uint8; exact, from counts of the 256 levels.

    >>> _mean_and_std([torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1)])
    PixelStatistics(mean_C=tensor([100.], dtype=torch.float64), std_C=tensor([100.], dtype=torch.float64))
    """
    histograms = ([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(1)] for part in parts)
    counts = torch.stack([torch.stack(part) for part in histograms]).sum(0).double()  # [C, 256]
    levels = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ levels / total
    variance = counts @ levels.square() / total - mean.square()
    return PixelStatistics(mean, variance.clamp_min(1.0).sqrt())


def summary(splits: Splits, config: DataConfig) -> dict[str, Any]:
    """Description of a data set for run.json: name, sizes, normalisation and its number of images, digest."""
    spec, pixels = splits.spec, splits.pixels
    normalisation: dict[str, Any] = {}
    if pixels is not None:
        num_mean = len(splits.train)
        num_mean = min(num_mean, NUM_MEAN_IMAGES) if isinstance(splits.train.inputs, StreamedImages) else num_mean
        normalisation = {"mean": pixels.mean_C.tolist(), "std": pixels.std_C.tolist(), "num_mean": num_mean}
    return {
        "name": config.name,
        "root": None if config.name in ("digits", "stdlib") or config.is_own else as_text(str(config.root.resolve())),
        "num_train": len(splits.train),
        "num_val": len(splits.val),
        "num_test": len(splits.test),
        "num_classes": spec.num_classes,
        **normalisation,
        "shuffle_labels": config.shuffle_labels,
        "shape": list(spec.input_shape),
        "output_shape": list(spec.output_shape),
        **({"token": spec.token} if spec.token else {}),
        **splits.facts,
        "digest": splits.digest(config.root),
        "digest_of": "files" if isinstance(splits.train.inputs, StreamedImages) else "values",
        "target_digests": splits.target_digests(),
    }


def recorded_spec(data: Mapping[str, Any]) -> DataSpec:
    """The shapes of a data set from its `summary` in a run.json, also of an older version, which knew images only."""
    num_classes, shape = data["num_classes"], tuple(data["shape"])
    token = data.get("token")
    if token and len(data.get("output_shape") or "TV") == 2:  # a class at each position
        return DataSpec.tokens(num_classes, shape[0], token)
    output_shape = tuple(data.get("output_shape") or [num_classes])
    target_shape = () if num_classes else output_shape
    return DataSpec(shape, output_shape, target_shape, num_classes, "mean" in data, token)
