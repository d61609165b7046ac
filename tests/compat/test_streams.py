"""Workarounds for Python's output streams, in processes of their own."""

import os
import subprocess
import sys

import pytest

WRITING = """
import sys
from gengap_dist.compat.standard_streams import keep_streams
keep_streams()
for stream in (sys.stdout, sys.stderr):
    for number in range(20000):
        print("a line", file=stream)
    stream.flush()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    file.write(f"done {sys.stdout.isatty()} {sys.stdout.encoding}")
"""


@pytest.mark.parametrize(
    "streams", ["2>&1 | head -c1 >/dev/null", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"]
)
def test_writing_goes_on_when_nobody_reads(tmp_path, streams):
    line = f'"{sys.executable}" -c "$CODE" done {streams}'
    env = os.environ | {"CODE": WRITING}
    end = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=tmp_path, env=env, timeout=60)
    assert end.returncode == 0
    assert (tmp_path / "done").read_text().lower() == "done false utf-8"


def test_what_is_read_arrives():
    code = "from gengap_dist.compat.standard_streams import keep_streams as k; k(); k(); print('\u2588'); 1 / 0"
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert end.stdout == "\u2588\n".encode()
    assert b"ZeroDivisionError" in end.stderr
