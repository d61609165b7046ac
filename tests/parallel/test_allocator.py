"""What a pass frees is there for the next without the kernel, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import ctypes, resource
from gengap_dist.parallel.execution import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KiB
told = keep_freed_memory()
for turn in range(4):  # as passes do: several blocks live at once, large and small
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(size * 2**20) for size in (1, 40, 3, 70)]  # zeroed
    for block in blocks:
        block[:: 4096] = b"1" * (len(block) // 4096)
    del block, blocks
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> tuple[bool, int]:
    """Whether it told malloc, and page faults of the last of several turns."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    env |= {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", SCRIPT]
    told, number = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    return told == "True", int(number)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_memory_that_was_freed_is_not_asked_for_again():
    told, kept = faults()
    assert told
    assert kept < 200
    told, usual = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not told
    assert usual > 20_000  # 114 MiB in pages of 4 KiB
