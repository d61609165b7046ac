"""Connects to an MLflow store: a server, or a sqlite file that is created if it does not exist."""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.config.sections import MlflowConfig
from gengap_dist.credentials import check_address, login_of, printable, without_logins
from gengap_dist.errors import UsageError

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # the UI shows runs and charts first, not prompts
CLIENT_DEFAULTS = {  # a dead server must be detected in seconds; with MLflow's defaults it takes minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the name of each run, and whoever logs in
}
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
MAX_ERROR = 2000  # characters
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OTHER_SCHEMES = ("", "file", "databricks", "databricks-uc", "uc")
HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/|$)")  # without a scheme, or what looks like one before the port
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def store_uri(configured: str | None) -> str:
    """The MLflow store to use: the configured one, MLFLOW_TRACKING_URI, or a file in the current folder.

    What is configured may have been recorded, without credentials: the variable's are used for the same store.

    Raises:
        UsageError: see `check_address`.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if configured and given and without_logins(given).rstrip("/") == configured.rstrip("/"):
        return given
    return check_address(configured or given or sqlite_uri(Path.cwd() / "mlflow.db"))


def usable_store_uri(configured: str | None) -> str:
    """`store_uri`, if MLflow has a store of this kind; whether it answers is not asked.

    Raises:
        UsageError: names mlflow.tracking_uri or MLFLOW_TRACKING_URI; see also `check_address`.
    """
    uri = store_uri(configured)
    shown = f"{'mlflow.tracking_uri' if configured else 'MLFLOW_TRACKING_URI'} ({without_logins(uri)})"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{shown} is not an address ({error}): correct it") from None
    is_web = parts.scheme in ("http", "https")
    if HOST_AND_PORT.match(uri) or (is_web and not parts.hostname):
        raise UsageError(f"{shown} is not the address of a server: write http://HOST:PORT or https://HOST")
    is_known = is_web or parts.scheme in OTHER_SCHEMES or parts.scheme.partition("+")[0] in DATABASES
    if not is_known and not entry_points(group="mlflow.tracking_store", name=parts.scheme):  # a plug-in's
        raise UsageError(
            f"{shown} is of no kind that MLflow knows ({parts.scheme}): give http://HOST:PORT, https://HOST, "
            "sqlite:///FILE or the address of a database, or install the plug-in of MLflow that has it"
        )
    return uri


def check_store(config: MlflowConfig) -> None:
    """Refuse a store to which nothing could be sent, before anything is written.

    Raises:
        UsageError: see `usable_store_uri`.
    """
    if config.enabled:
        usable_store_uri(config.tracking_uri)


def sqlite_uri(path: Path) -> str:
    """The URI of a store in a file; `sqlite_path` is its inverse.

    >>> sqlite_uri(Path("/a b/50%?/mlflow.db"))
    'sqlite:////a b/50%25%3F/mlflow.db'
    """
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """The file of a store, as SQLAlchemy finds it; None for a server.

    >>> sqlite_path("sqlite:////a b/50%25%3F/mlflow.db?timeout=5"), sqlite_path("http://host")
    (PosixPath('/a b/50%?/mlflow.db'), None)
    """
    name, _, _ = uri.removeprefix("sqlite:///").partition("?")
    return Path(unquote(name)) if uri.startswith("sqlite:///") else None


def store_key(uri: str) -> str:
    """The same text for the same store, however its URI is spelled and whoever logs in: host, port and path.

    >>> store_key("http://me:password@LOCALHOST:5000/"), store_key("http://[::1]:5000"), store_key("https://a.org/ml/")
    ('localhost:5000', 'localhost:5000', 'a.org:443/ml')
    """
    if path := sqlite_path(uri):
        return f"sqlite:{path.resolve()}"
    parts = urlsplit(uri)
    if parts.scheme.startswith("databricks") or uri == "databricks":
        return uri
    if parts.scheme in ("", "file"):
        return f"file:{Path(parts.path).resolve()}"
    host = "localhost" if parts.hostname in THIS_MACHINE else parts.hostname
    port = parts.port or DEFAULT_PORTS.get(parts.scheme.partition("+")[0])
    return f"{host}:{port}{parts.path.rstrip('/')}"


def store_variables(uri: str) -> dict[str, str]:
    """The environment in which a process finds a store: its address is in messages, its user and password are not.

    A database has no other place for them than its address.

    >>> store_variables("http://me:p%40ss@host:5000") == {
    ...     "MLFLOW_TRACKING_URI": "http://host:5000",
    ...     "MLFLOW_TRACKING_USERNAME": "me",
    ...     "MLFLOW_TRACKING_PASSWORD": "p@ss",
    ... }
    True
    >>> store_variables("sqlite:////mlflow.db")
    {'MLFLOW_TRACKING_URI': 'sqlite:////mlflow.db'}
    """
    login = login_of(uri)
    if not login.user or not login.password:
        return {"MLFLOW_TRACKING_URI": uri}
    return {
        "MLFLOW_TRACKING_URI": without_logins(uri),
        "MLFLOW_TRACKING_USERNAME": login.user,
        "MLFLOW_TRACKING_PASSWORD": login.password,
    }


def is_refusal(error: Exception) -> bool:
    """Whether the store has refused what was sent: it would refuse the same again, and may take other values.

    BAD_REQUEST is what MLflow makes of errors of its database, such as one that is read-only for a while.
    """
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code == "BAD_REQUEST":
        return False
    return error.get_http_status_code() in (400, 404)


def is_outage(error: Exception) -> bool:
    """Whether the store takes nothing at all at present."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return isinstance(error, MlflowException | RequestException | ConnectionError | TimeoutError) and not is_refusal(
        error
    )


def import_client() -> Callable[..., Any]:
    """Import MLflow, which takes seconds; returns its client class."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    with fast_imports():
        from mlflow import MlflowClient

        from gengap_dist.compat.artifact_places import refuse_local_places
        from gengap_dist.compat.bounded_answers import bound_answers
    bound_answers()
    refuse_local_places(THIS_MACHINE)
    return MlflowClient


def connect_client(uri: str) -> Any:
    """An MLflow client that gives up on a dead server within seconds."""
    client, variables = import_client(), store_variables(uri)
    address = variables.pop("MLFLOW_TRACKING_URI")
    os.environ.update(variables)
    with fast_imports():  # it imports the store's dependencies, and creates a file store
        return client(tracking_uri=address)


def describe(error: Exception) -> str:
    """An error on one line, without credentials; a server may have written it, and at any length."""
    return printable(" ".join(str(error).split()))[:MAX_ERROR]


def connect_experiment(uri: str, name: str) -> tuple[Any, str]:
    """A client, and the id of an experiment, which is created if it does not exist.

    Raises:
        Exception: any error of the MLflow client.
    """
    with _exclusive_lock(uri):
        client = connect_client(uri)
        if existing := client.get_experiment_by_name(name):
            return client, existing.experiment_id
        return client, client.create_experiment(name, _artifact_location(uri), EXPERIMENT_TAGS)


def _artifact_location(uri: str) -> str | None:
    """A folder beside a sqlite store, independent of the current folder; None: a server decides."""
    path = sqlite_path(uri)
    return path.resolve().with_name("mlartifacts").as_uri() if path else None


@contextlib.contextmanager
def _exclusive_lock(uri: str) -> Iterator[None]:
    """Context in which only one process initializes a sqlite store: several at once would break it."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
