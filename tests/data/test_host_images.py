"""Images kept in the machine's memory are those of the tensor, whatever is expected and asked for."""

import pytest
import torch

from gengap_dist.data import host_images
from gengap_dist.data.host_images import HostImages

PIXELS = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def test_indexed_like_the_tensor():
    images = HostImages(PIXELS, CPU)
    which = torch.tensor([3, 49, 3, 0])
    assert torch.equal(images[which], PIXELS[which])
    assert torch.equal(images[10:20], PIXELS[10:20])
    assert torch.equal(images[:0], PIXELS[:0])
    assert (len(images), images.shape) == (50, PIXELS.shape)


@pytest.mark.parametrize("inputs", [torch.arange(-50, 50, dtype=torch.int16).view(50, 2), torch.randn(50, 3)])
def test_tokens_and_real_numbers_keep_their_type(inputs):
    held, which = HostImages(inputs, CPU), torch.tensor([3, 49, 0])
    held.prefetch(which)
    assert torch.equal(held[which], inputs[which])
    assert held[which].dtype == inputs.dtype


@pytest.mark.parametrize(("ahead", "gathered_ahead"), [(1, 1), (100, 2), (5 * 48, 5), (2**20, 15)])
def test_what_is_expected_comes_in_any_pieces(monkeypatch, ahead, gathered_ahead):
    """Also where only some images are gathered ahead, and where others are asked for in between."""
    monkeypatch.setattr(host_images, "PREFETCH_BYTES", ahead)
    images = HostImages(PIXELS, CPU)
    steps = torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(15)
    images.prefetch(steps[0])
    for step, coming in zip(steps, [*steps[1:], None], strict=True):
        if coming is not None:
            images.prefetch(coming)
        for piece in step.split(4):
            assert torch.equal(images[piece], PIXELS[piece])
            assert torch.equal(images[torch.tensor([7])], PIXELS[7:8])
        assert torch.equal(images[step[:4]], PIXELS[step[:4]])  # a second pass, as SAM's
    assert not images._prefetched
    images.prefetch(steps[0])
    assert images._prefetched[0].num_gathered == gathered_ahead


def test_one_that_was_never_asked_for_does_not_end_reading_ahead():
    images, num_gathered = HostImages(PIXELS, CPU), []
    gather = images._gather
    images._gather = lambda indices: num_gathered.append(len(indices)) or gather(indices)
    images.prefetch(torch.arange(40, 50))  # as a run that stops at its target leaves behind
    for step in torch.arange(40).split(5):
        images.prefetch(step)
        assert torch.equal(images[step], PIXELS[step])
    assert num_gathered == [10] + [5] * 8


def test_what_is_never_asked_for_does_not_pile_up():
    images = HostImages(PIXELS, CPU)
    for _ in range(20):
        images.prefetch(torch.arange(10))
    assert len(images._prefetched) == host_images.MAX_PREFETCHED
    assert torch.equal(images[torch.arange(10)], PIXELS[:10])
