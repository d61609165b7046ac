"""Folders of image files: which files are images of which class, and how a file becomes pixels.

Training, `gengap plan` and `gengap doctor` take one listing; images in memory and streamed ones are decoded alike.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.loading import as_text
from gengap_dist.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif",
)  # fmt: skip
MAX_PIXELS = 2**26  # of an image: 67 million, which take up to a gigabyte while they are decoded
LARGE_PIXELS = 2**22  # from which on images are not decoded side by side
BACKGROUND = 0  # grey level behind transparent pixels, as that of padding
DECODING = {"background": BACKGROUND, "orientation": "EXIF"}
"""How files are decoded, for run.json."""


class ImageListing(NamedTuple):
    """The image files of one part of an image folder, by class and path."""

    classes: list[str]
    """Names of the sub-folders, sorted; bytes that are no UTF-8 are written as \\xNN."""
    paths: list[str]
    targets: list[int]
    """Class of each file."""
    skipped: list[str]
    """Files that are no images by their ending, and further links to a file that is listed; relative paths, written
    as the classes are."""


def list_images(folder: Path) -> ImageListing:
    """The image files in folder/CLASS/..., each real file once, without hidden files and folders; none is opened.

    A folder is visited once, by whatever links lead to it.

    Raises:
        UsageError: if there is no class, a class has no images, one file is in two classes, or what is named like an
            image is no file that can be read to its end.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name))
    paths: list[str] = []
    targets: list[int] = []
    skipped: list[str] = []
    class_of: dict[Path, str] = {}  # of each real file
    visited: set[Path] = set()
    for target, name in enumerate(classes):
        num_before = len(paths)
        for path in files_below(folder / name, visited):
            real = Path(os.path.realpath(path))
            if path.suffix.lower() not in SUFFIXES or class_of.get(real) == name:
                skipped.append(as_text(path.relative_to(folder).as_posix()))
                continue
            shown = as_text(str(path))
            if not real.is_file():
                raise UsageError(
                    f"{shown} is named like an image and is {kind_of(real)}, not a regular file: remove or rename it"
                )
            if real in class_of:
                raise UsageError(
                    f"{shown} is the same file as one of class {as_text(class_of[real])}, and an image has one class: "
                    "remove one of the two links"
                )
            class_of[real] = name
            paths.append(str(path))
            targets.append(target)
        if len(paths) == num_before:
            raise UsageError(f"{folder / as_text(name)} has no images (files that end in {', '.join(SUFFIXES)})")
    if not classes:
        raise UsageError(f"{folder} has no sub-folder")
    return ImageListing([*map(as_text, classes)], paths, targets, skipped)


def files_below(folder: Path, visited: set[Path] | None = None) -> Iterator[Path]:
    """All files below that are not hidden, in the order of torchvision's ImageFolder: by folder, then by name.

    Args:
        folder: where to begin; links are followed.
        visited: folders that are not followed again; those of this call are added.
    """
    visited = set() if visited is None else visited
    folders: list[tuple[str, list[str]]] = []
    for path, below, files in os.walk(folder, followlinks=True):
        visited.add(Path(path).resolve())
        # a link to a folder that was visited, or to one above, would be followed for ever
        below[:] = [name for name in below if not _is_hidden(name) and (Path(path) / name).resolve() not in visited]
        folders.append((path, sorted(name for name in files if not _is_hidden(name))))
    for path, files in sorted(folders):
        yield from (Path(path) / name for name in files)


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is not data: `.ipynb_checkpoints`, `.trash`, `__MACOSX`, `._0.jpg`.

    >>> [_is_hidden(name) for name in (".trash", "__MACOSX", "cat")]
    [True, True, False]
    """
    return name.startswith(".") or name == "__MACOSX"


def kind_of(path: Path) -> str:
    """What something that is not a regular file is, with its article."""
    if not path.exists():
        return "a link to a file that is not there"
    return "a named pipe" if path.is_fifo() else "a socket or a device"


def read_image(path: str, size: int, large: AbstractContextManager[object] | None = None) -> Tensor:
    """The image file as [3, size, size] uint8, upright, resized if necessary, over a black background.

    Grey levels of 16 bits are scaled to 8.

    Args:
        path: of the file.
        size: width and height in pixels.
        large: entered while an image of more than LARGE_PIXELS is decoded: with a lock, one of them at a time.

    Raises:
        UsageError: if the file cannot be decoded, has more than MAX_PIXELS, or does not say what range its numbers
            have.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # to open a named pipe would wait for whoever writes into it
            raise OSError("it is not a regular file")
        with Image.open(path) as image:
            num_pixels = image.width * image.height
            if num_pixels > MAX_PIXELS:
                raise ValueError(f"its {image.width:,} x {image.height:,} pixels are more than {MAX_PIXELS:,}")
            with large if large and num_pixels > LARGE_PIXELS else nullcontext():
                return _decoded(image, size)
    except Exception as error:  # Pillow raises many error types for damaged files
        raise UsageError(
            f"data.root: the image {as_text(path)} cannot be read ({error}); replace or remove it"
        ) from None


def _decoded(image: "Image.Image", size: int) -> Tensor:
    from PIL import Image, ImageOps

    kind = image.format or ""
    image = _in_8_bits(ImageOps.exif_transpose(image), kind)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,)), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    # copy with numpy: torch would start its threads in a reader thread
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def _in_8_bits(image: "Image.Image", kind: str) -> "Image.Image":
    """The image with grey levels 0 to 255; `kind` is the file format.

    Raises:
        ValueError: if the range of its numbers is not known.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # 0 to 65,535
        levels = np.asarray(image).astype(np.float64)
        return Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        name = {"I": "32-bit integers", "F": "real numbers"}[image.mode]
        raise ValueError(f"its pixels are {name}, whose range the file does not say: convert it to 8 or 16 bits")
    return image
