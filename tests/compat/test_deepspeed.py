"""Workarounds for DeepSpeed. A test that fails says which file of compat/ may go, or no longer works."""

import logging
import os

import pytest

from gengap_dist.compat.deepspeed_start import ACCELERATOR_VARIABLE, errors_only, import_deepspeed


@pytest.mark.parametrize("value", [None, "cpu"])
def test_the_import_leaves_the_environment_as_it_was(monkeypatch, value):
    monkeypatch.delenv(ACCELERATOR_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(ACCELERATOR_VARIABLE, value)
    import_deepspeed("cpu")
    assert os.environ.get(ACCELERATOR_VARIABLE) == value


def test_errors_are_still_logged():
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    with errors_only():
        assert (logger.isEnabledFor(logging.WARNING), logger.isEnabledFor(logging.ERROR)) == (False, True)
    assert logger.level == before
