"""Reads and writes YAML with the core schema of YAML 1.2: numbers, true, false and null are what JSON users expect.

PyYAML knows YAML 1.1, where `yes` is true, `1:00` is 60 and `0100` is 64, and of a key that is given twice it drops the
first. Its parser is used, and values are made of its events here. Values of the command line are read in the same way.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from math import isfinite
from typing import Any

import yaml

MAX_BYTES = 1 << 20
"""Largest file of settings."""
MAX_DEPTH = 32
MAX_VALUES = 100_000
"""Most values of a file, each alias (`*name`) counted as what it stands for."""
LARGEST = 2**63 - 1
"""Largest integer of a setting: what torch and numpy can hold."""

NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class YamlError(Exception):
    """A text is not YAML, or not such as settings need: what is wrong and what to do, to be read after its name."""


def scalar(text: str) -> Any:
    """A value that is not in quotes, by the core schema.

    Raises:
        YamlError: if it is a number that no setting can have.

    >>> [scalar(text) for text in ("0100", "1e-2", "0x10", "true", "~", "yes", "1:00", "2026-13-45")]
    [100, 0.01, 16, True, None, 'yes', '1:00', '2026-13-45']
    """
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text, base) if len(text) <= 64 else LARGEST + 1
        if abs(number) > LARGEST:
            raise YamlError("is too large a number: choose one of at most 18 digits")
        return number
    if not FLOAT.fullmatch(text) and not NOT_FINITE.fullmatch(text):
        return text
    if NOT_FINITE.fullmatch(text) or not isfinite(number := float(text)):
        raise YamlError("is not a finite number: choose one")
    return number


def check_text(text: str) -> str:
    """The text itself.

    Raises:
        YamlError: if it cannot be stored: it has a NUL, or is not Unicode.
    """
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlError("holds a NUL or half a character, and cannot be stored: remove it")
    return text


def read(text: bytes | str) -> Any:
    r"""A YAML document: dicts with text as keys, lists and values; None if it is empty.

    Raises:
        YamlError: if it is not YAML, gives a key twice, has a tag, or is too large or too deep.

    >>> read("{a: yes, b: [1, 1.0], 1: ~}")
    {'a': 'yes', 'b': [1, 1.0], '1': None}
    >>> read("a: 1\nb: 2\na: 3")
    Traceback (most recent call last):
    gengap_dist.config.yaml_core.YamlError: gives a twice, in lines 1 and 3: remove one
    """
    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.MarkedYAMLError as error:
        mark, begin = error.problem_mark, error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        before = mark and begin and begin.line < mark.line and "flow" in (error.context or "")
        opened = f" (or a bracket opened in line {begin.line + 1})" if begin and before else ""
        raise YamlError(f"is not YAML{line}: {error.problem}; fix that line{opened}") from None
    except (yaml.YAMLError, ValueError, OverflowError):  # also of "\UFFFFFFFF", and of a version of 5,000 digits
        raise YamlError("is not YAML: it is not text; save it as UTF-8") from None


class _Reader:
    """Makes a value of a parser's events. Keys with dots count as nested: `a.b` and `a: {b: ...}` are the same key."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._num_values = 0
        self._lines: dict[tuple[str, ...], int] = {}

    def document(self) -> Any:
        """The only document."""
        value = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self._lines or value is not None:
                    raise YamlError(f"has a second document in line {_line(event)}: remove it")
                value = self._value(next(self._events), ())
        return value

    def _value(self, event: yaml.Event, path: tuple[str, ...]) -> Any:
        before = self._num_values
        self._count(1)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise YamlError(f"has *{event.anchor} in line {_line(event)}, which stands for nothing complete")
            value, num_values = self._anchors[event.anchor]
            self._count(num_values)
            return deepcopy(value)
        if len(path) > MAX_DEPTH:
            raise YamlError(f"is nested more than {MAX_DEPTH} deep in line {_line(event)}: settings are not")
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            raise YamlError(f"has the tag {event.tag} in line {_line(event)}: remove it")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._mapping(path)
        else:
            value = self._sequence(path)
        if event.anchor:
            self._anchors[event.anchor] = value, self._num_values - before
        return value

    def _count(self, num_values: int) -> None:
        self._num_values += num_values
        if self._num_values > MAX_VALUES:
            raise YamlError(f"has more than {MAX_VALUES:,} values, with its aliases: make it smaller")

    def _scalar(self, event: yaml.ScalarEvent, path: tuple[str, ...], *, is_key: bool = False) -> Any:
        try:
            text = check_text(event.value)
            return text if is_key or not event.implicit[0] else scalar(text)
        except YamlError as error:
            name = ".".join(path) or "the value"
            raise YamlError(f"is not valid in line {_line(event)}: {name} ({event.value}) {error}") from None

    def _sequence(self, path: tuple[str, ...]) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, str(len(values)))))
        return values

    def _mapping(self, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError(f"has a key in line {_line(event)} that is not text: write a name")
            name = self._scalar(event, path, is_key=True)
            if name == "<<" and event.implicit[0]:
                raise YamlError(f"has << in line {_line(event)}, which YAML 1.2 has not: write `extends: FILE`")
            key = (*path, *name.split("."))
            if key in self._lines:
                lines = f"in lines {self._lines[key]} and {_line(event)}"
                raise YamlError(f"gives {'.'.join(key)} twice, {lines}: remove one")
            self._lines[key] = _line(event)
            values[name] = self._value(next(self._events), key)
        return values


def _line(event: yaml.Event) -> int:
    assert event.start_mark
    return event.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes that would be read as another value, here or by a reader of YAML 1.1."""


for pattern, tag in ((NULL, "null"), (BOOL, "bool"), (INT, "int"), (FLOAT, "float"), (NOT_FINITE, "float")):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern.pattern})$"), None)


def write(value: Any) -> str:
    """YAML text that `read` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)
