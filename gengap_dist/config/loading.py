"""Merges defaults, YAML files and the command line into one validated config."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gengap_dist.config import yaml_core
from gengap_dist.errors import UsageError, did_you_mean, shortened

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
    "batch.size": "batch.global_size",
    "batch_size": "batch.global_size",
    "rivals": "probe.diagnostics",
    "data_root": "data.root",
    "image_size": "data.image_size",
    "num_samples": "probe.num_samples",
    "layers": "probe.layers",
    "views": "probe.views",
    "method": "probe.method",
    "memory_mib": "probe.memory_mib",
    "diagnostics": "probe.diagnostics",
    "dtype": "train.dtype",
    "tracking_uri": "mlflow.tracking_uri",
    "learning_rate": "optim.lr",
    "optim.learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "train.num_epochs": "train.epochs",
    "train.max_epochs": "train.epochs",
    "max_steps": "train.steps",
    "train.num_steps": "train.steps",
    "train.max_steps": "train.steps",
}
"""Former names of settings and options, names that others use, and the current names."""


def renamed(name: str) -> str | None:
    """The current name of a setting, given its former name; None if `name` is not a former name.

    >>> renamed("train.budget"), renamed("recipe.sam_rho"), renamed("learning-rate"), renamed("train.epochs")
    ('train.length_unit', 'algorithm.sam_rho', 'optim.lr', None)
    """
    name = name.replace("-", "_")
    section, _, rest = name.partition(".")
    return RENAMED.get(name) or (f"{RENAMED[section]}.{rest}" if rest and section in RENAMED else None)


def nearest_setting(given: str, known: Sequence[str]) -> str:
    """A hint with the setting that `given` may stand for: the only one whose last part is that of `given`, else the
    most similar one; empty if there is none.

    >>> settings = ["optim.lr", "optim.name", "model.name", "batch.global_size"]
    >>> nearest_setting("lr", settings), nearest_setting("train.lr", settings)
    (' (did you mean optim.lr?)', ' (did you mean optim.lr?)')
    >>> nearest_setting("--batch-globl-size", settings), nearest_setting("name", settings)
    (' (did you mean batch.global_size?)', ' (did you mean optim.name?)')
    """
    last = _last_part(given.replace("-", "_"))
    same = [name for name in known if _last_part(name) == last]
    return f" (did you mean {same[0]}?)" if len(same) == 1 else did_you_mean(given, [*known])


def _last_part(name: str) -> str:
    return name.removeprefix("--").rpartition(".")[2]


MAX_NAME_BYTES = 255
"""Longest name of a file, on every common file system."""


def user_path(text: str | Path) -> Path:
    """A path that a user has given; `~` at its start is a home folder, also where no shell has replaced it.

    Raises:
        UsageError: if it is empty or too long, no home folder is known, or it is not UTF-8: run.json and MLflow hold
            text.

    >>> user_path("a/~b"), user_path("~") == Path.home()
    (PosixPath('a/~b'), True)
    """
    if not str(text) or "\0" in str(text):
        raise UsageError(f"the path ({text}) is {'no path' if str(text) else 'empty'}: give a file or folder")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"the path {text} begins with ~, and no such home folder is known: write it in full") from None
    if any(len(part.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES for part in path.parts):
        raise UsageError(f"the path {as_text(str(path))} has a name of more than {MAX_NAME_BYTES} bytes: shorten it")
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

    Raises:
        UsageError: if a setting has a value, and settings in it.
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
        if head in out and not (isinstance(out[head], Mapping) and isinstance(value, Mapping)):
            raise UsageError(f"{within}{head} is given as a value, and with settings in it: remove one")
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
    """A nested config as a flat mapping from dotted names to JSON values; an empty mapping has none.

    >>> flat({"optim": {"lr": 0.1}, "seed": 0, "model": {"options": {}}})
    {'optim.lr': 0.1, 'seed': 0}
    """
    tree = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
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


MAX_FILES = 100
"""Most files that a file may extend, each counted as often as it is extended."""


def yaml_files(path: Path) -> list[Path]:
    """A YAML file that `load_yaml` can read, and all files that it extends."""
    files: list[Path] = []
    _load(_resolved(path), files, of_run=False)
    return files


def load_yaml(path: Path, *, of_run: bool = False) -> dict[str, Any]:
    """A YAML file as nested settings, merged over the files in its `extends` (paths relative to the file).

    They must lie in the folder of the file, or below it; those of a user's own file also in the current folder. A
    config from elsewhere could otherwise bring any file of the user into a run, and so to where its settings are sent.

    Args:
        path: the file.
        of_run: whether it is in the folder of a run.

    Raises:
        UsageError: if a file is missing, is not YAML, gives a key twice, is not a mapping, extends itself, or one that
            lies elsewhere.
    """
    return _load(_resolved(path), [], of_run=of_run)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise UsageError(f"--config ({path}) is a link to itself: give the path of a YAML file") from None


def _load(path: Path, files: list[Path], *, of_run: bool, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a file; appends it, and those that it extends, to `files`."""
    if path in chain:
        raise UsageError(f"--config: {path} extends itself through {chain[-1]}: remove one `extends`")
    files.append(path)
    if len(files) > MAX_FILES:
        raise UsageError(f"--config ({files[0]}) extends more than {MAX_FILES} files: put them together")
    try:
        with path.open("rb") as file:
            text = file.read(yaml_core.MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--config ({path}) cannot be read: {error.strerror}; give the path of a YAML file") from None
    if len(text) > yaml_core.MAX_BYTES:
        raise UsageError(f"--config ({path}) is larger than {yaml_core.MAX_BYTES:,} bytes: settings are shorter")
    try:
        tree = yaml_core.read(text) or {}
    except yaml_core.YamlError as error:
        raise UsageError(f"--config ({path}) {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config ({path}) is a {type(tree).__name__}, needs settings such as `batch: ...`")
    extends = tree.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UsageError(f"--config ({path}): extends ({extends}) is neither a file nor a list of files: name files")
    inherited: dict[str, Any] = {}
    places = [files[0].parent] if of_run else [files[0].parent, Path.cwd()]
    for name in parents:
        parent = _resolved(path.parent / user_path(name))
        if not any(parent.is_relative_to(place) for place in places):
            raise UsageError(
                f"--config ({path}) extends {parent}, which lies outside of {' and '.join(map(str, places))}: give it "
                "before this file, with a --config of its own"
            )
        inherited = merge(inherited, _load(parent, files, of_run=of_run, chain=(*chain, path)))
    return merge(inherited, nested(tree))


def validate(model: type[C], tree: Mapping[str, Any]) -> C:
    """Nested settings as a validated config.

    Raises:
        UsageError: one sentence about the first error, with the most similar known name for an unknown key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_sentence(model, error)) from None


NAMED = ("data.name", "model.name", "optim.name", "task.name")
"""Settings that a user may mean who gives a section one word."""

UNION_MEMBER = re.compile(r"(bool|int|float|str|list|dict|tuple|literal|constrained|function)\b.*")
"""What pydantic adds to the name of a setting that may be of several types."""


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    first, *others = error.errors()
    name = _name(first["loc"])
    more = {_name(other["loc"]) for other in others} - {name}
    shown, value = shortened(name, 100), shortened(_as_yaml(first["input"]), 60)
    rest = f" ({len(more)} more to fix)" if more else ""
    match first["type"]:
        case "extra_forbidden":
            inside = next(iter(first["input"]), None) if isinstance(first["input"], Mapping) else None
            old = f"{name}.{inside}" if inside and renamed(name) else name  # for a section: its first setting
            if new := renamed(old):
                return f"{old} is called {new} now: use that name{rest}"
            if name == "study":
                return (
                    "study is a section of studies, and this command takes one run: start it with gengap study, or "
                    f"leave the section out{rest}"
                )
            return f"{shown} is not a setting{nearest_setting(name, [*field_names(model)])}: see --help for all{rest}"
        case "value_error":  # messages of this package's validators are whole sentences
            return str(first["ctx"]["error"]) + rest if "ctx" in first else first["msg"]
        case "missing" if name == "study":
            return (
                f"study is not set, and a study needs its arms: add the section, or use gengap train for one run{rest}"
            )
        case "missing":
            return f"{shown} is not set and has no default: add it to the config{rest}"
        case "model_type" | "dict_type":
            what = "has nothing under it" if first["input"] is None else f"({value}) is one value"
            if isinstance(first["input"], str) and f"{name}.name" in NAMED:
                return f"{shown} {what}: write {name}: {{name: {value}}}{rest}"
            return f"{shown} {what}: write `name: value` for its settings, or leave it out{rest}"
    same = [first, *(other for other in others if _name(other["loc"]) == name)]  # one of each type that it may have
    rule = " or ".join(dict.fromkeys(_rule(each["type"], each["msg"], value) for each in same))
    near = " (did you mean null?)" if first["input"] == "None" else ""
    if first["type"] == "literal_error":
        near = did_you_mean(str(first["input"]), re.findall(r"'(\w+)'", first["msg"]))
    return f"{shown} ({value}) is not valid{near}: {rule}{rest}"


def _rule(kind: str, message: str, value: str) -> str:
    """What pydantic says about a value, in terms of YAML.

    >>> _rule("tuple_type", "Input should be a valid tuple", "128"), _rule("int_type", "Input should be a number", "x")
    ('input should be a list: write [128]', 'input should be a number')
    """
    match kind:
        case "bool_type":
            return "input should be true or false"
        case "tuple_type" | "list_type":
            return f"input should be a list: write [{value}]"
    return message[0].lower() + message[1:]


def _name(place: tuple[int | str, ...]) -> str:
    """A place in an error of pydantic as the name of a setting."""
    *path, last = [part for part in place if not UNION_MEMBER.fullmatch(str(part))] or [""]
    return ".".join(map(str, path if isinstance(last, int) else [*path, last]))  # name the list, not its element


def _as_yaml(value: Any) -> str:
    """A value as a user may have written it.

    >>> [_as_yaml(value) for value in (None, True, [1, None], "None", 0.5)]
    ['null', 'true', '[1, None]', 'None', '0.5']
    """
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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
    return yaml_core.write(config.model_dump(mode="json"))
