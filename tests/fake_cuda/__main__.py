"""Run a Python program on fake GPUs.

usage: python -m tests.fake_cuda [--gpus N] [--mib M] PROGRAM...

  --gpus N    how many fake GPUs [1]
  --mib M     memory of each, in MiB [80 GiB]
  PROGRAM...  what Python is to run: FILE or -m MODULE, and its arguments

example: python -m tests.fake_cuda --gpus 2 -m gengap_dist.train --launch.device cuda --launch.num_processes 2
"""

import os
import sys

from tests.fake_cuda import environment, missing

if __name__ == "__main__":
    words = sys.argv[1:]
    given = {"--gpus": 1, "--mib": None}
    while len(words) > 1 and words[0] in given:
        given[words[0]] = int(words[1])
        words = words[2:]
    if not words or words[0] in ("-h", "--help"):
        sys.exit(__doc__)
    if reason := missing():
        sys.exit(reason)
    os.environ |= environment(given["--gpus"] or 1, mib=given["--mib"])
    os.execv(sys.executable, [sys.executable, *words])
