"""Random resized crop, RandAugment, mixup and CutMix against torchvision's own transforms, fed with our draws."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy import stats
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.augment import RAND_AUGMENT, RESIZED_CROP
from gengap_dist.data.batch_loader import BatchLoader, Preprocess
from gengap_dist.data.counter_bits import counter_bits, uniform
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.datasets import PixelStatistics, Samples
from gengap_dist.data.mixing import SHARE, draw_mix, mix_images, mix_targets, with_partners
from gengap_dist.data.rand_augment import OPERATORS, adjust_contrast, apply_operator, rand_augment
from gengap_dist.data.resized_crop import NUM_ATTEMPTS, NUM_DRAWS, crop_boxes, resized
from gengap_dist.errors import UsageError
from gengap_dist.training.tasks.classification import Classification

ALL = ("resized_crop", "flip", "rand_augment", "cutout", "mixup", "cutmix")
SIDE, NUM, CLASSES = 12, 64, 5
generator = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (NUM, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
labels = torch.randint(0, CLASSES, (NUM,), generator=generator)
many = torch.arange(20_000)


def draws(first: int, num: int, which: torch.Tensor = many) -> torch.Tensor:
    return counter_bits(which, 3, 4, torch.arange(first, first + num)[:, None])


def chi2(drawn: torch.Tensor, num: int) -> float:
    counts, expected = torch.bincount(drawn, minlength=num).double(), len(drawn) / num
    return float(((counts - expected) ** 2 / expected).sum())


# -- random resized crop ----------------------------------------------------------------------------------------------


def torchvision_box(monkeypatch, bits: list[int], side: int, transform: v2.RandomResizedCrop) -> tuple[int, ...]:
    """What torchvision makes of the random numbers that these bits are, in the order in which it asks for them."""
    drawn = iter([bits[k] for attempt in range(NUM_ATTEMPTS) for k in (attempt, NUM_ATTEMPTS + attempt)])
    places = iter(bits[-2:])

    def uniform_(low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * uniform(torch.tensor([next(drawn)]))).double()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda size: SimpleNamespace(uniform_=uniform_))
        patch.setattr(torch, "randint", lambda low, high, size: torch.tensor([next(places) % high]))
        box = transform.make_params([Image.new("L", (side, side))])
    return box["top"], box["left"], box["height"], box["width"]


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 0.6)), ((1.0, 1.0), (2.0, 3.0))]
)
def test_crops_are_those_of_torchvision(monkeypatch, scale, ratio):
    bits = draws(RESIZED_CROP, NUM_DRAWS, many[:200])
    transform = v2.RandomResizedCrop(SIDE, scale=scale, ratio=ratio)
    boxes = torch.stack([*crop_boxes(bits, 20, scale, ratio)], 1).tolist()
    for one, box in zip(bits.T.tolist(), boxes, strict=True):
        assert tuple(box) == torchvision_box(monkeypatch, one, 20, transform)


def test_crops_have_the_known_distribution():
    """Of small parts of large images, which always fit: area, logarithm of the ratio, and place are uniform."""
    top, left, height, width = crop_boxes(draws(RESIZED_CROP, NUM_DRAWS), 10_000, (0.1, 0.3), (0.5, 2.0))
    known = [
        ((height * width / 1e8 - 0.1) / 0.2, "area"),
        (((width / height).log() / math.log(2) + 1) / 2, "ratio"),
        (top / (10_001 - height), "top"),
        (left / (10_001 - width), "left"),
    ]
    for values, name in known:
        assert stats.kstest(values.double().numpy(), "uniform").pvalue > 1e-3, name
    assert abs(float(torch.corrcoef(torch.stack([v.double() for v, _ in known])).triu(1).abs().max())) < 0.03


@pytest.mark.parametrize("side", [SIDE, 33])
def test_the_enlarged_crop_is_that_of_torchvision(side):
    images = torch.randint(0, 256, (40, 3, side, side), dtype=torch.uint8, generator=generator)
    boxes = crop_boxes(draws(RESIZED_CROP, NUM_DRAWS, many[:40]), side, (0.01, 1.0), (0.5, 2.0))
    ours = resized(images, boxes)
    for image, out, box in zip(images, ours, torch.stack([*boxes], 1).tolist(), strict=True):
        theirs = functional.resized_crop(image.double(), *box, [side, side], antialias=True)
        torch.testing.assert_close(out.double(), theirs, rtol=0, atol=0.01)  # of 255 levels
        in_levels = functional.resized_crop(image, *box, [side, side], antialias=True)
        assert (out.round() - in_levels).abs().max() <= 1  # it computes with fewer bits


# -- RandAugment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_of_torchvision(name, channels):
    transform = v2.RandAugment()
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    table = magnitudes(31, SIDE, SIDE)
    images = pixels[:6, :channels]
    for magnitude in (0, 9, 17, 30):
        for negative in (False, True):
            size = 0.0 if table is None else float(table[magnitude])
            size = -size if signed and negative else size
            args = (name, size, InterpolationMode.NEAREST, {type(images): None})
            theirs = torch.stack([transform._apply_image_or_video_transform(image, *args) for image in images])
            assert torch.equal(apply_operator(images, name, magnitude, negative=negative), theirs), (
                magnitude,
                negative,
            )


def test_contrast_is_that_of_torchvision():
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=generator)
    assert torch.equal(adjust_contrast(images, 1.27), functional.adjust_contrast(images, 1.27))


def test_operators_and_signs_are_drawn_alike_and_one_after_the_other():
    assert [*v2.RandAugment._AUGMENTATION_SPACE] == [*OPERATORS]
    first, sign, second, other = draws(RAND_AUGMENT, 4)
    assert chi2(first % 14 * 28 + sign % 2 * 14 + second % 14, 392) < 500  # freedom 391: passed once in 10,000 times
    assert chi2(other % 2, 2) < 15
    bits = draws(RAND_AUGMENT, 4, many[:NUM])
    together = rand_augment(pixels, bits, 9)
    for at in range(NUM):
        image = pixels[at : at + 1]
        for operator, negative in bits[:, at].view(2, 2).tolist():
            image = apply_operator(image, OPERATORS[operator % 14], 9, negative=negative % 2 == 1)
        assert torch.equal(together[at : at + 1], image)


def test_operators_need_known_channels(monkeypatch):
    raw = datasets.Arrays(*(torch.zeros(9, 4, 8, 8, dtype=torch.uint8), torch.zeros(9).long()) * 2, 1)
    monkeypatch.setitem(datasets.LOADERS, "digits", lambda config, progress: raw)
    with pytest.raises(
        UsageError, match=r"rand_augment\) needs images with 1 or 3 channels, and those of digits have 4"
    ):
        datasets.load(DataConfig(augment=("rand_augment",), image_size=8))


# -- mixup and CutMix -------------------------------------------------------------------------------------------------


def mixed(names: tuple[str, ...], which: torch.Tensor, side: tuple[int, int] = (SIDE, SIDE), **settings: float):
    return draw_mix(which, *side, DataConfig(augment=names, **settings), 3, 4)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mix_is_that_of_torchvision(monkeypatch, name):
    side = (SIDE, SIDE + 3)
    images = torch.rand(2 * NUM, 3, *side, dtype=torch.float64, generator=generator)
    classes = torch.randint(0, CLASSES, (2 * NUM,), generator=generator)
    which = many[:NUM]
    mix = mixed((name,), which, side, mixup_alpha=0.7, cutmix_alpha=0.7)
    ours = mix_images(images[::2], images[1::2], mix)
    targets = mix_targets(classes[::2], classes[1::2], mix, CLASSES, torch.float64)
    transform = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](num_classes=CLASSES)
    shares = stats.beta(0.7, 0.7).ppf(uniform(counter_bits(which, 3, 4, SHARE)).numpy())
    for at, share in enumerate(shares):
        pair, of_pair = images[2 * at : 2 * at + 2], classes[2 * at : 2 * at + 2]
        centre = int(counter_bits(which[at : at + 1], 3, 4, 6))
        row, column = centre % side[0], centre // side[0] % side[1]
        with monkeypatch.context() as patch:
            patch.setattr(transform, "_dist", SimpleNamespace(sample=lambda size, share=share: share))
            patch.setattr(
                torch, "randint", lambda high, size, at={side[0]: row, side[1]: column}: torch.tensor([at[high]])
            )
            params = transform.make_params([pair]) | {"labels": of_pair, "batch_size": 2}
        torch.testing.assert_close(ours[at], transform.transform(pair, params)[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(targets[at], transform.transform(of_pair, params)[0].double(), rtol=0, atol=1e-6)


def test_shares_have_their_distribution():
    for alpha in (0.2, 1.0, 3.0):
        drawn = mixed(("mixup",), many, mixup_alpha=alpha).share
        assert stats.kstest(drawn.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    both = mixed(("mixup", "cutmix"), many)
    assert chi2(both.is_cut.long(), 2) < 15
    assert not (both.box[1] - both.box[0])[~both.is_cut].any()
    top, bottom, left, right = mixed(("cutmix",), many, (100, 100)).box
    areas = (bottom - top) * (right - left) / 1e4
    assert areas.mean() == pytest.approx(expected_area(), abs=0.01)


def expected_area() -> float:
    """Of a box of sides s around a uniform centre of the unit square, s^2 uniform: s - s^2 / 4 of s are inside."""
    sides = ((torch.arange(10_000) + 0.5) / 10_000).double().sqrt()
    return float((sides - sides**2 / 4).square().mean())


def test_partners_are_uniform_and_independent():
    pairs = with_partners(many % 50, 50, 3, 4).view(-1, 2)
    assert torch.equal(pairs[:, 0], many % 50)
    whole = torch.cat([with_partners(torch.arange(50), 50, 3, epoch).view(-1, 2) for epoch in range(400)])
    assert chi2(whole[:, 1], 50) < 95
    assert chi2(whole[:, 0] * 50 + whole[:, 1], 2500) < 2770
    assert not torch.equal(with_partners(many, 50, 3, 4), with_partners(many, 50, 4, 4))


def test_losses_of_mixed_targets_are_means_of_the_losses_of_their_classes():
    task = Classification(DataSpec.images(CLASSES, 3), label_smoothing=0.1)
    outputs = torch.randn(7, CLASSES, dtype=torch.float64, generator=generator)
    first, second = (torch.randint(0, CLASSES, (7,), generator=generator) for _ in range(2))
    share = torch.rand(7, dtype=torch.float64, generator=generator)
    targets = share[:, None] * one_hot(first, CLASSES) + (1 - share[:, None]) * one_hot(second, CLASSES)
    for loss, smoothing in ((task.loss_sum, 0.0), (task.training_loss_sum, 0.1)):
        each = [cross_entropy(outputs, c, reduction="none", label_smoothing=smoothing) for c in (first, second)]
        torch.testing.assert_close(loss(outputs, targets), (share * each[0] + (1 - share) * each[1]).sum())
    right = [(outputs.argmax(1) == classes).double() for classes in (first, second)]
    torch.testing.assert_close(task.metric_sum(outputs, targets), (share * right[0] + (1 - share) * right[1]).sum())
    assert int(task.num_targets(targets).sum()) == 7


# -- all together -----------------------------------------------------------------------------------------------------


def loader(names: tuple[str, ...] = ALL) -> BatchLoader:
    level = torch.full((3,), 127.0, dtype=torch.float64)
    preprocess = Preprocess(PixelStatistics(level, level), torch.device("cpu"), torch.float32)
    config = DataConfig(augment=names, image_size=SIDE, cutout_size=3)
    return BatchLoader(Samples(pixels, labels), preprocess, config, 5, CLASSES)


def test_a_batch_does_not_depend_on_its_cut():
    batches, order = loader(), torch.randperm(NUM, generator=generator)
    inputs, targets = batches(order, epoch=2)
    assert (inputs.shape, targets.shape) == ((NUM, 3, SIDE, SIDE), (NUM, CLASSES))
    torch.testing.assert_close(targets.sum(1), torch.ones(NUM))
    for size in (1, 7, 30):
        parts = [batches(part, epoch=2) for part in order.split(size)]
        for whole, cut in zip((inputs, targets), zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(cut)), size
    for name in ALL:
        assert not torch.equal(loader((name,))(order, 2)[0], loader((name,))(order, 3)[0]), name


def test_partners_are_augmented_as_in_their_own_turn():
    order = torch.arange(NUM)
    alone, _ = loader(ALL[:4])(order, 2)
    partners = with_partners(order, NUM, 5, 2)[1::2]
    mix = draw_mix(order, SIDE, SIDE, DataConfig(augment=("mixup",)), 5, 2)
    inputs, targets = loader((*ALL[:4], "mixup"))(order, 2)
    assert torch.equal(inputs, mix_images(alone, alone[partners], mix))
    assert torch.equal(targets, mix_targets(labels, labels[partners], mix, CLASSES, torch.float32))
