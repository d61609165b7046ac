"""Credentials: what is printed or recorded is free of them, whoever has written it."""

import os
import re
import sys
from typing import NamedTuple
from urllib.parse import unquote

from gengap_dist.errors import UsageError, visible

MIN_CHARACTERS = 6  # of a secret in the environment: a shorter one may be part of any word
_IN_WEB_ADDRESS = re.compile(r"(?i)\b(https?://)([^\s/?#\"<>]*)@")
_IN_OTHER_ADDRESS = re.compile(r"(://[^\s/?#\"<>:@]*):[^\s/?#\"<>]*@")
_PASSWORD = r"(://[^\s/?#\"<>:@\[]*):(?!\d*[/?#])"  # its beginning, which is no port
_NOT_ENCODED = re.compile(_PASSWORD + r"[^\s\"<>]{0,200}@")
_NOT_ENCODED_ADDRESS = re.compile(r"[a-z][\w+.-]*" + _PASSWORD + r"[^@/?#\s\"<>]*[/?#\s\"<>].*@", re.I | re.S)
_HEADER = re.compile(r"(?i)(\bauthorization\W+(?:basic|bearer) +)[\w.~+/=-]+")
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|_KEY|_KEY_ID|CONNECTION_STRING)$")


class Login(NamedTuple):
    """What an address of a web server says about who logs in; empty strings if it says nothing."""

    user: str
    password: str


def login_of(address: str) -> Login:
    """The login in the address of a web server.

    >>> login_of("http://me:p%40ss@host:5000"), login_of("http://host"), login_of("postgresql://me:pass@host/db")
    (Login(user='me', password='p@ss'), Login(user='', password=''), Login(user='', password=''))
    """
    found = _IN_WEB_ADDRESS.match(address)
    user, _, password = (found[2] if found else "").partition(":")
    return Login(unquote(user), unquote(password))


def without_logins(text: str) -> str:
    """A text in which no address has a password; that of a web server has no user either, which may be a token.

    >>> without_logins("http://me:secret@host:5000/a/b, postgresql+psycopg://me:s@cret@host/db or sqlite:////a@b.db")
    'http://host:5000/a/b, postgresql+psycopg://me@host/db or sqlite:////a@b.db'
    """
    return _IN_OTHER_ADDRESS.sub(r"\1@", _IN_WEB_ADDRESS.sub(r"\1", _NOT_ENCODED.sub(r"\1@", text)))


def check_address(address: str) -> str:
    """The address itself.

    Raises:
        UsageError: if it seems to have a password with characters that end it: where it ends, nobody can tell.
    """
    if _NOT_ENCODED_ADDRESS.match(address):
        raise UsageError(
            'the address of the MLflow store has a password (not shown here) with a space or one of / ? # " < >: '
            "percent-encode it, / as %2F, or give it as MLFLOW_TRACKING_PASSWORD"
        )
    return address


def redacted(text: str) -> str:
    """A message without logins in addresses, Authorization headers, and secrets of the environment.

    >>> redacted("http://me:secret@host: 'Authorization: Basic bWU6c2VjcmV0'")
    "http://host: 'Authorization: Basic ***'"
    """
    text = _HEADER.sub(r"\1***", without_logins(text))
    for name, value in os.environ.items():
        if len(value) >= MIN_CHARACTERS and is_secret(name):
            text = text.replace(value, "***")
    return text


def printable(text: str) -> str:
    """A message as it is printed: without secrets, and without control characters, which act on terminals."""
    return visible(redacted(text))


def is_secret(variable: str) -> bool:
    """Whether the value of an environment variable is a secret, to judge by its name.

    >>> [is_secret(name) for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN_PATH")]
    [True, True, False]
    """
    return bool(_SECRET_NAME.search(variable))


def command_line() -> list[str]:
    """The command that started this process, as it may be recorded."""
    return [without_logins(word) for word in sys.orig_argv]
