"""Which files of a folder are images of which class, and what pixels they have: told by hand and by Pillow."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets, image_folder
from gengap_dist.data.image_folder import list_images, read_image
from gengap_dist.data.streaming import StreamedImages
from gengap_dist.errors import UsageError

LEVELS = np.arange(16).reshape(4, 4)


def save(path: Path, level: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level,) * 3).save(path, format=None if path.suffix != ".jpe" else "JPEG")
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images."""
    for name in ("a", "b"):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", 60 + 40 * number)
    return tmp_path


def names(folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in list_images(folder).paths]


PLAIN = ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]


def test_the_order_is_torchvisions(folder):
    from torchvision.datasets import ImageFolder

    save(folder / "a" / "deep" / "er" / "0.png")
    save(folder / "a" / "deep" / "Z.jpg")
    expected = ImageFolder(str(folder))
    listing = list_images(folder)
    assert listing.paths == [path for path, _ in expected.samples]
    assert (listing.classes, listing.targets) == (expected.classes, expected.targets)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".trash", "__MACOSX"])
def test_hidden_folders_are_no_classes_and_no_images(folder, hidden):
    save(folder / hidden / "0.png")
    save(folder / "a" / hidden / "0-checkpoint.png")
    save(folder / "a" / "._0.png")
    assert names(folder) == PLAIN
    assert list_images(folder).classes == ["a", "b"]


def test_links_into_loops_are_followed_once(folder):
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "b" / "other").symlink_to(folder / "b")
    with pytest.raises(UsageError, match="is the same file as one of class a, and an image has one class"):
        list_images(folder)
    (folder / "a" / "up").unlink()
    assert names(folder) == PLAIN


def test_a_class_of_links_is_a_class(folder, tmp_path_factory):
    """As people make subsets of large data sets; the second link to a file is skipped."""
    far = save(tmp_path_factory.mktemp("far") / "x.png")
    (folder / "c").mkdir()
    (folder / "c" / "1.png").symlink_to(far)
    (folder / "c" / "2.png").symlink_to(far)
    listing = list_images(folder)
    assert names(folder) == [*PLAIN, "c/1.png"]
    assert listing.skipped == ["c/2.png"]


def test_other_endings_are_read_and_the_rest_is_counted_and_named(folder):
    for ending in ("jfif", "jpe", "gif", "JPG"):
        save(folder / "a" / f"x.{ending}")
    (folder / "b" / "notes.txt").write_text("no image")
    listing = list_images(folder)
    assert names(folder)[3:7] == ["a/x.JPG", "a/x.gif", "a/x.jfif", "a/x.jpe"]
    assert listing.skipped == ["b/notes.txt"]
    assert all(read_image(path, 4).shape == (3, 4, 4) for path in listing.paths)


def test_a_run_says_what_it_skips_and_how_it_decodes(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / part / name / "0.png")
    (tmp_path / "train" / "a" / "Thumbs.db").touch()
    config = DataConfig(name="imagefolder", root=tmp_path, image_size=4, val_fraction=0.0)
    for streaming in (False, True):
        with pytest.warns(UserWarning, match=r"train: 1 file\(s\) are no images.*are skipped: a/Thumbs.db"):
            splits = datasets.load(config.model_copy(update={"streaming": streaming}))
        found = datasets.summary(splits, config)
        assert found["classes"] == ["a", "b"]
        assert found["num_skipped_files"] == 1
        assert found["decoding"] == {"background": 0, "orientation": "EXIF"}
        assert len(splits.train) == 2


def grey(path: Path) -> np.ndarray:
    out = read_image(str(path), 4)
    assert (out == out[0]).all()
    return out[0].numpy()


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_levels_of_16_bits_are_scaled(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    levels = (LEVELS * 4369).astype(np.uint16)  # 0 to 65,535
    if ending == "pgm":
        path.write_bytes(b"P5 4 4 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    assert np.array_equal(grey(path), LEVELS * 17)


def test_grey_levels_of_12_bits_in_a_pgm_file_are_scaled_by_what_it_says(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 4 4 4095\n" + (LEVELS * 273).astype(">u2").tobytes())
    assert np.array_equal(grey(path), LEVELS * 17)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "real numbers")])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype, kind):
    path = tmp_path / "x.tif"
    Image.fromarray((LEVELS / 16).astype(dtype)).save(path)
    with pytest.raises(
        UsageError, match=f"x.tif cannot be read .its pixels are {kind}, whose range the file does not say"
    ):
        read_image(str(path), 4)


