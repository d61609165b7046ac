"""What of MLflow and Ray other machines can reach on this one, and which asks nobody for a password or a token."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

HOST_REFUSED = b"Invalid Host header"  # of MLflow, which then has not asked for a password
ANSWER_SECONDS = 3
MAX_BYTES = 1 << 10


class Service(NamedTuple):
    """A program that listens."""

    name: str
    sign: str
    """Part of its command line."""
    path: str
    """Of a page that only those may see who give a password or token; empty: it has no pages."""
    remedy: str


LOOPBACK_OR_TOKEN = "ray start on 127.0.0.1, or with RAY_AUTH_MODE=token"
SERVICES = (
    Service(
        "MLflow",
        "mlflow",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "mlflow server --host 127.0.0.1, or --app-name basic-auth",
    ),
    Service("Ray's dashboard", "dashboard/dashboard.py", "/api/version", LOOPBACK_OR_TOKEN),
    Service("Ray's GCS", "gcs_server", "", LOOPBACK_OR_TOKEN),
    Service("Ray's client server", "ray.util.client.server", "", LOOPBACK_OR_TOKEN),
)


class Listener(NamedTuple):
    """A service, and where it listens."""

    service: Service
    address: str


def open_listeners() -> list[Listener]:
    """The services that listen beyond loopback without authentication; only of processes that this user may see."""
    import psutil

    found: dict[str, Listener] = {}
    for host, port, pid in _listening():
        try:
            process = psutil.Process(pid)
            command, variables = " ".join(process.cmdline()), process.environ()
        except psutil.Error:
            continue
        service = next((service for service in SERVICES if service.sign in command), None)
        if service and not (_asks(host, port, service.path) if service.path else _has_token(variables)):
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            found[address] = Listener(service, address)
    return [found[address] for address in sorted(found)]


def _listening() -> Iterator[tuple[str, int, int]]:
    """Host, port and process of all that other machines can reach."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:  # some systems show them to the administrator only
        return
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.pid:
            host, port = connection.laddr.ip, connection.laddr.port
            if not is_loopback(host):
                yield host, port, connection.pid


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "10.0.0.1")]
    [True, True, True, False, False, False]
    """
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _asks(host: str, port: int, path: str) -> bool:
    """Whether a web server asks for a password or token."""
    own = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        urllib.request.urlopen(f"http://{own}:{port}{path}", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        with error:
            return error.code in (401, 403) and HOST_REFUSED not in error.read(MAX_BYTES)
    except OSError:
        return True  # it does not answer
    return False


def _has_token(variables: dict[str, str]) -> bool:
    return variables.get("RAY_AUTH_MODE") == "token" or "RAY_AUTH_TOKEN" in variables
