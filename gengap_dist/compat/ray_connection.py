"""Whether a Ray cluster answers at an address (Ray 2.60).

A subprocess connects: at an address that does not answer, ray.init blocks for minutes and ignores signals. Why it
failed is in the text of errors only.

Remove when ray.init has a timeout, and errors of their own type for "no cluster on this machine" and for a wrong token.
"""

import os
import subprocess
import sys

from gengap_dist.compat.safe_path import safe_path_variables

_NO_CLUSTER = 3  # exit code of _SCRIPT if "auto" finds no cluster
_SCRIPT = f"""
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except ConnectionError as error:
    print(error, file=sys.stderr)
    sys.exit({_NO_CLUSTER} if sys.argv[1] == "auto" and "find any running" in str(error) else 1)
"""


def connects(address: str, timeout_seconds: float) -> tuple[bool, str]:
    """Whether a cluster answers, and if not, why; the reason is empty if the address is "auto" and there is none."""
    command = [sys.executable, "-c", _SCRIPT, address]
    process = subprocess.Popen(
        command,
        env=os.environ | safe_path_variables(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    try:
        _, output = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, output = process.communicate()
        output = output if "Unauthenticated" in output else f"no answer within {timeout_seconds:g} s"
    if process.returncode in (0, _NO_CLUSTER):
        return process.returncode == 0, ""
    if "Unauthenticated" in output or "AuthenticationError" in output:
        return False, "it requires another authentication token"
    return False, output.strip().splitlines()[-1][:200] if output.strip() else f"exit code {process.returncode}"
