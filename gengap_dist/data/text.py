"""Data sets of tokens: text files as bytes, Python's standard library, ids of a user's own tokenizer.

Of text every file is a document. A hash of its content decides whether it is for training, validation or test, so that
copies of one file are on the same side.
"""

import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gengap_dist.config.loading import as_text
from gengap_dist.config.regular_file import open_regular
from gengap_dist.config.sections import DataConfig
from gengap_dist.data.data_spec import DataSpec
from gengap_dist.data.image_folder import files_below, kind_of
from gengap_dist.data.token_stream import VOCAB_SIZE, StreamWriter, read_ids, sequences
from gengap_dist.errors import UsageError, first_of

TEST_FRACTION = 0.1  # of the documents
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
}  # in its folder; tests are not everywhere

Sequences = tuple[Tensor, Tensor]
"""Inputs and targets, [N, T] each."""
Progress = Callable[[str, int, int], None]


class TokenData(NamedTuple):
    """A data set of tokens, by part."""

    train: Sequences
    val: Sequences
    test: Sequences
    spec: DataSpec
    facts: dict[str, Any]
    """More for run.json."""


def load_tokens(config: DataConfig, progress: Progress) -> TokenData:
    """The data set stdlib, text or tokens; its streams are memory-mapped.

    With data.num_train, validation and test keep their share of it: at most data.val_fraction and TEST_FRACTION times
    data.num_train sequences, drawn by data.split_seed.

    Raises:
        UsageError: if there is no text, a token is outside of the vocabulary, or a part has less than one sequence.
    """
    if config.name == "tokens":
        data = _read_tokens(config)
    else:
        with StreamWriter() as train, StreamWriter() as val, StreamWriter() as test:
            data = _read_text(config, {"train": train, "val": val, "test": test}, progress)
    if config.num_train is None:
        return data
    val = _drawn(data.val, round(config.num_train * config.val_fraction), config.split_seed, 7)
    return data._replace(val=val, test=_drawn(data.test, round(config.num_train * TEST_FRACTION), config.split_seed, 8))


def _drawn(part: Sequences, largest: int, *seed: int) -> Sequences:
    num = len(part[0])
    chosen = np.sort(np.random.default_rng(seed).permutation(num)[: max(1, largest)])
    inputs, targets = (each[torch.from_numpy(chosen)] for each in part)
    return inputs, targets


def _read_text(config: DataConfig, parts: Mapping[str, StreamWriter], progress: Progress) -> TokenData:
    paths, root = _library() if config.name == "stdlib" else _folder(config)
    skipped: list[str] = []
    for done, path in enumerate(paths, 1):
        text = _text(path, config)
        if text:
            parts[_part(text, config)].add(text)
        elif text is None:
            skipped.append(as_text(path.relative_to(root).as_posix()))
        if done % 500 == 0:
            progress("reading text", done, len(paths))
    num_files = sum(part.num_documents for part in parts.values())
    if not num_files:
        raise UsageError(
            f"{_source(config)} has no file of UTF-8 text among {len(paths):,} files: choose a folder with text"
        )
    if skipped:
        warnings.warn(
            f"{root}: {len(skipped):,} file(s) are no UTF-8 text, and are skipped: {first_of(skipped)}",
            stacklevel=2,
        )
    needed = [name for name in parts if name != "val" or config.val_fraction]
    for name in needed:
        if parts[name].num_tokens <= config.context:
            raise UsageError(
                f"{_source(config)} has {num_files:,} documents, of which {parts[name].num_documents:,} with "
                f"{parts[name].num_tokens:,} tokens are for {name}, and one sequence of data.context "
                f"({config.context}) needs {config.context + 1:,}: choose a smaller data.context, or text in more files"
            )
    facts: dict[str, Any] = {"num_files": num_files, "num_skipped_files": len(skipped)}
    facts |= {"num_tokens": {name: part.num_tokens for name, part in parts.items()}}
    if config.name == "stdlib":
        facts["python"] = platform.python_version()
    train, val, test = (part.sequences(config.context) for part in parts.values())
    return TokenData(train, val, test, DataSpec.tokens(VOCAB_SIZE, config.context, "byte"), facts)


