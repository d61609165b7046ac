import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.probes.spectra.layer_spectrum import LayerSpectrum
from gengap_dist.runs import run_folder
from gengap_dist.runs.run_folder import RunRecorder, load_spectra, prepare_folder, read_info, read_metrics
from gengap_dist.runs.schema import RunStatus


def test_lines_are_held_until_their_step_is_over(tmp_path):
    book = RunRecorder(tmp_path)
    book.log(1, 0.5, {"train/loss": 2.0})
    book.log(2, 1.0, {"train/loss": 1.0})
    book.flush(before=2)
    book.log(2, 1.0, {"val/accuracy": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    book.flush()
    lines = list(read_metrics(tmp_path))
    assert [line["step"] for line in lines] == [1, 2]
    assert (lines[1]["train/loss"], lines[1]["val/accuracy"]) == (1.0, 0.5)


def test_numbers_that_json_lacks_survive(tmp_path):
    book = RunRecorder(tmp_path)
    book.log(1, 0.5, {"a": float("nan"), "b": float("inf"), "c": 1e-300})
    book.flush()
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (line,) = read_metrics(tmp_path)
    assert np.isnan(line["a"])
    assert (line["b"], line["c"]) == (float("inf"), 1e-300)


def test_resume_drops_what_will_be_written_again(tmp_path):
    book = RunRecorder(tmp_path)
    for step in range(6):
        book.log(step, 0.0, {"x": step})
    book.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    again = RunRecorder(tmp_path)
    again.resume(4, 100.0, {4: {"step": 4, "epoch": 0.0, "seconds": 99.0, "x": 4.0}})
    again.log(5, 0.0, {"x": 5.0})
    again.flush()
    lines = list(read_metrics(tmp_path))
    assert [line["x"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[-1]["seconds"] >= 100


def test_resume_keeps_the_words_for_numbers_that_json_lacks(tmp_path):
    book = RunRecorder(tmp_path)
    book.log(1, 0.5, {"a": float("nan"), "b": float("-inf")})
    book.flush()
    before = (tmp_path / "metrics.jsonl").read_text()
    RunRecorder(tmp_path).resume(2, 1.0, {})
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_spectra_read_back(tmp_path):
    s = LayerSpectrum("conv1", "pool", True, 7, 3, torch.tensor([2.0, 1.0, 0.0]).double(), 1e-8, 1)
    RunRecorder(tmp_path).spectra(12, [s])
    values, facts = load_spectra(tmp_path / "spectra" / "step_00000012.npz")["conv1/pool/centred"]
    assert values.tolist() == [2.0, 1.0, 0.0]
    assert facts == {
        "layer": "conv1", "view": "pool", "centred": True, "floor": 1e-8, "num_samples": 7, "num_units": 3,
        "dead_units": 1,
    }  # fmt: skip


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    run_folder.write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run_folder.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_folders_of_others_are_not_touched(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"cannot be written"):
        prepare_folder(tmp_path / "file" / "run", "run.json", resume=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds other files"):
        prepare_folder(tmp_path / "thesis", "run.json", resume=True)
    prepare_folder(tmp_path / "new" / "deep", "run.json", resume=False)
    (tmp_path / "new" / "deep" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"already holds a run.json: add --resume"):
        prepare_folder(tmp_path / "new" / "deep", "run.json", resume=False)
    prepare_folder(tmp_path / "new" / "deep", "run.json", resume=True)


def test_an_abandoned_run_gets_its_last_status(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    RunRecorder(out).start(RunConfig(), {})
    run_folder.close_abandoned(out, RuntimeError("rank 1 died"))
    assert read_info(out).status == "failed"
    assert read_info(out).error == "RuntimeError: rank 1 died"
    RunRecorder(out).start(RunConfig(), {})
    run_folder.close_abandoned(out, KeyboardInterrupt())
    assert read_info(out).status == "killed"


def test_a_clock_that_is_set_back_ends_no_run_before_its_start(tmp_path, monkeypatch):
    def start(name: str) -> RunRecorder:
        (tmp_path / name).mkdir()
        recorder = RunRecorder(tmp_path / name)
        recorder.start(RunConfig(), {})
        return recorder

    ended, abandoned, started = start("ended"), start("abandoned"), run_folder.now()
    ended.resume(0, 90.0, {})  # so long has it trained
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="seconds")
    monkeypatch.setattr(run_folder, "now", lambda: hour_ago)
    ended.finish(RunStatus.FINISHED, {})
    run_folder.close_abandoned(abandoned.out, RuntimeError())
    info = read_info(ended.out)
    assert datetime.fromisoformat(info.ended) - datetime.fromisoformat(info.started) == timedelta(seconds=90)
    assert read_info(abandoned.out).ended == read_info(abandoned.out).started <= started


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    out = tmp_path / "run"
    prepare_folder(out, "run.json", resume=False)
    RunRecorder(out)
    run_folder.close_abandoned(out, UsageError("no data"))
    assert not out.exists()


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"run.json cannot be read"):
        read_info(tmp_path)


def test_only_files_of_spectra_are_found_whatever_lies_beside_them(tmp_path):
    for name in ("step_00000020.npz", "step_00000003.npz", "step_00000020_1.npz", "step_x.npz", ".step_00000004.npz.7"):
        (tmp_path / name).touch()
    assert run_folder.spectra_by_step(tmp_path) == {at: tmp_path / f"step_{at:08d}.npz" for at in (3, 20)}
