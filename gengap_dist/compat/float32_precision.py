"""How GPUs and CPUs multiply float32: exactly, or with inputs rounded to TF32 or bfloat16.

Torch has two interfaces to this. The older refuses to answer, inside as well as outside of a context of ours, once the
newer one has been used in a way that it cannot express; the newer is a tree, in which what is set above holds below.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Setting = tuple[Callable[[], Any], Callable[[Any], None], Any]
"""How a global setting is read and written, and the value it is to have."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """While open, deterministic convolutions, and no TF32 or bfloat16 where float32 is multiplied, on any device."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    ops = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    newer = [_setting(place, "fp32_precision", "ieee") for place in (torch.backends, cudnn, *ops)]
    with _holding([_setting(cudnn, "deterministic", True), *_older("highest", tf32=False), *newer]):
        yield


@contextmanager
def training_float32(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """While open, a GPU multiplies float32 as asked: with `tf32` inputs are rounded to 10 mantissa bits, else exactly.

    As it comes torch rounds in convolutions and not in matrix products. On a CPU nothing changes.
    """
    if device.type == "cpu":
        yield
        return
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    newer = [_setting(op, "fp32_precision", "tf32" if tf32 else "ieee") for op in (cuda.matmul, cudnn.conv, cudnn.rnn)]
    # what the older interface sets holds for a CPU's products, too
    newer.append(_setting(cpu.matmul, "fp32_precision", "ieee"))  # pyright: ignore[reportAttributeAccessIssue]
    with _holding([*_older("high" if tf32 else "highest", tf32=tf32), *newer]):
        yield


def _older(matmul: str, *, tf32: bool) -> list[Setting]:
    return [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, matmul),
        _setting(torch.backends.cudnn, "allow_tf32", tf32),
    ]


def _setting(place: object, name: str, value: Any) -> Setting:
    return partial(getattr, place, name), partial(setattr, place, name), value


@contextmanager
def _holding(settings: Sequence[Setting]) -> Iterator[None]:
    """While open, all settings have their values; then those that they had before, the newer interface's last."""
    before = [(setting, _read(setting)) for setting in settings]
    try:
        for setting in settings:
            _write(setting, setting[2])
        yield
    finally:
        for setting, value in before:
            _write(setting, value)


_UNKNOWN = object()  # what the older interface says of a state for which it has no word


def _read(setting: Setting) -> Any:
    try:
        return setting[0]()
    except RuntimeError:
        return _UNKNOWN


def _write(setting: Setting, value: Any) -> None:
    """Only what changes something: writing a default anew would no longer be a default."""
    if _UNKNOWN not in (value, now := _read(setting)) and now != value:
        setting[1](value)
