"""A user's own data, from a function that returns data sets or arrays: `data.name=module.path:factory`.

Its parts become sources, of which samples are taken by position, whatever they are made of.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gengap_dist.config.own_code import call_own, described, load_own
from gengap_dist.errors import UsageError, first_of

PARTS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}  # what a user may call them
FORM = '{"train": ..., "test": ...}'
MOST_CHANNELS = 4  # that an image has last, where they should be first
COUNT_SECONDS = 10.0  # of counting a stream before it is said
READ_SIZE = 64  # samples that are read at a time
RECENT_BYTES = 2**27  # of samples of a stream that were read last, and are kept


class SampleKind(NamedTuple):
    """Shapes and types of one sample: the same for all of a data set."""

    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    target_shape: tuple[int, ...]
    target_dtype: torch.dtype

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "SampleKind":
        """Of one sample."""
        return cls(tuple(inputs.shape), inputs.dtype, tuple(targets.shape), targets.dtype)

    @property
    def is_image(self) -> bool:
        """Pixels [H, W] or [C, H, W]."""
        return self.input_dtype == torch.uint8 and len(self.input_shape) in (2, 3)

    @property
    def is_token(self) -> bool:
        """Ids [T]."""
        return not self.is_image and not self.input_dtype.is_floating_point

    @property
    def num_bytes(self) -> int:
        """Memory of one sample."""
        sizes = torch.Size(self.input_shape).numel(), torch.Size(self.target_shape).numel()
        return sizes[0] * self.input_dtype.itemsize + sizes[1] * self.target_dtype.itemsize

    def describe(self, which: str) -> str:
        """`which` is inputs or targets."""
        of_inputs = which == "inputs"
        shape, dtype = (self.input_shape, self.input_dtype) if of_inputs else (self.target_shape, self.target_dtype)
        return f"shape {list(shape)} and type {str(dtype).removeprefix('torch.')}"


class Source(Protocol):
    """Samples of one part of a data set, by position."""

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets [n, ...] at `positions`, checked.

        Raises:
            UsageError: if a sample cannot be read, or is not like the others.
        """
        ...