def test_what_is_no_regular_file_is_refused_before_anything_is_opened(folder):
    os.mkfifo(folder / "a" / "pipe.png")
    with pytest.raises(UsageError, match=r"a/pipe.png is named like an image and is a named pipe, not a regular file"):
        list_images(folder)
    with pytest.raises(UsageError, match=r"pipe.png cannot be read .it is not a regular file."):
        read_image(str(folder / "a" / "pipe.png"), 4)  # it was put there later
    (folder / "a" / "pipe.png").rename(folder / "a" / "pipe")
    (folder / "a" / "broken.png").symlink_to(folder / "nothing")
    with pytest.raises(UsageError, match=r"a/broken.png is named like an image and is a link to a file that is not"):
        list_images(folder)
    (folder / "a" / "broken.png").unlink()
    (folder / "a" / "loop.png").symlink_to(folder / "a" / "loop.png")
    with pytest.raises(UsageError, match=r"a/loop.png is named like an image and is a link to a file that is not"):
        list_images(folder)
    (folder / "a" / "loop.png").unlink()
    assert names(folder) == PLAIN
    assert list_images(folder).skipped == ["a/pipe"]


def test_names_that_are_no_utf_8(folder):
    """As an archive from another system has them: read as they are, and shown and recorded as text."""
    os.rename(os.fsencode(folder / "b"), os.fsencode(folder) + b"/caf\xe9")  # noqa: PTH104, bytes
    os.rename(os.fsencode(folder / "a" / "2.png"), os.fsencode(folder) + b"/a/\xff.png")  # noqa: PTH104
    listing = list_images(folder)
    assert listing.classes == ["a", "caf\\xe9"]
    assert os.fsencode(listing.paths[2]).endswith(b"/a/\xff.png")
    images = StreamedImages(listing.paths, 4, ThreadPoolExecutor(1))
    assert len(images[:]) == 6
    assert b"".join(images.fingerprint(folder)).startswith(b"a/0.png\0")
    with open(listing.paths[2], "wb"):
        pass
    with pytest.raises(UsageError, match=r"a/\\xff.png cannot be read"):
        read_image(listing.paths[2], 4)


def test_the_number_of_pixels_is_limited_before_an_image_is_decoded(tmp_path):
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 9000 8000 255\n")  # the header alone
    with pytest.raises(UsageError, match=r"x.pgm cannot be read .its 9,000 x 8,000 pixels are more than 67,108,864"):
        read_image(str(path), 4)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "LARGE_PIXELS", 100)
    for name, size in (("small", 10), ("large", 11)):
        Image.new("L", (size, size)).save(tmp_path / f"{name}.png")
    images = StreamedImages([str(tmp_path / "small.png"), str(tmp_path / "large.png")], 4, ThreadPoolExecutor(2))
    with images._large:
        small, large = images._read(0), images._read(1)
        assert small.result().shape == (3, 4, 4)
        with pytest.raises(TimeoutError):
            large.result(timeout=0.1)
    assert large.result().shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_black(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (200, 200, 200, 255))
    image.putpixel((1, 2), (200, 200, 200, 0))
    image.putpixel((2, 2), (200, 200, 200, 51))
    path = tmp_path / ("x.png" if mode != "PA" else "x.tif")
    (image if mode == "RGBA" else image.convert("LA")).save(path)
    expected = np.full((4, 4), 200)
    expected[2, 1], expected[2, 2] = 0, 40
    assert np.array_equal(grey(path), expected)


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(LEVELS.astype(np.uint8) % 2, mode="P")
    image.putpalette([255, 255, 255, 100, 100, 100])
    path = tmp_path / "x.png"
    image.save(path, transparency=0)
    assert np.array_equal(grey(path), (LEVELS % 2) * 100)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray((LEVELS * 17).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "x.png"
    image.save(path, exif=exif)
    assert np.array_equal(grey(path), np.rot90(LEVELS * 17, -1))


def test_fashion_mnist_under_the_name_of_mnist(tmp_path, real_data):
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "raw").symlink_to(real_data / "FashionMNIST" / "raw")
    with pytest.raises(UsageError, match=r"data.name \(mnist\): .*train-images-idx3-ubyte is that of fashion_mnist"):
        datasets.load(DataConfig(name="mnist", root=tmp_path))


def test_a_changed_file_of_mnist(tmp_path, real_data):
    import shutil

    shutil.copytree(real_data / "MNIST", tmp_path / "MNIST")
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 10
    labels.write_bytes(content)
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte has the MD5 digest \w+, not 27ae3e4e"):
        datasets.load(DataConfig(name="mnist", root=tmp_path))
