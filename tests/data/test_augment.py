import torch

from gengap_dist.data.augment import PADDING, augment, counter_bits, crop, flip

pixels = torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
indices = torch.arange(64) * 7


def test_a_picture_does_not_depend_on_its_company():
    whole = augment(pixels, indices, ("crop", "flip"), seed=1, epoch=2)
    alone = [augment(pixels[i : i + 1], indices[i : i + 1], ("crop", "flip"), seed=1, epoch=2) for i in range(64)]
    assert torch.equal(whole, torch.cat(alone))


def test_seed_and_epoch_change_the_picture():
    same = augment(pixels, indices, ("crop",), seed=1, epoch=2)
    for seed, epoch in ((1, 3), (2, 2), (0, 0)):
        assert not torch.equal(same, augment(pixels, indices, ("crop",), seed=seed, epoch=epoch))


def test_crop_is_a_shift_with_zeros_coming_in():
    bits = counter_bits(indices, 5)
    cropped = crop(pixels, bits)
    offsets = 2 * PADDING + 1
    for i in range(len(pixels)):
        top, left = int(bits[i] % offsets), int(bits[i] // offsets % offsets)
        canvas = torch.zeros(3, 20, 20, dtype=torch.uint8)
        canvas[:, PADDING:-PADDING, PADDING:-PADDING] = pixels[i]
        assert torch.equal(cropped[i], canvas[:, top : top + 12, left : left + 12])


def test_flip_mirrors_half_of_many():
    many = torch.arange(10_000)
    bits = counter_bits(many, 9)
    flipped = flip(torch.arange(2, dtype=torch.uint8).expand(10_000, 1, 1, 2), bits)[:, 0, 0, 0]
    assert 4_800 < int(flipped.sum()) < 5_200


def test_bits_are_uniform_and_differ_between_counters():
    many = torch.arange(100_000)
    bits = counter_bits(many, 0, 1)
    assert bits.min() >= 0
    counts = torch.bincount(bits % 81, minlength=81).double()
    expected = len(many) / 81
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 130  # 80 degrees of freedom: 130 is beyond the 99.9% point
    assert (bits == counter_bits(many, 1, 0)).sum() < 5