def _source(config: DataConfig) -> str:
    return "data.name (stdlib)" if config.name == "stdlib" else f"data.root ({config.root})"


def _library() -> tuple[list[Path], Path]:
    """The Python files of the standard library, without its tests, and their folder."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {(root / name).resolve() for name in NOT_LIBRARY}  # may be large
    paths = (path for path in files_below(root, left_out) if path.suffix == ".py")
    return _regular(path for path in paths if not NOT_LIBRARY & {*path.relative_to(root).parts}), root


def _folder(config: DataConfig) -> tuple[list[Path], Path]:
    if not config.root.is_dir():
        raise UsageError(f"data.root ({config.root}) is no folder: give the folder that holds the text files")
    return _regular(files_below(config.root)), config.root


def _regular(paths: Iterable[Path]) -> list[Path]:
    """Each real file once; what is no regular file, such as a named pipe, is left out."""
    real = {os.path.realpath(path): path for path in reversed([*paths])}
    return [path for path in reversed(real.values()) if path.is_file()]


def _text(path: Path, config: DataConfig) -> bytes | None:
    """The content of a file; None if it is not UTF-8."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > config.memory_gib * 2**30:
                raise UsageError(
                    f"data.memory_gib ({config.memory_gib:g}) is less than the {size / 2**30:.3g} GiB of "
                    f"{as_text(str(path))}, which is one document: cut it into several files"
                )
            text = file.read()
    except OSError as error:
        raise UsageError(
            f"data.root: {as_text(str(path))} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from None
    try:
        text.decode()
    except UnicodeDecodeError:
        return None
    return text


def _part(text: bytes, config: DataConfig) -> str:
    """The part of a document: of test by its content alone, of validation by that and data.split_seed."""

    def share(salt: int) -> float:
        digest = hashlib.blake2b(text, digest_size=8, salt=salt.to_bytes(16, "little")).digest()
        return int.from_bytes(digest) / 2**64

    if share(0) < TEST_FRACTION:
        return "test"
    return "val" if share((config.split_seed + 1) % 2**128) < config.val_fraction else "train"


def _read_tokens(config: DataConfig) -> TokenData:
    """root/train and root/test, each .npy or .bin; the last part of the former is for validation."""
    assert config.vocab_size is not None
    streams: dict[str, Tensor] = {}
    for name in ("train", "test"):
        paths = [config.root / f"{name}{suffix}" for suffix in (".npy", ".bin")]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UsageError(f"data.root ({config.root}) has neither {name}.npy nor {name}.bin: write the ids there")
        if not path.is_file():
            raise UsageError(f"data.root: {path} is {kind_of(path)}, not a regular file: replace it")
        try:
            streams[name] = read_ids(path, config.vocab_size)
        except (ValueError, OSError, EOFError) as error:
            raise UsageError(
                f"data.root: {path} does not hold tokens of data.vocab_size ({config.vocab_size}): {error}; write it "
                "again, or correct data.vocab_size"
            ) from None
    num_val = int(len(streams["train"]) * config.val_fraction)
    num_train = len(streams["train"]) - num_val
    parts = {"train": streams["train"][:num_train], "val": streams["train"][num_train:], "test": streams["test"]}
    for name, stream in parts.items():
        if len(stream) <= config.context and (num_val or name != "val"):
            raise UsageError(
                f"data.root ({config.root}) has {len(stream):,} tokens for {name}, and one sequence of data.context "
                f"({config.context}) needs {config.context + 1:,}: choose a smaller data.context, or more tokens"
            )
    facts = {"num_tokens": {name: len(stream) for name, stream in parts.items()}}
    train, val, test = (
        sequences(stream if len(stream) else torch.zeros(1, dtype=torch.int16), config.context)
        for stream in parts.values()
    )
    return TokenData(train, val, test, DataSpec.tokens(config.vocab_size, config.context), facts)
