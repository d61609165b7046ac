"""mlflow.json of a run, an arm or a study: what of its folder was sent to MLflow, and where to."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, NonNegativeInt, ValidationError
from pydantic_core import from_json

from gengap_dist.config.regular_file import read_regular
from gengap_dist.errors import UsageError
from gengap_dist.runs.schema import first_error

FILE_NAME = "mlflow.json"


class _State(BaseModel):
    """What is read again; see `tracking.mlflow.mlflow_run`."""

    uri: str
    experiment_id: str
    store: str | None = None
    run_id: str | None = None
    key: str | None = None
    replaces: str | None = None
    closed: str | None = None
    tags: dict[str, str] = {}
    last_step: int = -1
    in_flight: int | None = None
    position: tuple[NonNegativeInt, NonNegativeInt, int] | tuple[()] = ()
    samples: dict[str, tuple[NonNegativeInt, NonNegativeInt]] = {}
    made_of: dict[str, str] = {}
    summed: bool = False
    metrics: dict[str, float] = {}
    sending: Literal["essential", "all"] = "all"
    view: str | None = None
    elsewhere: list["_State"] = []


def read_upload_state(folder: Path) -> dict[str, Any]:
    """The content of mlflow.json; {} if there is none.

    Raises:
        UsageError: if it is damaged.
    """
    path = folder / FILE_NAME
    try:
        state = from_json(read_regular(path))
        _State.model_validate(state)
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        problem = first_error(error)
    except ValueError as error:
        problem = f"it is not JSON ({error})"
    except OSError as error:
        problem = f"{error.strerror}"
    else:
        return state
    raise UsageError(f"{path} is damaged: {problem}; remove it, and everything is sent again as a new MLflow run")
