"""Text and token ids as data: what is read, in which part it is, and what is refused."""

import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gengap_dist.config.sections import DataConfig
from gengap_dist.data import datasets
from gengap_dist.data.batch_loader import Preprocess
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.token_stream import END_OF_DOCUMENT
from gengap_dist.errors import UsageError
from tests.training.tasks.documents import write_documents

CONTEXT = 16


def load(folder: Path, **more) -> datasets.Splits:
    settings = {"name": "text", "root": folder, "context": CONTEXT} | more
    return datasets.load(DataConfig(**settings))


def documents(part: datasets.Samples) -> list[bytes]:
    """The documents of a part, from its sequences alone; padding begins no document."""
    stream = torch.cat([part.inputs.flatten(), part.targets[-1, -1:]]).tolist()
    out: list[list[int]] = []
    for token in stream:
        if token == ~END_OF_DOCUMENT:
            continue
        if token < 0:
            out.append([])
        out[-1].append(~token if token < 0 else token)
    assert all(document[-1] == END_OF_DOCUMENT for document in out)
    return [bytes(document[:-1]) for document in out]


@pytest.fixture
def folder(tmp_path):
    """60 ragged documents."""
    return write_documents(tmp_path / "text", 20_000)


def test_every_document_is_in_one_part_whole_and_in_order(folder):
    splits = load(folder, val_fraction=0.3)
    texts = [path.read_bytes() for path in sorted(folder.rglob("*.txt"))]
    found = [documents(part) for part in (splits.train, splits.val, splits.test)]
    assert sorted(text for part in found for text in part) == sorted(texts)
    assert all(part == [text for text in texts if text in part] for part in found)
    assert min(map(len, found)) > 0
    assert splits.facts["num_files"] == len(texts)
    assert splits.spec == DataSpec.tokens(257, CONTEXT, "byte")


def test_targets_are_the_next_tokens_and_those_that_nothing_predicts_do_not_count(folder):
    splits = load(folder)
    inputs, targets = splits.train.inputs, splits.train.targets
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    received = Preprocess(splits.pixels, torch.device("cpu"), torch.float32)(inputs)
    assert (received.dtype, int(received.min()) >= 0) == (torch.int64, True)
    after_end = received == END_OF_DOCUMENT  # the first of a document, or padding
    assert torch.equal(targets < 0, after_end)
    counts = (targets >= 0).sum(1)
    assert len(counts.unique()) > 3
    num_documents = len(documents(splits.train))
    assert int(counts.sum()) == splits.facts["num_tokens"]["train"] - num_documents


def test_a_part_depends_on_the_content_alone(folder, tmp_path):
    splits = load(folder, val_fraction=0.3)
    for number, path in enumerate(sorted(folder.rglob("*.txt"))):
        (tmp_path / "renamed").mkdir(exist_ok=True)
        if number % 3:  # others are gone, copies are there twice
            (tmp_path / "renamed" / f"{number}").write_bytes(path.read_bytes())
            (tmp_path / "renamed" / f"copy{number}").write_bytes(path.read_bytes())
    fewer = load(tmp_path / "renamed", val_fraction=0.3)
    for name in ("train", "val", "test"):
        here, there = (documents(getattr(each, name)) for each in (fewer, splits))
        assert {*here} <= {*there}
        assert all(here.count(text) == 2 for text in here)
    other = load(folder, val_fraction=0.3, split_seed=1)
    assert {*documents(other.val)} != {*documents(splits.val)}
    assert documents(other.test) == documents(splits.test)


def test_a_subset_keeps_the_shares_of_the_parts(folder):
    whole, some, more = load(folder), load(folder, num_train=100), load(folder, num_train=200)
    assert (len(some.train), len(some.val), len(some.test)) == (100, 10, 10)
    rows = {tuple(row) for row in more.train.inputs.tolist()}
    assert all(tuple(row) in rows for row in some.train.inputs.tolist())
    assert datasets.sizes(DataConfig(name="text", root=folder, context=CONTEXT))[:3] == tuple(
        map(len, (whole.train, whole.val, whole.test))
    )
    with pytest.raises(UsageError, match=r"data.num_train \(9,999\) is more than"):
        load(folder, num_train=9_999)