@final
class ArraySource:
    """Arrays in memory: inputs and targets [N, ...] each."""

    def __init__(self, what: str, inputs: Any, targets: Any) -> None:
        """`what` they are, for messages: `data.name (NAME): train`.

        Raises:
            UsageError: if they are no arrays, or differ in length.
        """
        self.what = what
        self.inputs, self.targets = _tensor(what, "inputs", inputs), _tensor(what, "targets", targets)
        if self.inputs.ndim == 0 or self.targets.ndim == 0 or len(self.inputs) != len(self.targets):
            num = [len(array) if array.ndim else "no" for array in (self.inputs, self.targets)]
            raise UsageError(f"{what} has {num[0]} inputs for {num[1]} targets: return one target for each input")

    def __len__(self) -> int:
        """N."""
        return len(self.inputs)

    def take(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        chosen = torch.as_tensor(positions)
        return self.inputs[chosen], _as_targets(self.targets[chosen])


@final
class DatasetSource:
    """A data set with `__len__` and `__getitem__`: of torch, of Hugging Face, or a list of samples."""

    def __init__(self, what: str, dataset: Any) -> None:
        """`what` it is, for messages: `data.name (NAME): train`."""
        self.what, self.dataset = what, dataset
        self.kind: SampleKind | None = None
        """Of the first sample of the first part, as soon as it is known."""

    def __len__(self) -> int:
        """N."""
        return len(self.dataset)

    def take(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        numbers = [int(position) for position in positions]
        together, number = getattr(self.dataset, "__getitems__", None), numbers[0]
        samples: list[Any] = []
        try:
            if together:
                samples = together(numbers)
            else:
                for number in numbers:
                    samples.append(self.dataset[number])
        except Exception as error:  # a user's data set may raise anything
            near = f"sample {number}" + f" or one of the {len(numbers)} after it" * bool(together)
            raise UsageError(f"{self.what} cannot be read at {near} ({described(error)}): fix the data set") from error
        pairs = [self._pair(*each) for each in zip(numbers, samples, strict=True)]
        inputs, targets = (torch.stack([*each]) for each in zip(*pairs, strict=True))
        return inputs, targets

    def _pair(self, number: int, sample: Any) -> tuple[Tensor, Tensor]:
        what = f"{self.what}, sample {number},"
        inputs, targets = pair_of(what, sample)
        inputs, targets = _tensor(what, "inputs", inputs), _as_targets(_tensor(what, "targets", targets)[None])[0]
        found = SampleKind.of(inputs, targets)
        self.kind = self.kind or found
        check_kind(what, found, self.kind)
        return inputs, targets


class _Cursor:
    """A place in a stream."""

    def __init__(self, state: Any) -> None:
        self.position, self.state = 0, state
        self.iterator: Iterator[Any] | None = None
        self.recent: dict[int, Any] = {}
        """Samples that were read last."""


@final
class StreamSource:
    """An iterable data set: samples are read in its own order, and one before those of late begins a new pass.

    With `state_dict` and `load_state_dict`, each pass begins at the state that it has now. Training and all else read
    at places of their own.
    """

    def __init__(self, what: str, dataset: Any) -> None:
        """`what` it is, for messages: `data.name (NAME): train`.

        Raises:
            UsageError: if its state is not plain data.
        """
        self.reader, self.dataset = DatasetSource(what, self), dataset
        self.is_stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self._first_state = self._state()
        self._cursors = {purpose: _Cursor(self._first_state) for purpose in ("training", "other")}
        self._purpose = "other"
        self._num: int | None = None

    def __len__(self) -> int:
        """N: as the data set says, or counted in one pass."""
        if self._num is None:
            self.rewound()
            self._num = len(self.dataset) if hasattr(self.dataset, "__len__") else self._count()
        return self._num

    def _count(self) -> int:
        num, warn_at = 0, time.monotonic() + COUNT_SECONDS
        for num, _ in enumerate(self._begin(self._first_state), 1):
            if time.monotonic() > warn_at:
                warn_at = float("inf")
                warnings.warn(
                    f"{self.reader.what} has at least {num:,} samples, which are still being counted: an iterable data "
                    "set must end, and with __len__ it is not counted",
                    stacklevel=2,
                )
        return num

    def take(self, positions: Sequence[int], purpose: str = "other") -> tuple[Tensor, Tensor]:
        """See `Source`; `purpose` is training or other."""
        self._turn_to(purpose)
        return self.reader.take(positions)

    def __getitem__(self, position: int) -> Any:
        """The sample at a position as the data set returns it."""
        cursor = self._cursors[self._purpose]
        if position in cursor.recent:
            return cursor.recent[position]
        if cursor.iterator is None or position < cursor.position:
            self.rewound()
            cursor = self._cursors[self._purpose]
            cursor.iterator = self._begin(self._first_state)
        while cursor.position <= position:
            if (sample := next(cursor.iterator, _END)) is _END:
                raise IndexError(f"it ended after {cursor.position} samples, and had {len(self)} in its first pass")
            cursor.recent[cursor.position] = sample
            cursor.position += 1
            kept = 1 if self.reader.kind is None else max(1, RECENT_BYTES // max(1, self.reader.kind.num_bytes))
            if len(cursor.recent) > kept:
                del cursor.recent[next(iter(cursor.recent))]
        return cursor.recent[position]

    def rewound(self) -> DatasetSource:
        """Begin a new pass with the next sample; returns what makes tensors of samples."""
        self._cursors[self._purpose] = _Cursor(self._first_state)
        return self.reader

    def close(self) -> None:
        """Forget where it was read: the next run begins at the first sample."""
        self._cursors = {purpose: _Cursor(self._first_state) for purpose in self._cursors}

    def state_dict(self) -> dict[str, Any]:
        """How far training has read: {} before the first sample."""
        cursor = self._cursors["training"]
        if cursor.iterator is None:
            return {}
        return {"position": cursor.position, "state": self._state() if self._purpose == "training" else cursor.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; a data set without a state of its own is read again up to the position."""
        if state and self.is_stateful:
            self._turn_to("training")
            cursor = self._cursors["training"]
            cursor.recent, cursor.position, cursor.iterator = {}, state["position"], self._begin(state["state"])

    def _turn_to(self, purpose: str) -> None:
        before, cursor = self._cursors[self._purpose], self._cursors[purpose]
        if self.is_stateful and before is not cursor:
            before.state = self._state()
            cursor.iterator = cursor.iterator and self._begin(cursor.state)
        self._purpose = purpose

    def _begin(self, state: Any) -> Iterator[Any]:
        if self.is_stateful:
            self.dataset.load_state_dict(deepcopy(state))
        return iter(self.dataset)

    def _state(self) -> Any:
        if not self.is_stateful:
            return None
        state = deepcopy(self.dataset.state_dict())
        if (wrong := _not_plain(state)) is not None:
            raise UsageError(
                f"{self.reader.what} has {_a(wrong)} in its state_dict, and a checkpoint holds plain data only: return "
                "numbers, texts, tensors, and lists and dicts of them"
            )
        return state


_END = object()
AnySource = ArraySource | DatasetSource | StreamSource


def _not_plain(value: Any) -> Any:
    """What a checkpoint cannot hold of a state; None: nothing."""
    if isinstance(value, list | tuple | dict) and type(value) in (list, tuple, dict):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return next((wrong for each in inside if (wrong := _not_plain(each)) is not None), None)
    return None if value is None or type(value) in (str, int, float, bool, bytes, Tensor) else value


def pair_of(what: str, sample: Any) -> tuple[Any, Any]:
    """Inputs and targets of a sample, or of arrays of them.

    Raises:
        UsageError: if it has something else.
    """
    if isinstance(sample, Mapping):
        if missing := [key for key in ("inputs", "targets") if key not in sample]:
            raise UsageError(
                f"{what} has no {missing[0]}, it has {first_of([*map(str, sample)]) or 'nothing'}: return inputs and "
                "targets by these names"
            )
        return sample["inputs"], sample["targets"]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    raise UsageError(
        f'{what} is {_a(sample)}, not inputs and targets: return {{"inputs": ..., "targets": ...}} or (inputs, targets)'
    )


def check_kind(what: str, found: SampleKind, first: SampleKind) -> None:
    """Refuse a sample that is not like the first one.

    Raises:
        UsageError: names both.
    """
    for which in ("inputs", "targets"):
        if found.describe(which) != first.describe(which):
            raise UsageError(
                f"{what} has {which} of {found.describe(which)}, and the first training sample of "
                f"{first.describe(which)}: make them the same"
            )


class OwnData(NamedTuple):
    """What a factory has returned."""

    parts: dict[str, AnySource]
    """train, and perhaps val and test; none is empty."""
    kind: SampleKind
    in_memory: bool
    """Whether all parts are arrays."""


def load_user_data(name: str) -> OwnData:
    """The data that `name`, a `module.path:factory`, returns when it is called without arguments.

    The factory returns a mapping, or an object, with train and perhaps val (or validation) and test. Each is a data set
    with a length (of torch, of Hugging Face, a list) of samples {"inputs", "targets"} or (inputs, targets), or
    arrays of all inputs and targets in one of these two forms. Inputs are uint8 pixels [H, W] or [C, H, W], real
    numbers, or integer tokens [T]; targets are a class from 0, a class at each position, or real numbers. One real
    number becomes [1].

    Raises:
        UsageError: if the factory cannot be imported or fails, or returns something else.
    """
    what = f"data.name ({name})"
    given = call_own("data.name", name, load_own("data.name", name, "factory"))
    if given is None:
        raise UsageError(f"{what} returns nothing: end the function with return {FORM}")
    parts = {part: _source(f"{what}: {part}", each) for part, each in _parts(what, given).items()}
    kind = _first_kind(what, parts)
    return OwnData(parts, kind, all(isinstance(part, ArraySource) for part in parts.values()))


def _parts(what: str, given: Any) -> dict[str, Any]:
    """What was returned for train, val and test."""
    names = [name for names in PARTS.values() for name in names]
    if not isinstance(given, Mapping):
        given = {name: getattr(given, name) for name in names if getattr(given, name, None) is not None} or given
    if not isinstance(given, Mapping) or "train" not in given:
        has = f"{_a(given)} without train"
        raise UsageError(f"{what} returns {has}: return {FORM}, data sets or arrays by part")
    if unknown := [key for key in given if key not in names]:
        raise UsageError(f"{what} returns the part {unknown[0]!r:.40}: name the parts train, val and test")
    found: dict[str, Any] = {}
    for part, names in PARTS.items():
        values = [given[name] for name in names if given.get(name) is not None]
        if len(values) > 1:
            raise UsageError(
                f"{what} returns {' and '.join(names)}, which are two names of one part: return one of them"
            )
        if values:
            found[part] = values[0]
    return found


def _source(what: str, given: Any) -> AnySource:
    pair = isinstance(given, tuple | list) and len(given) == 2 and not isinstance(given[0], tuple | Mapping)
    if pair or isinstance(given, Mapping):
        source: AnySource = ArraySource(what, *pair_of(what, given))
    elif isinstance(given, IterableDataset) or (isinstance(given, Iterable) and not hasattr(given, "__getitem__")):
        source = StreamSource(what, given)
    elif hasattr(given, "__getitem__") and not isinstance(given, str | bytes):
        source = DatasetSource(what, given)
    else:
        raise UsageError(
            f"{what} is {_a(given)}, no data set and no arrays: return a data set with __len__ and __getitem__, or "
            "(inputs, targets)"
        )
    try:
        num = len(source)
    except TypeError as error:  # torch's Dataset has __getitem__ only
        raise UsageError(f"{what} has no length ({error}): add __len__ to the data set") from error
    if not num:
        raise UsageError(f"{what} has no samples: return at least one, or leave the part out")
    return source


def _first_kind(what: str, parts: Mapping[str, AnySource]) -> SampleKind:
    """The kind of all samples, from the first of each part."""
    train: SampleKind | None = None
    for source in parts.values():
        (inputs,), (targets,) = source.take([0])
        kind = SampleKind.of(inputs, targets)
        train = train or kind
        if isinstance(source, ArraySource):
            check_kind(source.what, kind, train)
            continue
        reader = source if isinstance(source, DatasetSource) else source.rewound()
        check_kind(f"{reader.what}, sample 0,", kind, train)
        reader.kind = train
        (again,), (targets_again,) = source.take([0])
        if not (_same(inputs, again) and _same(targets, targets_again)):
            raise UsageError(
                f"{reader.what} returns another sample 0 each time: leave random changes to data.augment, since order "
                "and resume are exact only if a sample depends on its position alone"
            )
    assert train is not None
    _check_shapes(what, train)
    return train


def _check_shapes(what: str, kind: SampleKind) -> None:
    first, last = (kind.input_shape[0], kind.input_shape[-1]) if kind.input_shape else (0, 0)
    if kind.is_image and len(kind.input_shape) == 3 and first > MOST_CHANNELS >= last:
        raise UsageError(
            f"{what} returns images of {kind.describe('inputs')} each, and channels come first: return [C, H, W], as "
            "from np.moveaxis(image, -1, 0)"
        )
    if not kind.is_image and (not kind.input_shape or (kind.is_token and len(kind.input_shape) != 1)):
        raise UsageError(
            f"{what} returns inputs of {kind.describe('inputs')} each: return uint8 images [H, W] or [C, H, W], real "
            "numbers [...], or integer tokens [T]"
        )
    positions = kind.input_shape if kind.is_token else ()
    if not kind.target_dtype.is_floating_point and kind.target_shape not in ((), positions):
        raise UsageError(
            f"{what} returns classes of {kind.describe('targets')} for each sample: return one class, or for tokens "
            "one at each position"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _as_targets(targets: Tensor) -> Tensor:
    """Targets [n, ...] as they are stored: classes as int64, one real number of each sample as [n, 1]."""
    if not targets.is_floating_point():
        return targets.long()
    return targets[:, None] if targets.ndim == 1 else targets


def _tensor(what: str, which: str, value: Any) -> Tensor:
    if type(value).__module__.startswith("PIL."):
        pixels = np.array(value)
        value = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arrays that may not be written, which nobody does
            tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{what} has {which} that are no array of numbers ({_a(value)}: {error}): return numbers, all of one shape"
        ) from None
    if tensor.dtype == torch.bool and which == "targets":
        return tensor.long()
    if tensor.dtype in (torch.bool, torch.complex64, torch.complex128) or tensor.is_sparse:
        raise UsageError(f"{what} has {which} of type {str(tensor.dtype).removeprefix('torch.')}: return real numbers")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch cannot index
        return tensor.long()
    return tensor.cpu()


def _a(value: Any) -> str:
    """What an object is, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
