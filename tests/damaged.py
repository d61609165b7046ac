"""Damaged folders of studies: what full disks, editors, other programs and strangers leave. Everything is seeded.

    damage(study, "metrics.jsonl: a word", seed)    damages one file of a study folder; the names are those of SHAPES
    fuzz(study, seed)                               damages one to three files of it, at random

The study is one of `tests.analysis.report.folders.write_study`, or one that was trained. Both return the folders that
were damaged, of a run or of the study.
"""

import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Shape = Callable[[Path, random.Random], object]
"""Damages the folder of a run, or of a study."""

DEEP = "[" * 100_000 + "]" * 100_000
ODD = (  # JSON
    "null", "true", "-1", "0", "0.5", "1e999", "NaN", "9" * 400, "9" * 5000, '""', '"word"', '"nan"', '"\\u0000"',
    '"\\ud800"', '"../../../etc/passwd"', '"' + "x" * 5000 + '"', "[]", "[1]", '["a", null]', "[[[]]]", "{}",
    '{"a": 1}', '{"a": {"b": []}}', DEEP,
)  # fmt: skip


# -- JSON and bytes ---------------------------------------------------------------------------------------------------


def write(name: str, content: bytes) -> Shape:
    """A file with this content."""

    def shape(folder: Path, rng: random.Random) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return shape


def cut(name: str, share: float) -> Shape:
    """The first part of a file."""
    return lambda folder, rng: write(name, (content := (folder / name).read_bytes())[: int(share * len(content))])(
        folder, rng
    )


def replaced(name: str, make: Callable[[Path], object]) -> Shape:
    """Something else in the place of a file."""

    def shape(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return shape


def dumped(tree: Any, value: str) -> str:
    """A tree as JSON with `value`, JSON itself, in the place of "@"."""
    return json.dumps(tree).replace('"@"', value)


def put(tree: Any, path: str, value: Any) -> Any:
    """A tree with a value at a dotted path."""
    *parents, last = path.split(".")
    inner = tree
    for key in parents:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    inner[last] = value
    return tree


def field(file: str, path: str, value: str) -> Shape:
    """A JSON file with `value`, JSON itself, at a dotted path."""
    return lambda folder, rng: (folder / file).write_text(
        dumped(put(json.loads((folder / file).read_bytes()), path, "@"), value)
    )


def without(file: str, name: str) -> Shape:
    """A JSON file without a field."""

    def shape(folder: Path, rng: random.Random) -> None:
        tree = json.loads((folder / file).read_bytes())
        del tree[name]
        (folder / file).write_text(json.dumps(tree))

    return shape


def anywhere(file: str) -> Shape:
    """A JSON file with something odd at a random place."""

    def shape(folder: Path, rng: random.Random) -> None:
        tree = inner = json.loads((folder / file).read_bytes())
        while True:
            key = rng.choice([*inner])
            if isinstance(inner[key], dict) and inner[key] and rng.random() < 0.7:
                inner = inner[key]
                continue
            inner[key] = "@"
            break
        (folder / file).write_text(dumped(tree, rng.choice(ODD)))

    return shape


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def any_line(change: Callable[[bytes], bytes]) -> Shape:
    """metrics.jsonl with a change of a random line."""

    def shape(folder: Path, rng: random.Random) -> None:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = change(lines[at])
        (folder / "metrics.jsonl").write_bytes(b"".join(lines))

    return shape


def metric(name: str, value: str) -> Shape:
    """metrics.jsonl with `value`, JSON itself, as a metric of a random line."""
    return any_line(lambda line: dumped(json.loads(line) | {name: "@"}, value).encode() + b"\n")


def stepless(line: bytes) -> bytes:
    """A line of metrics.jsonl without its step."""
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "step"}).encode() + b"\n"


# -- arrays -----------------------------------------------------------------------------------------------------------


