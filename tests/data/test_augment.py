import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gengap_dist.config.sections import DataConfig
from gengap_dist.data.augment import augment, crop_and_flip, cutout
from gengap_dist.data.counter_bits import counter_bits

ALL = ("crop", "flip", "cutout")
SIDE = 12
PADDING = 3
NUM = 64
CROP, FLIP, CUTOUT = range(3)  # purposes of the draws
pixels = torch.randint(0, 256, (NUM, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
many = torch.arange(50_000)


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.double() - 100.5  # no pixel becomes 0


def augmented(which: torch.Tensor, names=ALL, seed=1, epoch=2, cutout_size=5) -> torch.Tensor:
    config = DataConfig(augment=names, image_size=SIDE, crop_padding=PADDING, cutout_size=cutout_size)
    return augment(pixels[which % NUM], which, normalise, config, seed, epoch)


def twin(at: int, names: tuple[str, ...], seed: int, epoch: int, size: int) -> torch.Tensor:
    """One picture by slicing, from the same bits."""
    crop, flip, cut = (int(counter_bits(torch.tensor([at]), seed, epoch, purpose)) for purpose in range(3))
    picture = pixels[at % NUM]
    if "crop" in names:
        offsets = 2 * PADDING + 1
        top, left = crop % offsets, crop // offsets % offsets
        canvas = torch.zeros(3, SIDE + 2 * PADDING, SIDE + 2 * PADDING, dtype=torch.uint8)
        canvas[:, PADDING:-PADDING, PADDING:-PADDING] = picture
        picture = canvas[:, top : top + SIDE, left : left + SIDE]
    if "flip" in names and flip % 2 == 0:
        picture = picture.flip(-1)
    out = normalise(picture)
    if "cutout" in names:
        top, left = cut % SIDE - size // 2, cut // SIDE % SIDE - size // 2
        out[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return out


@pytest.mark.parametrize("names", [(), ("crop",), ("flip",), ("cutout",), ("crop", "flip"), ("flip", "cutout"), ALL])
@pytest.mark.parametrize("size", [1, 4, 5, SIDE])
def test_every_picture_is_its_twin_cut_by_hand(names, size):
    which = torch.arange(0, 7 * NUM, 7)
    twins = [twin(int(at), names, seed=1, epoch=2, size=size) for at in which]
    assert torch.equal(augmented(which, names, cutout_size=size), torch.stack(twins))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 2**31), st.integers(0, 10**5))
def test_a_picture_does_not_depend_on_its_company(which, seed, epoch):
    together = augmented(torch.tensor(which), seed=seed, epoch=epoch)
    for at, picture in zip(which, together, strict=True):
        assert torch.equal(picture, augmented(torch.tensor([at]), seed=seed, epoch=epoch)[0])


def test_the_order_of_the_names_says_nothing():
    assert torch.equal(augmented(many[:NUM], ALL), augmented(many[:NUM], ALL[::-1]))


def test_seed_and_epoch_change_the_picture():
    for name in ALL:
        same = augmented(many[:NUM], (name,))
        for seed, epoch in ((1, 3), (2, 2), (0, 0), (2, 1)):
            assert not torch.equal(same, augmented(many[:NUM], (name,), seed, epoch))


def chi2(drawn: torch.Tensor, num: int) -> float:
    """Pearson's statistic of whole numbers 0 .. num - 1 that should be uniform."""
    counts, expected = torch.bincount(drawn, minlength=num).double(), len(drawn) / num
    return float(((counts - expected) ** 2 / expected).sum())


def where(seed: int, epoch: int) -> dict[str, torch.Tensor]:
    """What the pictures themselves tell of 50,000 draws: [n] each."""
    # every pixel of this picture is another number, and none is 0
    picture = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(len(many), 1, 3, 3)
    crop, flip, cut = (counter_bits(many, seed, epoch, purpose) for purpose in range(3))
    still = torch.zeros_like(many)
    middle = crop_and_flip(picture, crop, still + 1, 1)[:, 0, 1, 1].long() - 1  # which pixel came to the middle
    mirrored = (crop_and_flip(picture, still, flip, 0)[:, 0, 0, 0] == 3).long()
    hole = (cutout(picture.double(), cut, 1).flatten(1) == 0).long().argmax(1)
    return {"crop": middle, "flip": mirrored, "cutout": hole}


def test_draws_are_uniform_and_independent():
    draws = {(name, run): drawn for run in ((0, 0), (0, 1), (1, 0)) for name, drawn in where(*run).items()}
    kinds = {"crop": 9, "flip": 2, "cutout": 9}
    beyond = {1: 15.0, 3: 21.0, 8: 32.0, 17: 49.0, 80: 140.0}  # chi-square, freedom: passed once in 10,000 times
    for (name, run), drawn in draws.items():
        assert chi2(drawn, kinds[name]) < beyond[kinds[name] - 1], (name, run)
    names = list(draws)
    for number, one in enumerate(names):
        for other in names[:number]:
            num = kinds[one[0]] * kinds[other[0]]
            assert chi2(draws[one] * kinds[other[0]] + draws[other], num) < beyond[num - 1], (one, other)


def test_crop_reaches_every_offset_alike():
    crop = counter_bits(many, 4, 7, CROP)
    assert chi2(crop % 81, 81) < 140  # top and left of the usual 4 pixels


@pytest.mark.parametrize("size", [1, 2, 5, SIDE])
def test_cutout_cuts_its_square_at_the_borders(size):
    out = cutout(torch.ones(len(many), 1, SIDE, SIDE), counter_bits(many, 0, 0, CUTOUT), size)
    areas = (out == 0).sum((1, 2, 3))
    sides = torch.tensor([min(c - size // 2 + size, SIDE) - max(c - size // 2, 0) for c in range(SIDE)])
    assert sorted(set(areas.tolist())) == sorted(set(torch.outer(sides, sides).flatten().tolist()))
    assert int(areas.max()) == size**2
    assert float(areas.double().mean()) == pytest.approx(float(sides.double().mean()) ** 2, rel=0.02)


def test_bits_are_uniform_and_differ_between_counters():
    bits = counter_bits(many, 0, 1)
    assert bits.min() >= 0
    assert bits.max() < 2**62
    assert (bits == counter_bits(many, 1, 0)).sum() < 5
    rows = counter_bits(many, 0, torch.tensor([[0], [1]]))
    assert torch.equal(rows[1], bits)
