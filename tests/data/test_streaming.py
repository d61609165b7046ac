"""Pictures on disk are the pictures in memory: the same pixels, the same runs."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.image_folder import read_image
from gengap_dist.data.streaming import StreamedImages
from gengap_dist.errors import UsageError
from tests.conftest import train, weights

SIZE = 8
NUM = 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 training and 8 test pictures of two classes: JPEG and PNG, grey, colour and transparent, of many sizes."""
    root = tmp_path_factory.mktemp("folder")
    random = np.random.default_rng(0)
    for part, num in (("train", NUM), ("test", 4)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for at in range(num):
                mode, ending = (("RGB", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("RGB", "png"))[at % 4]
                height, width = (SIZE, SIZE) if at % 5 == 0 else random.integers(3, 40, 2)
                picture = random.integers(0, 256, (height, width, len(mode)), dtype=np.uint8).squeeze()
                Image.fromarray(picture).save(root / part / name / f"{at}.{ending}")
    return root


@pytest.fixture
def own(folder, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def folder_config(root: Path, **settings: object) -> DataConfig:
    return DataConfig(name="imagefolder", root=root, image_size=SIZE, val_fraction=0.25, **settings)


def test_the_splits_are_those_in_memory(folder):
    for settings in ({}, {"shuffle_labels": True}, {"split_seed": 3, "workers": 1}):
        held = datasets.load(folder_config(folder, **settings))
        on_disk = datasets.load(folder_config(folder, streaming=True, **settings))
        for ours, theirs in zip(on_disk[:3], held[:3], strict=True):
            assert len(ours) == len(theirs)
            assert ours.inputs.shape == theirs.inputs.shape
            assert torch.equal(ours.inputs[:], theirs.inputs)
            assert torch.equal(ours.inputs[2:5], theirs.inputs[2:5])
            assert torch.equal(ours.targets, theirs.targets)
            which = torch.tensor([3, 0, 3, len(ours) - 1])
            for found, expected in zip(ours.to(CPU).take(which, which), theirs.take(which, which), strict=True):
                assert torch.equal(found, expected)
        assert on_disk.spec == held.spec
        assert on_disk.spec.input_shape[0] == 3
        assert torch.equal(on_disk.pixels.mean_C, held.pixels.mean_C)  # of all 30: fewer than NUM_MEAN_IMAGES
        assert torch.equal(on_disk.pixels.std_C, held.pixels.std_C)


@pytest.fixture(scope="module")
def shelf(folder):
    """The training pictures' files, the pixels they make, and a reader."""
    paths = sorted(map(str, (folder / "train").rglob("*.*")))
    with ThreadPoolExecutor(3) as pool:
        yield paths, torch.stack([read_image(path, SIZE) for path in paths]), pool


images = st.lists(st.integers(0, 2 * NUM - 1), max_size=12)


@given(st.lists(st.tuples(images, images), max_size=6), st.integers(1, 15))
def test_whatever_is_expected_the_pictures_asked_for_come(shelf, steps, max_prefetched):
    paths, pixels, pool = shelf
    pictures = StreamedImages(paths, SIZE, pool)
    pictures.max_prefetched = max_prefetched
    for expected, _ in steps:  # as a run does: a step ahead, and probes in between
        pictures.prefetch(torch.tensor(expected, dtype=torch.int64))
    for expected, between in steps:
        for asked in (between, expected):
            assert torch.equal(pictures[torch.tensor(asked, dtype=torch.int64)], pixels[asked])
            assert len(pictures._prefetched) <= max_prefetched


@given(st.integers(1, 15), st.integers(1, 40), st.integers(0, 99))
def test_nothing_that_was_expected_stays_behind(shelf, max_prefetched, size, seed):
    paths, pixels, pool = shelf
    pictures = StreamedImages(paths, SIZE, pool)
    pictures.max_prefetched = max_prefetched
    random = np.random.default_rng(seed)
    order = torch.from_numpy(np.concatenate([random.permutation(len(paths)) for _ in range(3)])).split(size)
    pictures.prefetch(order[0])
    for step, coming in zip(order, [*order[1:], order[0][:0]], strict=True):
        pictures.prefetch(coming)
        for asked in step.split(7):
            assert torch.equal(pictures[asked], pixels[asked])
    assert not pictures._prefetched
    assert not pictures._expected


def test_expected_pictures_are_read_before_they_are_asked_for(own):
    paths = sorted(map(str, (own / "train/cat").iterdir()))
    pixels = torch.stack([read_image(path, SIZE) for path in paths])
    pool = ThreadPoolExecutor(2)
    pictures = StreamedImages(paths, SIZE, pool)
    pictures.max_prefetched = 6
    pictures.prefetch(torch.arange(10))
    pool.shutdown(wait=True)  # what was begun is done
    shutil.rmtree(own)
    with pytest.raises(RuntimeError, match="shutdown"):  # the seventh is beyond max_prefetched
        pictures[torch.tensor([6])]
    pictures._expected.clear()
    assert torch.equal(pictures[torch.arange(6)], pixels[:6])


def test_a_picture_expected_twice_is_read_ahead_twice(shelf):
    paths, pixels, _ = shelf
    pool = ThreadPoolExecutor(1)
    pictures = StreamedImages(paths, SIZE, pool)
    pictures.prefetch(torch.tensor([4, 5, 4, 6]))  # as across the end of an epoch
    for last, at in ((False, 4), (True, 5), (True, 4), (True, 6)):
        assert torch.equal(pictures[torch.tensor([at])], pixels[[at]])
        if last:
            pool.shutdown(wait=True)


def test_mean_and_deviation_of_large_folders_come_from_a_fixed_sample(folder, monkeypatch):
    monkeypatch.setattr(datasets, "NUM_MEAN_IMAGES", 7)
    config = folder_config(folder, streaming=True)
    splits, again, other = (datasets.load(c) for c in (config, config, config.model_copy(update={"split_seed": 1})))
    assert torch.equal(splits.pixels.mean_C, again.pixels.mean_C)
    assert not torch.equal(splits.pixels.mean_C, other.pixels.mean_C)
    chosen = np.random.default_rng([0, 4]).permutation(len(splits.train))[:7]
    pixels = splits.train.inputs[:][torch.from_numpy(chosen)].double()
    assert torch.allclose(splits.pixels.mean_C, pixels.mean((0, 2, 3)))
    assert torch.allclose(splits.pixels.std_C, pixels.std((0, 2, 3), correction=0))
    assert datasets.summary(splits, config)["num_mean"] == 7
    held = config.model_copy(update={"streaming": False})
    assert datasets.summary(datasets.load(held), held)["num_mean"] == 30


def test_the_digest_is_of_paths_sizes_and_labels(folder, own):
    def digest(root: Path, **settings: object) -> str:
        config = folder_config(root, streaming=True, **settings)
        return datasets.load(config).digest(root)

    first = digest(folder)
    assert digest(own) == first  # wherever the folder lies
    assert digest(own, shuffle_labels=True) != first
    with (own / "train/cat/3.png").open("ab") as file:
        file.write(b"\0")
    longer = digest(own)
    (own / "test/dog/3.png").rename(own / "test/dog/4.png")
    assert len({first, longer, digest(own)}) == 3


def test_memory_is_not_asked_for_pictures_on_disk(folder, monkeypatch):
    config = folder_config(folder, memory_gib=1e-9)
    with pytest.raises(UsageError, match=r"data.memory_gib \(1e-09\) is less than"):
        datasets.sizes(config)
    on_disk = config.model_copy(update={"streaming": True})
    assert len(datasets.load(on_disk).train) == datasets.sizes(on_disk).num_train == 30
    monkeypatch.setattr(datasets, "PREFETCH_BYTES", 100)
    assert datasets.sizes(on_disk).num_bytes == 100 + 8 * 48


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff\xe0 no picture", "half"])
def test_a_damaged_picture_is_named_as_if_it_were_read_into_memory(own, damage):
    path = own / "test/dog/1.jpg"
    path.write_bytes(path.read_bytes()[:300] if damage == "half" else damage)
    with pytest.raises(UsageError) as in_memory:
        datasets.load(folder_config(own))
    splits = datasets.load(folder_config(own, streaming=True))
    splits.test.prefetch(torch.arange(8))
    with pytest.raises(UsageError) as when_asked:
        splits.test.inputs[:]
    assert str(when_asked.value) == str(in_memory.value)
    assert str(path) in str(in_memory.value)


QUICK = {
    "data__name": "imagefolder",
    "data__image_size": SIZE,
    "data__val_fraction": 0.25,
    "data__augment": ["resized_crop", "flip", "rand_augment", "cutout", "mixup", "cutmix"],
    "data__cutout_size": 3,
    "model__name": "mlp",
    "model__widths": [16],
    "batch__global_size": 13,
    "batch__micro_size": 4,
    "train__epochs": 3,
    "probe__num_samples": [16],
}


def facts(out: Path) -> dict[str, object]:
    """What a run found, clocks aside."""
    found = json.loads((out / "run.json").read_text())
    return {key: value for key, value in found["result"].items() if "second" not in key and "time/" not in key}


def check_same(held: Path, on_disk: Path) -> None:
    ours, theirs = weights(on_disk), weights(held)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert facts(on_disk) == facts(held)


def test_a_run_is_the_same_run(folder, tmp_path):
    for name, streaming in (("held", False), ("on_disk", True)):
        train(tmp_path / name, data__root=folder, data__streaming=streaming, **QUICK)
    check_same(tmp_path / "held", tmp_path / "on_disk")


def words(settings: dict[str, object]) -> list[object]:
    out = ["--launch.num_processes", 2, "--mlflow.enabled", "false"]
    for key, value in settings.items():
        out += [f"--{key.replace('__', '.')}", json.dumps(value).strip('"')]
    return out


@pytest.mark.full  # else: one rank, above, and two that meet a damaged picture, below
def test_two_ranks_make_the_same_run(folder, tmp_path, gengap):
    common = [*words(QUICK), "--data.root", folder]
    for name in ("false", "true"):
        done = gengap("train", *common, "--data.streaming", name, "--out", name)
        assert done.returncode == 0, done.stderr
    check_same(tmp_path / "false", tmp_path / "true")


def test_a_damaged_picture_ends_a_run_of_two_ranks_with_one_sentence(own, gengap):
    (own / "test/dog/1.jpg").write_bytes(b"")
    common = [*words(QUICK), "--data.root", own]
    done = gengap("train", *common, "--data.streaming", "true", "--out", "run")
    assert done.returncode != 0
    assert "dog/1.jpg cannot be read" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_only_image_folders_stay_on_disk():
    with pytest.raises(ValueError, match=r"data.streaming \(true\) reads image folders and your own data sets only"):
        DataConfig(streaming=True)


def test_a_cutout_larger_than_the_picture_is_refused():
    DataConfig(augment=("cutout",), cutout_size=32)
    with pytest.raises(ValueError, match=r"data.cutout_size \(33\) is larger than the images of data.image_size"):
        DataConfig(augment=("cutout",), cutout_size=33)


def test_a_crop_that_shifts_pictures_out_of_sight_is_refused():
    with pytest.raises(ValueError, match=r"data.crop_padding \(32\) can shift an image of 32 pixels out of"):
        DataConfig(augment=("crop",), crop_padding=32)