class Opener:
    """What a pickle that is loaded would do: make a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("executed", "w")


def npy(array: Any) -> bytes:
    """An array as a file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    """Arrays as a file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def huge_npy() -> bytes:
    """A file that says it holds an array of a petabyte."""
    return npy(np.zeros(1000)).replace(b"(1000,), ", b"(999999999999999,), ", 1)


FACTS = {
    "layer": "fc1",
    "view": "",
    "centred": False,
    "floor": 1e-7,
    "num_samples": 64,
    "num_units": 8,
    "dead_units": 0,
}


def spectra(content: bytes | None = None, values: Any = None, **facts: Any) -> Shape:
    """All files of spectra with this content, or with these singular values and these facts of fc1."""
    values = np.array([1.0, 0.5, 1e-3]) if values is None else values
    content = npz(fc1=values, meta=np.array(json.dumps({"fc1": FACTS | facts}))) if content is None else content

    def shape(folder: Path, rng: random.Random) -> None:
        for path in sorted((folder / "spectra").glob("*.npz")) or [folder / "spectra" / "step_00000010.npz"]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return shape


def correct(content: bytes, num_test: str = "360") -> Shape:
    """test_correct.npy with this content, of a run with `num_test` test samples."""

    def shape(folder: Path, rng: random.Random) -> None:
        write("test_correct.npy", content)(folder, rng)
        field("run.json", "result.num_test", num_test)(folder, rng)

    return shape


def columns(**arrays: Any) -> Shape:
    """A slim run, whose metrics.npz has these arrays."""
    names = np.frombuffer(json.dumps(["step", "train/loss"]).encode(), dtype=np.uint8)
    whole = {"size": 0, "num_lines": 2, "names": names, "starts": np.array([0, 2, 4]),
             "rows": np.array([0, 1, 0, 1], np.int32), "values": np.array([0.0, 20, 2, 1])}  # fmt: skip

    def shape(folder: Path, rng: random.Random) -> None:
        (folder / "metrics.jsonl").unlink()
        (folder / "metrics.npz").write_bytes(npz(**whole | arrays))

    return shape


OBJECTS = np.array([Opener()], dtype=object)

RUN_SHAPES: dict[str, Shape] = {
    "run.json: cut": cut("run.json", 0.5),
    "run.json: empty": write("run.json", b""),
    "run.json: NUL": write("run.json", bytes(1000)),
    "run.json: not UTF-8": write("run.json", b'{"status": "\xff\xfe"}'),
    "run.json: a list": write("run.json", b"[]"),
    "run.json: null": write("run.json", b"null"),
    "run.json: deep": write("run.json", DEEP.encode()),
    "run.json: deep settings": field("run.json", "config", '{"a": ' * 150 + "1" + "}" * 150),
    "run.json: a folder": replaced("run.json", Path.mkdir),
    "run.json: a pipe": replaced("run.json", os.mkfifo),
    "run.json: a link to itself": replaced("run.json", lambda path: path.symlink_to(path)),
    "run.json: endless": replaced("run.json", lambda path: path.symlink_to("/dev/zero")),
    "run.json: status": field("run.json", "status", '"finis"'),
    "run.json: seed": field("run.json", "seed", '"zero"'),
    "run.json: huge seed": field("run.json", "seed", "9" * 5000),
    "run.json: no settings": without("run.json", "config"),
    "run.json: settings": field("run.json", "config", "[1]"),
    "run.json: no batch": field("run.json", "config.batch", "null"),
    "run.json: batch": field("run.json", "config.batch.global_size", '"eight"'),
    "run.json: batch of 0": field("run.json", "config.batch.global_size", "0"),
    "run.json: huge batch": field("run.json", "config.batch.global_size", "9" * 400),
    "run.json: target": field("run.json", "config.train.target_accuracy", '"high"'),
    "run.json: target loss": field("run.json", "config.train.target_loss", '"low"'),
    "run.json: betas": field("run.json", "config.optim.betas", '["a"]'),
    "run.json: section": field("run.json", "config.train", '"word"'),
    "run.json: model": field("run.json", "config.model", "7"),
    "run.json: result": field("run.json", "result", '"good"'),
    "run.json: no result": field("run.json", "result", "null"),
    "run.json: test word": field("run.json", "result.test/accuracy", '"high"'),
    "run.json: test list": field("run.json", "result.test/accuracy", "[0.9]"),
    "run.json: test huge": field("run.json", "result.test/accuracy", "9" * 400),
    "run.json: steps": field("run.json", "result.num_steps", '"many"'),
    "run.json: no steps": field("run.json", "result", "{}"),
    "run.json: updates": field("run.json", "result.updates_to_target", "{}"),
    "run.json: updates 0": field("run.json", "result.updates_to_target", "0"),
    "run.json: loss": field("run.json", "result.train_full/loss", "[[]]"),
    "run.json: metric": field("run.json", "metric", '"accuracy"'),
    "run.json: metric name": field("run.json", "metric", '{"name": "", "unit": "share", "higher_is_better": true}'),
    "run.json: chance": field(
        "run.json", "metric", '{"name": "accuracy", "unit": "share", "higher_is_better": true, "chance": "low"}'
    ),
    "run.json: data": field("run.json", "data", '"digits"'),
    "run.json: digest": field("run.json", "data.digest", "7"),
    "run.json: sizes": field("run.json", "data.num_train", '"all"'),
    "run.json: started": field("run.json", "started", '"yesterday"'),
    "run.json: started number": field("run.json", "started", "7"),
    "run.json: ended": field("run.json", "ended", '"2026-13-45"'),
    "run.json: seconds": field("run.json", "seconds", '"long"'),
    "run.json: layer": field("run.json", "last_hidden_layer", "[]"),
    "run.json: samples": field("run.json", "num_probe_samples", '"64 of them"'),
    "run.json: git": field("run.json", "git", "{}"),
    "run.json: commit": field("run.json", "git", '{"commit": 7, "dirty": "no"}'),
    "run.json: command": field("run.json", "command", '"gengap train"'),
    "run.json: versions": field("run.json", "versions", '["2.0"]'),
    "run.json: model file": field(
        "run.json", "model",
        '{"file": "../../../../../etc/passwd", "torch": "2", "metadata": {}, '
        '"input": {"dtype": "float32", "shape": []}, "output": {"dtype": "float32", "shape": []}}',
    ),
    "run.json: surrogate": field("run.json", "error", '"\\ud800"'),
    "run.json: anywhere": anywhere("run.json"),
    "metrics.jsonl: missing": lambda folder, rng: (folder / "metrics.jsonl").unlink(),
    "metrics.jsonl: empty": write("metrics.jsonl", b""),
    "metrics.jsonl: cut": cut("metrics.jsonl", 0.6),
    "metrics.jsonl: NUL": any_line(lambda line: bytes(len(line) - 1) + b"\n"),
    "metrics.jsonl: not UTF-8": any_line(lambda line: b'{"step": 1, "\xff": 1}\n'),
    "metrics.jsonl: a word": metric("train/loss", '"high"'),
    "metrics.jsonl: a list": metric("train/loss", "[1, 2]"),
    "metrics.jsonl: an object": metric("train/loss", '{"mean": 1}'),
    "metrics.jsonl: null": metric("train/loss", "null"),
    "metrics.jsonl: true": metric("train/loss", "true"),
    "metrics.jsonl: huge": metric("train/loss", "9" * 400),
    "metrics.jsonl: huge digits": metric("train/loss", "9" * 5000),
    "metrics.jsonl: deep": metric("train/loss", DEEP),
    "metrics.jsonl: infinite": metric("val/accuracy", "1e999"),
    "metrics.jsonl: surrogate": metric("\ud800", "1"),
    "metrics.jsonl: strange name": metric("near_rank_loss/\u0000//rel_1e-2", "0.5"),
    "metrics.jsonl: no step": any_line(stepless),
    "metrics.jsonl: step word": metric("step", '"one"'),
    "metrics.jsonl: step nan": metric("step", '"nan"'),
    "metrics.jsonl: step half": metric("step", "0.5"),
    "metrics.jsonl: step negative": metric("step", "-3"),
    "metrics.jsonl: step huge": metric("step", "9" * 30),
    "metrics.jsonl: epoch": metric("epoch", "[]"),
    "metrics.jsonl: line list": any_line(lambda line: b"[1, 2]\n"),
    "metrics.jsonl: line number": any_line(lambda line: b"7\n"),
    "metrics.jsonl: line empty": any_line(lambda line: b"\n"),
    "metrics.jsonl: line {}": any_line(lambda line: b"{}\n"),
    "metrics.jsonl: line twice": any_line(lambda line: line + line),
    "metrics.jsonl: reversed": lambda folder, rng: (folder / "metrics.jsonl").write_bytes(
        b"".join(reversed((folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)))
    ),
    "metrics.jsonl: a folder": replaced("metrics.jsonl", Path.mkdir),
    "metrics.jsonl: a pipe": replaced("metrics.jsonl", os.mkfifo),
    "metrics.jsonl: endless": replaced("metrics.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "spectra: empty": spectra(b""),
    "spectra: NUL": spectra(bytes(1000)),
    "spectra: cut": spectra(npz(fc1=np.ones(8), meta=np.array("{}"))[:-60]),
    "spectra: no meta": spectra(npz(fc1=np.ones(8))),
    "spectra: meta": spectra(npz(fc1=np.ones(8), meta=np.array("no JSON"))),
    "spectra: meta list": spectra(npz(fc1=np.ones(8), meta=np.array("[1]"))),
    "spectra: no array": spectra(npz(meta=np.array(json.dumps({"fc1": FACTS})))),
    "spectra: no facts": spectra(npz(fc1=np.ones(8), meta=np.array('{"fc1": {}}'))),
    "spectra: floor": spectra(floor="low"),
    "spectra: sizes": spectra(num_samples="all", num_units=None),
    "spectra: words": spectra(values=np.array(["a", "b"])),
    "spectra: objects": spectra(values=OBJECTS),
    "spectra: a matrix": spectra(values=np.ones((2, 3))),
    "spectra: no values": spectra(values=np.ones(0)),
    "spectra: nan": spectra(values=np.array([np.nan, np.nan])),
    "spectra: negative": spectra(values=np.array([-1.0, -2.0])),
    "spectra: all 0": spectra(values=np.zeros(3)),
    "spectra: none": spectra(npz(meta=np.array("{}"))),
    "spectra: a file": lambda folder, rng: (folder / "spectra").rename(folder / "away") and write("spectra", b"x")(
        folder, rng
    ),
    "spectra: a folder": lambda folder, rng: (folder / "spectra" / "step_99999999.npz").mkdir(parents=True),
    "test_correct.npy: empty": correct(b""),
    "test_correct.npy: cut": correct(npy(np.zeros(45, np.uint8))[:-20]),
    "test_correct.npy: short": correct(npy(np.zeros(4, np.uint8))),
    "test_correct.npy: floats": correct(npy(np.zeros(45))),
    "test_correct.npy: objects": correct(npy(OBJECTS)),
    "test_correct.npy: huge": correct(huge_npy()),
    "test_correct.npy: number": correct(npy(np.zeros(45, np.uint8)), '"all"'),
    "test_correct.npy: negative": correct(npy(np.zeros(45, np.uint8)), "-8"),
    "metrics.npz: cut": lambda folder, rng: (columns()(folder, rng), cut("metrics.npz", 0.7)(folder, rng)),
    "metrics.npz: rows": columns(rows=np.array([0, 9, 0, -7], np.int32)),
    "metrics.npz: starts": columns(starts=np.array([0, 9, 4])),
    "metrics.npz: values": columns(values=np.array([1.0])),
    "metrics.npz: words": columns(values=np.array(["a", "b", "c", "d"])),
    "metrics.npz: objects": columns(values=OBJECTS),
    "metrics.npz: names": columns(names=np.frombuffer(b"{}", dtype=np.uint8)),
    "metrics.npz: steps": columns(values=np.array([20.0, 0, 2, 1])),
    "metrics.npz: no step": columns(names=np.frombuffer(b'["a", "b"]', dtype=np.uint8)),
    "metrics.npz: lines": columns(num_lines=10**12),
    "mlflow.json: a list": write("mlflow.json", b"[1]"),
    "mlflow.json: cut": write("mlflow.json", b'{"uri": "sql'),
    "mlflow.json: no store": write("mlflow.json", b'{"run_id": 7}'),
    "config.yaml: cut": write("config.yaml", b"batch: {global_size"),
    "config.yaml: a list": write("config.yaml", b"[1, 2]\n"),
    "config.yaml: extends": write("config.yaml", b"extends: ../../../../../etc/passwd\n"),
}  # fmt: skip
"""Of the folder of a run."""

STUDY_SHAPES: dict[str, Shape] = {
    "study.json: cut": cut("study.json", 0.5),
    "study.json: NUL": write("study.json", bytes(1000)),
    "study.json: a list": write("study.json", b"[]"),
    "study.json: deep": write("study.json", DEEP.encode()),
    **{f"study.json: no {name}": without("study.json", name) for name in ("name", "baseline", "arms", "seeds")},
    "study.json: seeds": field("study.json", "seeds", '["a"]'),
    "study.json: arms": field("study.json", "arms", "[1, null]"),
    "study.json: arm outside": field("study.json", "arms", '["sb8", "../../outside"]'),
    "study.json: other baseline": field("study.json", "baseline", '"nobody"'),
    "study.json: settings": field("study.json", "config", '"none"'),
    "study.json: section": field("study.json", "config", '{"study": ["a"]}'),
    "study.json: tolerance": field("study.json", "config", '{"study": {"tolerance": "wide"}}'),
    "study.json: looks": field("study.json", "config", '{"study": {"looks": "often", "may_extend": 7}}'),
    "study.json: across": field("study.json", "config", '{"across": 7}'),
    "study.json: tuned": field("study.json", "tuned", '{"sb8": [1]}'),
    "study.json: trials": field("study.json", "tuned", '{"sb8": {"trials": [7], "best": "none"}}'),
    "study.json: matched": field("study.json", "matched", '{"sb8": {"trials": [{"setting": 1}], "target": "low"}}'),
    "study.json: registration": field("study.json", "registration", "{}"),
    "study.json: later": field("study.json", "registration", '{"sha256": "a", "later": [1]}'),
    "study.json: declared": field("study.json", "declared", '{"looks": [0, "a"]}'),
    "study.json: judged": field("study.json", "judged", "[[1], 2]"),
    "study.json: members": field("study.json", "members", '[{"arm": "sb8"}]'),
    "study.json: members elsewhere": field("study.json", "members", '[{"arm": "sb8", "folder": "/nowhere"}]'),
    "study.json: members NUL": field("study.json", "members", '[{"arm": "sb8", "folder": "\\u0000"}]'),
    "study.json: metrics": field("study.json", "metrics", '{"a": "b"}'),
    "study.json: verdicts": field("study.json", "verdicts", "[1]"),
    "study.json: anywhere": anywhere("study.json"),
    "mean.jsonl: a word": write("runs/sb8/mean.jsonl", b"word\n"),
    "mean.jsonl: a list": write("runs/sb8/mean.jsonl", b'{"made_of": [1]}\n{"step": "a"}\n'),
    "SHA256SUMS: not UTF-8": write("SHA256SUMS", b"\xff\xfe"),
    "SHA256SUMS: outside": write("SHA256SUMS", b"0  ../../../../etc/passwd\n"),
}
"""Of the folder of a study."""

SHAPES = {**RUN_SHAPES, **STUDY_SHAPES}


def in_checkpoint(shape: Shape) -> Shape:
    """The same of the last checkpoint of a run."""
    return lambda folder, rng: shape(max((folder / "checkpoints").glob("step_*")), rng)


def signed(name: str, change: Callable[[dict[str, Any]], Any]) -> Shape:
    """A checkpoint with a change of the content of a file, and the checksum of what it has become."""

    def shape(folder: Path, rng: random.Random) -> None:
        torch.save(change(torch.load(folder / name, weights_only=True)), folder / name)
        facts = json.loads((folder / "checkpoint.json").read_bytes())
        facts["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "checkpoint.json").write_text(json.dumps(facts))

    return in_checkpoint(shape)


CHECKPOINT_SHAPES: dict[str, Shape] = {
    **{
        f"checkpoint.json: {name}": in_checkpoint(write("checkpoint.json", content))
        for name, content in (("empty", b""), ("NUL", bytes(99)), ("a list", b"[]"), ("deep", DEEP.encode()))
    },
    "checkpoint.json: step": in_checkpoint(field("checkpoint.json", "step", '"last"')),
    "checkpoint.json: schema": in_checkpoint(field("checkpoint.json", "schema", "true")),
    "checkpoint.json: sums": in_checkpoint(field("checkpoint.json", "sha256", "[1]")),
    "checkpoint.json: outside": in_checkpoint(field("checkpoint.json", "sha256", '{"../../run.json": "0"}')),
    "checkpoint.json: settings": in_checkpoint(field("checkpoint.json", "config", "[1]")),
    "checkpoint.json: run": in_checkpoint(field("checkpoint.json", "run", "[1]")),
    "model.pt: cut": in_checkpoint(cut("model.pt", 0.5)),
    "model.pt: a pipe": in_checkpoint(replaced("model.pt", os.mkfifo)),
    "model.pt: a list": signed("model.pt", lambda state: [1]),
    "model.pt: nothing": signed("model.pt", lambda state: {}),
    "model.pt: words": signed("model.pt", lambda state: dict.fromkeys(state, "word")),
    "model.pt: code": signed("model.pt", lambda state: state | {"code": Opener()}),
    "algorithm.pt: a list": signed("algorithm.pt", lambda state: [1]),
    "algorithm.pt: average": signed("algorithm.pt", lambda state: {"average": [1]}),
    "optimizer.pt: a list": signed("optimizer.pt", lambda state: [1]),
    "optimizer.pt: words": signed("optimizer.pt", lambda state: dict.fromkeys(state, "word")),
    "optimizer.pt: other names": signed("optimizer.pt", lambda state: {"nobody": {"momentum_buffer": torch.zeros(3)}}),
    "run.pt: nothing": signed("run.pt", lambda state: {}),
    **{
        f"run.pt: {name}": signed("run.pt", lambda state, name=name: state | {name: "word"})
        for name in ("schema", "train", "seconds", "evaluator", "probes", "step_metrics", "pending_rows", "scaler")
    },
    "run.pt: step": signed("run.pt", lambda state: state | {"train": {"step": -7, "train_seconds": 0.0}}),
}
"""Of a run that was trained."""


def damage(study: Path, name: str, seed: int = 0) -> Path:
    """Damage the study, or one of its runs, by a shape of SHAPES; returns the folder that was damaged."""
    rng = random.Random(f"{name} {seed}")
    folder = study if name in STUDY_SHAPES else rng.choice(sorted(study.glob("runs/*/seed*")))
    SHAPES[name](folder, rng)
    return folder


def fuzz(study: Path, seed: int) -> dict[str, Path]:
    """Damage one to three files of a study at random; returns the shapes, each with the folder that was damaged."""
    rng = random.Random(seed)
    files = sorted({name.split(":")[0] for name in SHAPES})
    shapes = [
        rng.choice([name for name in SHAPES if name.startswith(f"{file}:")])
        for file in rng.sample(files, rng.randint(1, 3))
    ]
    done: dict[str, Path] = {}
    for shape in shapes:
        try:
            done[shape] = damage(study, shape, seed)
        except (OSError, ValueError, RecursionError):  # another one has damaged the same file
            continue
    return done
