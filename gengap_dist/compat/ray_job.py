"""Whether `ray job submit` has started this process; Ray has no function that says so without a connection (Ray 2.60).

Remove when it has one.
"""

import os

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the process of the job only, not for ranks


def started_by_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return JOB_VARIABLE in os.environ
