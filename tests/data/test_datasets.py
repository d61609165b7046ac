import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.errors import UsageError

CPU = torch.device("cpu")


def test_digits_are_scikit_learns():
    theirs = load_digits()
    splits = datasets.load(DataConfig(val_fraction=0.0))
    test = np.arange(len(theirs.target)) % 5 == 0
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    assert np.array_equal(splits.test.targets.numpy(), theirs.target[test])
    inner = splits.test.inputs[:, 0, 12:20, 12:20].numpy()
    assert np.array_equal(inner, (theirs.images[test].astype(int) * 255 // 16).astype(np.uint8))
    assert splits.test.inputs.sum() == inner.sum(dtype=np.int64)  # nothing but zeros around it


def test_validation_is_held_out_by_its_own_seed():
    a, b, c = (datasets.load(DataConfig(split_seed=seed)) for seed in (0, 0, 1))
    assert (len(a.train), len(a.val)) == (1294, 143)
    assert a.digest() == b.digest() != c.digest()
    assert torch.equal(a.test.inputs, c.test.inputs)
    both = torch.cat([a.train.inputs, a.val.inputs]).flatten(1)
    whole = datasets.load(DataConfig(val_fraction=0.0)).train.inputs.flatten(1)
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, whole.numpy()))


def test_normalised_pixels_have_mean_0_and_deviation_1_where_there_is_no_padding():
    splits = datasets.load(DataConfig())
    normal = Preprocess(splits.pixels, CPU, torch.float64)(splits.train.inputs)[:, :, 12:20, 12:20]
    assert abs(float(normal.mean())) < 1e-12
    assert abs(float(normal.std(correction=0)) - 1) < 1e-12


def test_batches_are_the_images_asked_for():
    splits = datasets.load(DataConfig())
    normalise = Preprocess(splits.pixels, CPU, torch.float32)
    images, labels = BatchLoader(splits.train, normalise, DataConfig(), seed=0)(torch.tensor([5, 2, 2]), epoch=0)
    assert torch.equal(labels, splits.train.targets[[5, 2, 2]])
    assert torch.equal(images, normalise(splits.train.inputs[[5, 2, 2]]))


def test_real_fashion_mnist(real_data):
    splits = datasets.load(DataConfig(name="fashion_mnist", root=real_data))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (54_000, 6_000, 10_000)
    assert splits.train.inputs.shape[1:] == (1, 32, 32)
    assert float(splits.pixels.mean_C) / 255 == pytest.approx(0.286, abs=2e-3)
    assert float(splits.pixels.std_C) / 255 == pytest.approx(0.353, abs=2e-3)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_are_named_with_a_remedy(tmp_path, name):
    with pytest.raises(UsageError) as error:
        datasets.load(DataConfig(name=name, root=tmp_path))
    message = str(error.value)
    assert str(tmp_path / datasets.TORCHVISION[name][1]) in message
    assert {"mnist": "train-images-idx3-ubyte", "fashion_mnist": "t10k-labels", "cifar10": "data_batch_5"}.get(
        name, "train, test"
    ) in message
    assert "--data.download true" in message


def test_a_cut_file_is_damaged_not_a_traceback(tmp_path, real_data):
    shutil.copytree(real_data / "MNIST", tmp_path / "MNIST")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UsageError, match=r"mnist in .* are damaged"):
        datasets.load(DataConfig(name="mnist", root=tmp_path))


def test_cifar100_in_its_own_file_format(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("test", 100)):
        content = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i}" for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)  # our small files have other checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    splits = datasets.load(DataConfig(name="cifar100", root=tmp_path, val_fraction=0.0))
    assert splits.spec.num_classes == 100
    assert splits.train.inputs.shape == (200, 3, 32, 32)
    first = pickle.loads((folder / "train").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(splits.train.inputs[0].numpy(), first)


@pytest.fixture
def pictures(tmp_path):
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (100 * label, i, 7)).save(folder / f"{i}.png")
    return tmp_path


def test_a_folder_of_pictures(pictures):
    splits = datasets.load(DataConfig(name="imagefolder", root=pictures, image_size=16, val_fraction=0.0))
    assert splits.spec.num_classes == 2
    assert splits.train.inputs.shape == (12, 3, 16, 16)
    assert splits.train.targets.tolist() == [0] * 6 + [1] * 6
    assert splits.train.inputs[7, :, 3, 3].tolist() == [100, 1, 7]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "train/cat/0.png").write_bytes(b"\x89PNG"), "0.png cannot be read"),
        (lambda root: shutil.rmtree(root / "test"), "is not an image folder"),
        (lambda root: (root / "test/dog").rename(root / "test/fox"), "class dog is not in both"),
    ],
)
def test_broken_picture_folders(pictures, damage, says):
    damage(pictures)
    with pytest.raises(UsageError, match=says):
        datasets.load(DataConfig(name="imagefolder", root=pictures, image_size=16))


def test_jpeg_cifar10(real_data):
    config = DataConfig(name="imagefolder", root=real_data / "cifar10-jpeg", memory_gib=0.01)
    with pytest.raises(UsageError, match=r"data.memory_gib \(0.01\) is less than"):
        datasets.load(config)


def test_labels_out_of_range_are_refused():
    with pytest.raises(UsageError, match="contain 10 at position 2, outside 0 to 9"):
        datasets.check_labels(torch.tensor([0, 9, 10]), 10, "training")
    with pytest.raises(UsageError, match="contain -1 at position 0"):
        datasets.check_labels(torch.tensor([-1]), 10, "test")


def test_images_larger_than_image_size_are_refused():
    with pytest.raises(UsageError, match=r"data.image_size \(4\) is smaller than the 8 x 8 images"):
        datasets.load(DataConfig(image_size=4))


LOADING = """
from pathlib import Path
import torch
from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

pixels, labels = torch.full(({num}, 28, 28), 7, dtype=torch.uint8), torch.zeros({num}, dtype=torch.long)
raw = datasets.Arrays(pixels, labels, pixels[:1], labels[:1], 10)
datasets.LOADERS["mnist"] = lambda config, progress: raw
before = peak()
datasets.load(DataConfig(name="mnist", image_size=32))
print(peak() - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_takes_little_more_than_what_it_loads():
    def growth(num: int) -> int:
        """Bytes by which the process's peak grows while `num` pictures are loaded."""
        words = [sys.executable, "-c", LOADING.format(num=num)]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    held = 200_000 * 32 * 32
    assert growth(220_000) - growth(20_000) < 1.9 * held
