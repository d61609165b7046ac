"""Caches that other users may have written: none of them is read."""

import os
import stat
import tempfile

import pytest

from gengap_dist.config.sections import RunConfig
from gengap_dist.errors import UsageError
from gengap_dist.parallel.execution import check_compiler
from gengap_dist.preflight import machine_constants
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.runs import own_files
from gengap_dist.runs.own_files import default_path, read_own, write_own
from gengap_dist.training.autotune import cache
from gengap_dist.training.run_cost import CostCache, RunCost, cost_key

COST = dict.fromkeys(RunCost.model_fields, 1)


def fill() -> list[str]:
    """Write every cache; the names of their files."""
    cache.store("key", cache.MemoryFormat(channels_last=True, samples_per_second=(1.0, 2.0)))
    machine_constants.save(Constants(where="here"), None)
    CostCache(print).add({cost_key(RunConfig(), "cpu", 1, 1): RunCost.model_validate(COST | {"cpu_wait_share": 0})})
    return sorted(path.name for path in default_path().parent.iterdir())


@pytest.mark.parametrize("kind", ["another's", "writable by others"])
def test_no_cache_is_read_that_others_may_have_written(tmp_path, monkeypatch, recwarn, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0o002)  # as on many systems
    try:
        names = fill()
    finally:
        os.umask(before)
    assert names == ["constants.json", "micro_sizes.json", "run_costs.json"]
    assert stat.S_IMODE(default_path().parent.stat().st_mode) == 0o700
    said = list[str]()
    assert cache.load_micro_sizes().memory_formats
    assert machine_constants.load(None).where == "here"
    assert CostCache(said.append).found
    if kind == "another's":
        monkeypatch.setattr(own_files.os, "geteuid", lambda: 12345)
        monkeypatch.setattr(own_files, "ROOT", 12346)
    else:
        for name in names:
            default_path().with_name(name).chmod(0o664)
    assert not cache.load_micro_sizes().memory_formats
    assert "micro_sizes.json" in str(recwarn.pop(UserWarning).message)
    with pytest.raises(UsageError, match=r"constants.json.* (belongs to another user|can be written by others)"):
        machine_constants.load(None)
    assert not CostCache(said.append).found
    assert "run_costs.json is of no use" in said[0]
    constants = default_path()
    assert machine_constants.load(constants).where == "here"  # named by the user
    if kind != "another's":
        fill()
        assert cache.load_micro_sizes().memory_formats  # measured again, and this user's own


def test_a_folder_of_compiled_code_that_others_made_first_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # it ends with this test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", "sh")
    check_compiler("cpu")
    (folder,) = tmp_path.iterdir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(UsageError, match=r"can be written by others \(mode 777\), and is not used: remove it"):
        check_compiler("cpu")


def test_what_is_written_is_read(tmp_path):
    write_own(tmp_path / "a" / "b", "text")
    assert read_own(tmp_path / "a" / "b") == b"text"
