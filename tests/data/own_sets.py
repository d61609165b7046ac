"""Data sets as users return them; one table of 150 rows in several forms."""

import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

NUM, COLUMNS, CLASSES = 150, 5, 3
_rng = np.random.default_rng(3)
INPUTS = _rng.normal(size=(NUM + 70, COLUMNS)).astype(np.float32)
TARGETS = (INPUTS @ _rng.normal(size=(COLUMNS, CLASSES))).argmax(1)
PIXELS = _rng.integers(0, 256, size=(NUM + 70, 6, 6), dtype=np.uint8)
PLACES = {"train": slice(0, NUM), "val": slice(NUM, NUM + 30), "test": slice(NUM + 30, None)}


class Rows(Dataset):
    def __init__(self, place: slice, inputs: np.ndarray = INPUTS):
        self.inputs, self.targets = inputs[place], TARGETS[place]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Stream(IterableDataset):
    def __init__(self, place: slice, inputs: np.ndarray = INPUTS):
        self.rows = Rows(place, inputs)

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


class StatefulStream(Stream):
    position, num_read, loaded = 0, 0, ()

    def __iter__(self):
        while self.position < len(self.rows):
            self.position += 1
            type(self).num_read += 1
            yield self.rows[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        type(self).loaded = (*self.loaded, self.position)


def _each(make: Any) -> dict[str, Any]:
    return {part: make(place) for part, place in PLACES.items()}


def arrays():
    return _each(lambda place: (INPUTS[place], TARGETS[place]))


def named_arrays():
    return _each(lambda place: {"inputs": torch.as_tensor(INPUTS[place]), "targets": TARGETS[place].tolist()})


def rows():
    return _each(Rows)


def tensors():
    return SimpleNamespace(
        **_each(lambda place: TensorDataset(torch.as_tensor(INPUTS[place]), torch.as_tensor(TARGETS[place])))
    )


def listed():
    return _each(lambda place: [(row, int(target)) for row, target in zip(INPUTS[place], TARGETS[place], strict=True)])


def hugging_face():
    import datasets

    def one(place: slice) -> Any:
        return datasets.Dataset.from_dict(
            {"inputs": INPUTS[place], "targets": TARGETS[place]},
            features=datasets.Features(
                inputs=datasets.List(datasets.Value("float32")), targets=datasets.Value("int64")
            ),
        ).with_format("numpy")

    parts = _each(one)
    return datasets.DatasetDict(train=parts["train"], validation=parts["val"], test=parts["test"])


def stream():
    return arrays() | {"train": Stream(PLACES["train"])}


def stateful_stream():
    return rows() | {"train": StatefulStream(PLACES["train"])}


def images():
    return _each(lambda place: Rows(place, PIXELS))


def only_train():
    return {"train": rows()["train"]}


def tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, size=(40, 9))
    targets = np.where(rng.random((40, 8)) < 0.3, -100, ids[:, 1:])
    return {"train": (ids[:32, :-1], targets[:32]), "test": (ids[32:, :-1], targets[32:])}


def stream_of_images():
    return images() | {"train": Stream(PLACES["train"], PIXELS)}


def stream_without_val():
    return {"train": Stream(PLACES["train"]), "test": rows()["test"]}


# what is wrong


class Broken(Rows):
    def __init__(self, **changes: Any):
        super().__init__(PLACES["train"])
        self.changes = changes

    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        change = self.changes.get(f"at_{index}", self.changes.get("always"))
        return change(sample) if change else sample


def _train(dataset: Any) -> dict[str, Any]:
    return {"train": dataset, "test": rows()["test"]}


def nothing():
    pass


def number():
    return 7


def only_dataset():
    return rows()["train"]


def misspelled():
    return rows() | {"tset": 1}


def two_names():
    return rows() | {"validation": rows()["val"]}


def channels_last():
    return _each(lambda place: (np.repeat(PIXELS[place, ..., None], 3, axis=-1), TARGETS[place]))


def no_length():
    return _train(type("NoLength", (Dataset,), {"__getitem__": lambda self, index: (INPUTS[0], 0)})())


def text():
    return _train("rows.csv")


def empty():
    return _train(Rows(slice(0, 0)))


def other_keys():
    return _train(Broken(always=lambda sample: {"x": 1, "y": 2}))


def three():
    return _train(Broken(always=lambda sample: (1, 2, 3)))


def ragged():
    return _train(Broken(at_7=lambda sample: sample | {"inputs": sample["inputs"][:3]}))


def raises():
    return _train(Broken(at_7=lambda sample: sample["outputs"]))


def strings():
    return _train(Broken(always=lambda sample: sample | {"inputs": "a text"}))


def ragged_inside():
    return _train(Broken(always=lambda sample: sample | {"inputs": [[1.0], [1.0, 2.0]]}))


def infinite():
    return _train(Broken(at_9=lambda sample: sample | {"inputs": sample["inputs"] * np.inf}))


def negative():
    return _train(Broken(at_9=lambda sample: sample | {"targets": -1}))


def unequal():
    return _train(Rows(PLACES["train"], INPUTS[:, :4]))


def real_test():
    return _train(Broken(always=lambda sample: sample | {"targets": 0.5}))


def random():
    return _train(Broken(always=lambda sample: sample | {"inputs": np.random.rand(COLUMNS)}))  # noqa: NPY002


class Killed(Rows):
    def __getitem__(self, index: int) -> Any:
        if index == 7 and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def killed():
    return _train(Killed(PLACES["train"]))


def stream_alone():
    return {"train": Stream(PLACES["train"])}


class BadState(StatefulStream):
    def state_dict(self) -> dict[str, Any]:
        return {"rng": np.random.default_rng(0)}


def bad_state():
    return rows() | {"train": BadState(PLACES["train"])}


class Ends(Stream):
    def __iter__(self):
        return (self.rows[index] for index in range(7))

    def __len__(self) -> int:
        return 9


def ends():
    return rows() | {"train": Ends(PLACES["train"])}
