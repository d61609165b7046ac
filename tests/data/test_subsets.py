"""data.num_train and data.subset: which training images are used, the same for whom, and what is refused."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.sampler import seeded_rng
from gengap_dist.errors import UsageError
from gengap_dist.runs.mixtures import changed_data
from gengap_dist.runs.run_folder import load_spectra, read_info
from tests.conftest import config, train


def pixels(samples: datasets.Samples) -> set[bytes]:
    assert isinstance(samples.inputs, Tensor)
    return {bytes(image) for image in samples.inputs.flatten(1).numpy()}


def test_a_subset_is_drawn_from_the_training_images_and_leaves_the_others_alone():
    whole, some = datasets.load(DataConfig()), datasets.load(DataConfig(num_train=200))
    assert len(some.train) == 200
    assert pixels(some.train) < pixels(whole.train)
    for part in ("val", "test"):
        ours, theirs = getattr(some, part), getattr(whole, part)
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
    positions = torch.from_numpy(seeded_rng(0, 5).permutation(1294)[:200]).sort().values
    assert torch.equal(some.train.targets, whole.train.targets[positions])
    inside = some.train.inputs[:, 0, 12:20, 12:20].double()
    assert float(some.pixels.mean_C) == pytest.approx(float(inside.mean()), rel=1e-12)  # normalised by its own images


def test_all_of_the_images_are_no_subset():
    whole = datasets.load(DataConfig())
    for settings in (DataConfig(num_train=1294), DataConfig(num_train=1294, subset="per_seed")):
        assert datasets.load(settings, seed=3).digest() == whole.digest()


def test_smaller_subsets_are_part_of_larger_ones():
    for subset in ("fixed", "per_seed"):
        small, large = (datasets.load(DataConfig(num_train=n, subset=subset), seed=4) for n in (50, 300))
        assert pixels(small.train) < pixels(large.train)


def test_who_has_the_same_images():
    def digest(subset: str, seed: int, split_seed: int = 0) -> str:
        settings = DataConfig(num_train=100, subset=subset, split_seed=split_seed)
        return datasets.load(settings, seed=seed).digest()

    assert digest("fixed", 0) == digest("fixed", 1) != digest("fixed", 0, split_seed=1)
    assert digest("per_seed", 0) == digest("per_seed", 0) != digest("per_seed", 1)
    assert len({digest("fixed", 0), digest("per_seed", 0), digest("per_seed", 1)}) == 3


def test_classes_are_drawn_as_they_come():
    """A random draw: not every class has its share, and the mean over many draws is its share."""
    shares = torch.stack(
        [
            datasets.load(DataConfig(num_train=100, subset="per_seed"), seed=seed).train.targets.bincount(minlength=10)
            for seed in range(30)
        ]
    )
    whole = datasets.load(DataConfig()).train.targets.bincount()
    assert not (shares == shares[0]).all()
    assert (shares.double().mean(0) - 100 * whole / 1294).abs().max() < 3  # 5 standard errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for part, num in (("train", 10), ("test", 2)):
        for number, kind in enumerate(("cat", "dog")):
            (root / part / kind).mkdir(parents=True)
            for at in range(num):
                Image.new("RGB", (8, 8), (20 * at, 100 * number, 7)).save(root / part / kind / f"{at}.png")
    return root


def table() -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.arange(80.0).view(20, 4)
    return {"train": (x, x.sum(1)), "test": (x[:5], x[:5].sum(1))}


@pytest.mark.parametrize("subset", ["fixed", "per_seed"])
def test_folders_and_own_data_have_the_same_subsets(folder, subset):
    chosen = {"num_train": 6, "subset": subset, "val_fraction": 0.25}
    of_folder = {"name": "imagefolder", "root": folder, "image_size": 8}
    held, on_disk = (
        datasets.load(DataConfig(**of_folder, **chosen, streaming=streaming), seed=2) for streaming in (False, True)
    )
    assert torch.equal(on_disk.train.inputs[:], held.train.inputs)
    assert torch.equal(on_disk.train.targets, held.train.targets)
    own = datasets.load(DataConfig(name=f"{__name__}:table", **chosen), seed=2)
    purpose = (5,) if subset == "fixed" else (6, 2)
    rest = torch.from_numpy(seeded_rng(0, 0).permutation(20)[5:]).sort().values  # 20 samples in both, 5 held out
    positions = rest[torch.from_numpy(seeded_rng(0, *purpose).permutation(15)[:6]).sort().values]
    assert torch.equal(own.train.inputs, table()["train"][0][positions])
    assert torch.equal(held.train.targets, (positions >= 10).long())


def test_sizes_know_the_subset(folder):
    for settings in (
        DataConfig(num_train=99),
        DataConfig(name="imagefolder", root=folder, image_size=8, num_train=6),
        DataConfig(name=f"{__name__}:table", num_train=6),
    ):
        splits, sizes = datasets.load(settings), datasets.sizes(settings)
        parts = splits.train, splits.val, splits.test
        assert sizes[:3] == tuple(map(len, parts))
        assert sizes.num_bytes == sum(tensor.nbytes for samples in parts for tensor in samples)


@pytest.mark.parametrize("work", [datasets.load, datasets.sizes])
def test_more_than_there_are(work):
    with pytest.raises(UsageError, match=r"data.num_train \(1,295\) is more than the 1,294 training samples of digits"):
        work(DataConfig(num_train=1295))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data__num_train": 0}, r"data.num_train \(0\) is not valid: input should be greater than 0"),
        ({"data__num_train": -5}, r"data.num_train \(-5\) is not valid"),
        ({"data__num_train": 2.5}, r"data.num_train \(2.5\) is not valid"),
        ({"data__subset": "per_seed"}, r"data.subset \(per_seed\) needs the size of the subset: set data.num_train"),
        ({"data__num_train": 9, "data__subset": "per_arm"}, r"data.subset \(per_arm\) is not valid"),
    ],
)
def test_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        config(**settings)


def test_a_run_trains_and_probes_its_subset_only(tmp_path):
    settings = {"data__num_train": 90, "data__subset": "per_seed", "train__epochs": 1, "batch__global_size": 30}
    settings |= {"probe__diagnostics": (), "probe__layers": ["fc2"]}
    for name, changed in (("a", {}), ("b", {"optim__lr": 0.001}), ("other", {"seed": 1})):
        with pytest.warns(UserWarning, match="few samples for each unit"):
            train(tmp_path / name, **settings | changed)
    infos = {name: read_info(tmp_path / name) for name in ("a", "b", "other")}
    first = infos["a"]
    assert (first.data["num_train"], first.num_probe_samples, first.result["num_steps"]) == (90, 90, 3)
    assert first.data["digest"] == infos["b"].data["digest"] != infos["other"].data["digest"]
    assert not changed_data({name: info.content() for name, info in infos.items()})
    spectra = [load_spectra(tmp_path / name / "spectra" / "step_00000000.npz")["fc2"][0] for name in ("a", "b")]
    assert (spectra[0] == spectra[1]).all()  # untrained networks of one seed on the same images


def test_changed_images_of_a_seed_are_noticed():
    def info(seed: int, digest: str) -> dict:
        return {"config": {"seed": seed, "data": {"name": "digits", "num_train": 9, "subset": "per_seed"}},
                "data": {"digest": digest, "num_train": 9}}  # fmt: skip

    assert not changed_data({"a/0": info(0, "x"), "a/1": info(1, "y"), "b/0": info(0, "x")})
    (said,) = changed_data({"a/0": info(0, "x"), "b/0": info(0, "z")})
    assert "the data of b/0 are not those of a/0" in said
