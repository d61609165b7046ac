"""Precision of float32 products on GPUs and CPUs: exact, or with inputs rounded to TF32 or bfloat16.

Torch has two interfaces for this. The older one raises when it is read, inside and outside of the contexts below, after
the newer one was set to a state that the older cannot express. The newer one is a tree: a setting also applies to the
nodes below it.

Remove when torch has dropped the older interface: setting `fp32_precision` is then enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Setting = tuple[Callable[[], Any], Callable[[Any], None], Any]
"""Getter and setter of a global setting, and its new value."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """In the context, convolutions are deterministic, and float32 products use no TF32 or bfloat16, on any device."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    ops = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    newer = [_setting(owner, "fp32_precision", "ieee") for owner in (torch.backends, cudnn, *ops)]
    with _temporarily([_setting(cudnn, "deterministic", True), *_older("highest", tf32=False), *newer]):
        yield


@contextmanager
def training_float32(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """In the context, a GPU computes float32 products with inputs rounded to 10 mantissa bits if `tf32`, else exactly.

    By default torch rounds in convolutions and not in matrix products. On a CPU nothing changes.
    """
    if device.type == "cpu":
        yield
        return
    cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    newer = [_setting(op, "fp32_precision", "tf32" if tf32 else "ieee") for op in (cuda.matmul, cudnn.conv, cudnn.rnn)]
    # the older interface also changes products on a CPU
    newer.append(_setting(cpu.matmul, "fp32_precision", "ieee"))  # pyright: ignore[reportAttributeAccessIssue]
    with _temporarily([*_older("high" if tf32 else "highest", tf32=tf32), *newer]):
        yield


def _older(matmul: str, *, tf32: bool) -> list[Setting]:
    return [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, matmul),
        _setting(torch.backends.cudnn, "allow_tf32", tf32),
    ]


def _setting(owner: object, name: str, value: Any) -> Setting:
    return partial(getattr, owner, name), partial(setattr, owner, name), value


@contextmanager
def _temporarily(settings: Sequence[Setting]) -> Iterator[None]:
    """In the context, all settings have their new values; then the old ones, the newer interface's last."""
    before = [(setting, _read(setting)) for setting in settings]
    try:
        for setting in settings:
            _write(setting, setting[2])
        yield
    finally:
        for setting, value in before:
            _write(setting, value)


_UNKNOWN = object()  # state that the older interface cannot express


def _read(setting: Setting) -> Any:
    try:
        return setting[0]()
    except RuntimeError:
        return _UNKNOWN


def _write(setting: Setting, value: Any) -> None:
    """Write only if the value changes: writing a default value would make it an explicit setting."""
    if _UNKNOWN not in (value, now := _read(setting)) and now != value:
        setting[1](value)
