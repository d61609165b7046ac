"""Merges defaults, YAML files and the command line into one validated config."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gengap_dist.errors import UsageError, did_you_mean

C = TypeVar("C", bound=BaseModel)


RENAMED = {
    "recipe": "algorithm",
    "recipe.local": "algorithm.local_sgd",
    "recipe.average": "algorithm.weight_averaging",
    "train.budget": "train.length_unit",
    "train.recompute": "train.activation_checkpointing",
    "probe.budget": "probe.max_time_fraction",
    "probe.rivals": "probe.diagnostics",
    "launch.backend": "launch.launcher",
    "launch.hang_seconds": "launch.stall_report_seconds",
    "mlflow.wait_seconds": "mlflow.flush_timeout_seconds",
    "study.budgets": "study.length_units",
    "rivals": "diagnostics",
}
"""Former names of settings and options, and their current names."""


def renamed(name: str) -> str | None:
    """The current name of a setting, given its former name; None if `name` is not a former name.

    >>> renamed("train.budget"), renamed("recipe.sam_rho"), renamed("train.epochs")
    ('train.length_unit', 'algorithm.sam_rho', None)
    """
    section, _, rest = name.partition(".")
    return RENAMED.get(name) or (f"{RENAMED[section]}.{rest}" if rest and section in RENAMED else None)


def user_path(text: str | Path) -> Path:
    """A path that a user has given; `~` at its start is a home folder, also where no shell has replaced it.

    Raises:
        UsageError: if no home folder is known, or the path is not UTF-8: run.json and MLflow hold text.

    >>> user_path("a/~b"), user_path("~") == Path.home()
    (PosixPath('a/~b'), True)
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"the path {text} begins with ~, and no such home folder is known: write it in full") from None
    if (shown := as_text(str(path))) != str(path):
        raise UsageError(f"the path {shown} is not UTF-8, and cannot be recorded: rename the file or folder")
    return path


def as_text(name: str) -> str:
    r"""A file name as text that can be printed and recorded: bytes that are no UTF-8 become \xNN.

    >>> as_text("cat"), as_text("caf\udce9")
    ('cat', 'caf\\xe9')
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


UNNESTED_MAPPINGS = ("study.axes.", "study.tune.space.")
"""Mappings of a config whose keys are not nested: they are names of settings, or names that the user chooses."""


def nested(flat: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """A mapping with dotted keys as nested mappings; keys inside the mappings of `UNNESTED_MAPPINGS` do not change.

    >>> nested({"batch.global_size": 8, "optim": {"lr": 0.1}, "study.axes": {"optim.lr": [1, 2]}})
    {'batch': {'global_size': 8}, 'optim': {'lr': 0.1}, 'study': {'axes': {'optim.lr': [1, 2]}}}
    """
    if within in UNNESTED_MAPPINGS:
        return dict(flat)
    out: dict[str, Any] = {}
    for key, value in flat.items():
        head, _, tail = key.partition(".")
        if tail:
            value = nested({tail: value}, f"{within}{head}.")
        elif isinstance(value, Mapping):
            value = nested(value, f"{within}{head}.")
        out = merge(out, {head: value})
    return out


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings merged into one; values of `high` override values of `low`.

    >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
    {'a': {'x': 1, 'y': 3}}
    """
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def flat(config: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as a flat mapping from dotted names to JSON values.

    >>> flat({"optim": {"lr": 0.1}, "seed": 0})
    {'optim.lr': 0.1, 'seed': 0}
    """
    tree = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a config class, including its sections."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from field_names(info.annotation, f"{prefix}{name}.")


def yaml_files(path: Path) -> list[Path]:
    """A YAML file that `load_yaml` can read, and all files that it extends."""
    path = path.resolve()
    extended = _parents(path, (yaml.safe_load(path.read_bytes()) or {}).get("extends", []))
    return [path, *(file for parent in extended for file in yaml_files(parent))]


def _parents(path: Path, extends: object) -> list[Path]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"--config ({path}): extends ({extends!r:.60}) must be the path of a file, or a list of paths")
    return [(path.parent / user_path(name)).resolve() for name in names]


def load_yaml(path: Path, *, of_run: bool = False, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as nested settings, merged over the files in its `extends` (paths relative to the file).

    They must lie in the folder of the file, or below it; those of a user's own file also in the current folder. A
    config from elsewhere could otherwise bring any file of the user into a run, and so to where its settings are sent.

    Args:
        path: the file.
        of_run: whether it is in the folder of a run.

    Raises:
        UsageError: if a file is missing, is not YAML, is not a mapping, extends itself, or one that lies elsewhere.
    """
    path = path.resolve()
    if path in _chain:
        raise UsageError(f"--config: {path} extends itself through {_chain[-1]}: remove one `extends`")
    try:
        tree = yaml.safe_load(path.read_bytes()) or {}  # yaml decodes it as UTF-8 in every locale
    except OSError as error:
        raise UsageError(f"--config ({path}) cannot be read: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not text"
        raise UsageError(f"--config ({path}) is not YAML{position}: {problem}; fix that line") from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config ({path}) is a {type(tree).__name__}, needs settings such as `batch: ...`")
    inherited: dict[str, Any] = {}
    first = (*_chain, path)[0]
    places = [first.parent] if of_run else [first.parent, Path.cwd()]
    for parent in _parents(path, tree.pop("extends", [])):
        if not any(parent.is_relative_to(place) for place in places):
            raise UsageError(
                f"--config ({path}) extends {parent}, which lies outside of {' and '.join(map(str, places))}: give it "
                "before this file, with a --config of its own"
            )
        inherited = merge(inherited, load_yaml(parent, of_run=of_run, _chain=(*_chain, path)))
    return merge(inherited, nested({str(key): value for key, value in tree.items()}))


def validate(model: type[C], tree: Mapping[str, Any]) -> C:
    """Nested settings as a validated config.

    Raises:
        UsageError: one sentence about the first error, with the most similar known name for an unknown key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_sentence(model, error)) from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    first, *more = error.errors()
    *path, last = first["loc"] or ("",)
    name = ".".join(map(str, path if isinstance(last, int) else [*path, last]))  # name the list, not its element
    rest = f" ({len(more)} more to fix)" if more else ""
    match first["type"]:
        case "extra_forbidden":
            inside = next(iter(first["input"]), None) if isinstance(first["input"], Mapping) else None
            old = f"{name}.{inside}" if inside and renamed(name) else name  # for a section: its first setting
            if new := renamed(old):
                return f"{old} is called {new} now: use that name{rest}"
            return (
                f"{name} is not a setting{did_you_mean(name, [*field_names(model)])}: see --help for all of them{rest}"
            )
        case "value_error":  # messages of this package's validators are whole sentences
            return str(first["ctx"]["error"]) + rest if "ctx" in first else first["msg"]
        case "missing":
            return f"{name} is not set and has no default: add it to the config{rest}"
    rule = first["msg"][0].lower() + first["msg"][1:]
    near = ""
    if first["type"] == "literal_error":
        near = did_you_mean(str(first["input"]), re.findall(r"'(\w+)'", first["msg"]))
    return f"{name} ({first['input']}) is not valid{near}: {rule}{rest}"


def resolve(model: type[C], files: list[Path], overrides: Mapping[str, Any]) -> C:
    """Defaults, then YAML files in order, then overrides, merged into one validated config.

    Raises:
        UsageError: see `load_yaml` and `validate`.
    """
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, load_yaml(file))
    return validate(model, merge(tree, overrides))


def to_yaml(config: BaseModel) -> str:
    """The config as YAML text that `--config` can read."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
