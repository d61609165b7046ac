"""A user's own data set, from a function that returns arrays: `data.name=module.path:factory`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gengap_dist.config.own_code import load_own
from gengap_dist.errors import UsageError

FORM = '{"train": (inputs, targets), "test": (inputs, targets)}'


class Arrays(NamedTuple):
    """A data set in memory; images are [N, H, W] or [N, C, H, W] uint8, other inputs are real numbers [N, ...]."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int | None
    """None: targets are real numbers."""
    facts: Mapping[str, Any] = {}
    """More for run.json."""


def load_user_data(name: str) -> Arrays:
    """The data set that `name`, a `module.path:factory`, returns when it is called without arguments.

    The factory returns arrays or tensors in the form of FORM. Inputs are uint8 pixels [N, H, W] or [N, C, H, W], or
    real numbers [N, ...]; targets are int64 classes [N] from 0, or real numbers [N, ...], of which
    [N] becomes [N, 1].

    Raises:
        UsageError: if the factory cannot be imported or fails, or returns something else.
    """
    factory = load_own("data.name", name, "factory")
    try:
        given = factory()
    except Exception as error:  # a user's function may raise anything
        raise UsageError(f"data.name ({name}) failed ({type(error).__name__}: {error}): fix the function") from error
    parts = [_part(name, given, part) for part in ("train", "test")]
    (train_inputs, train_targets), (test_inputs, test_targets) = parts
    for kind, train, test in (("inputs", train_inputs, test_inputs), ("targets", train_targets, test_targets)):
        if (train.shape[1:], train.dtype) != (test.shape[1:], test.dtype):
            raise UsageError(
                f"data.name ({name}) returns training {kind} of {_kind(train)} and test {kind} of {_kind(test)}: "
                "make them the same"
            )
    classes = train_targets.dtype == torch.int64
    num_classes = 1 + max(int(train_targets.max()), int(test_targets.max())) if classes else None
    return Arrays(train_inputs, train_targets, test_inputs, test_targets, num_classes)


def _part(name: str, given: Any, part: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one part of what a factory returned, checked."""
    try:
        assert isinstance(given, Mapping)
        inputs, targets = (torch.as_tensor(array) for array in given[part])
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"data.name ({name}) returns something else than {FORM} ({type(error).__name__}: {error or given!r:.80}): "
            "return arrays or tensors in this form"
        ) from None
    if not targets.is_floating_point():
        targets = targets.long()
    elif targets.ndim == 1:
        targets = targets[:, None]
    if len(inputs) != len(targets) or not len(inputs):
        raise UsageError(
            f"data.name ({name}) returns {len(inputs)} {part} inputs for {len(targets)} targets: return one target "
            "for each input, and at least one"
        )
    is_image = inputs.dtype == torch.uint8 and inputs.ndim in (3, 4)
    if not (is_image or (inputs.is_floating_point() and inputs.ndim > 1)):
        raise UsageError(
            f"data.name ({name}) returns {part} inputs of {_kind(inputs)} each: return uint8 images [N, H, W] or "
            "[N, C, H, W], or real numbers [N, ...]"
        )
    for kind, array in (("inputs", inputs), ("targets", targets)):
        if array.is_floating_point() and not array.isfinite().all():
            raise UsageError(f"data.name ({name}) returns {part} {kind} that are not finite: remove or replace them")
    if not targets.is_floating_point() and targets.ndim != 1:
        raise UsageError(
            f"data.name ({name}) returns {part} classes of {_kind(targets)} each: return one class for each input, [N]"
        )
    return inputs, targets


def _kind(array: Tensor) -> str:
    return f"shape {list(array.shape[1:])} and type {str(array.dtype).removeprefix('torch.')}"