def test_what_is_no_text_is_left_out_and_nothing_waits(folder):
    plain = load(folder).digest()
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "empty").touch()
    (folder / ".hidden").write_text("hidden")
    os.mkfifo(folder / "pipe")
    (folder / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "zz_again").symlink_to(min(folder.rglob("*.txt")))
    with pytest.warns(UserWarning, match=r"1 file\(s\) are no UTF-8 text, and are skipped: a.jpg"):
        splits = load(folder)
    assert splits.digest() == plain
    assert splits.facts["num_skipped_files"] == 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no file of UTF-8 text among 0 files"),
        ({"a": b"\xff", "b": b""}, "has no file of UTF-8 text among 2 files"),
        ({"a": b"one document"}, "one sequence of data.context (16) needs 17"),
        ({f"{n}": b"%d" % n for n in range(12)}, "one sequence of data.context (16) needs 17"),
    ],
)
def test_too_little_text_is_refused(tmp_path, files, says):
    (tmp_path / "few").mkdir()
    for name, content in files.items():
        (tmp_path / "few" / name).write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(says)):
        load(tmp_path / "few")


def test_a_document_larger_than_memory_is_refused(folder):
    with pytest.raises(UsageError, match=r"data.memory_gib \(1e-07\) is less than .* which is one document: cut it"):
        load(folder, memory_gib=1e-7)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data.root \(.*nowhere\) is no folder"):
        load(tmp_path / "nowhere")


def test_the_standard_library(recwarn):
    splits = datasets.load(DataConfig(name="stdlib", num_train=64))
    summary = datasets.summary(splits, DataConfig(name="stdlib", num_train=64))
    assert (summary["python"], summary["root"], summary["token"]) == (platform.python_version(), None, "byte")
    assert summary["num_files"] > 100
    assert len(summary["digest"]) == 32
    assert (summary["num_train"], summary["num_val"]) == (64, 6)
    assert datasets.recorded_spec(summary) == splits.spec
    assert not [*recwarn]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(50, np.uint8), (300, np.uint16), (60_000, np.uint16), (70_000, np.uint32), (9, np.int64)]
)
def test_token_ids_of_a_user(tmp_path, vocab_size, dtype):
    ids = np.random.default_rng(0).integers(vocab_size, size=1_000).astype(dtype)
    ids[0] = vocab_size - 1
    np.save(tmp_path / "train.npy", ids)
    small = np.uint16 if vocab_size <= 2**16 else np.uint32
    ids[:101].astype(small).tofile(tmp_path / "test.bin")
    splits = load(tmp_path, name="tokens", vocab_size=vocab_size)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (56, 6, 6)
    assert splits.train.inputs.flatten().tolist() == ids[: 56 * CONTEXT].tolist()
    assert splits.val.targets.flatten().tolist() == ids[901 : 901 + 6 * CONTEXT].tolist()
    assert splits.test.inputs.flatten().tolist() == ids[: 6 * CONTEXT].tolist()
    assert splits.spec == DataSpec.tokens(vocab_size, CONTEXT)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (np.array([3, 9, 10]), "token 10 at position 2 is outside of 0 to 9"),
        (np.array([3, -1, 9]), "token -1 at position 1 is outside of 0 to 9"),
        (np.zeros((2, 3), dtype=int), "it has the shape [2, 3]"),
        (np.zeros(100), "the type float64, not one dimension of integers"),
        (np.array([{}], dtype=object), "does not hold tokens"),
        (np.zeros(9, dtype=int), "has 9 tokens for train, and one sequence of data.context (16) needs 17"),
        (None, "has neither train.npy nor train.bin"),
    ],
)
def test_wrong_token_ids_are_refused(tmp_path, train, says):
    np.save(tmp_path / "test.npy", np.zeros(100, dtype=int))
    if train is not None:
        np.save(tmp_path / "train.npy", train, allow_pickle=True)
    with pytest.raises(UsageError, match=re.escape(says)):
        load(tmp_path, name="tokens", vocab_size=10, val_fraction=0.0)


def test_a_pipe_or_an_odd_file_is_no_token_file(tmp_path):
    np.save(tmp_path / "test.npy", np.zeros(100, dtype=int))
    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(UsageError, match=r"train.bin is a named pipe, not a regular file"):
        load(tmp_path, name="tokens", vocab_size=10)
    (tmp_path / "train.bin").unlink()
    for content in (b"", b"abc"):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(UsageError, match=r"train.bin does not hold tokens of data.vocab_size \(10\)"):
            load(tmp_path, name="tokens", vocab_size=10)
