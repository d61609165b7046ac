"""No module has state, and only compat/ uses private names of other packages (ADR 0101)."""

import ast
import os
from collections import namedtuple

import pytest

from tests.test_layers import MODULES, PACKAGES, module_name, package, tree

COMPAT = [path for path in MODULES if package(module_name(path)) == "compat" and path.name != "__init__.py"]
OURS = {name: [path for path in paths if path not in COMPAT] for name, paths in PACKAGES.items()}
DOCUMENTED = {*dir(namedtuple("Any", "")), *os.__all__}  # names that begin with "_" and are public: _replace, _exit
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}
FILLED_LATER = {"dict", "list", "set", "defaultdict", "Counter", "OrderedDict", "deque", "ContextVar"}
"""Types whose instance at the top of a module can only be there to be filled, unless it is made from something."""


def names_stored(node: ast.AST) -> set[str]:
    """The names of the functions, classes, variables and attributes that a file defines."""
    names: set[str] = set()
    for each in ast.walk(node):
        match each:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "new"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def private_names(node: ast.AST, known: set[str]) -> list[str]:
    """Where a file uses private names that are not `known`: attributes, imports, strings for getattr and its kin."""

    def private(*names: str) -> bool:
        parts = [part for name in names for part in name.split(".")]
        return any(part.startswith("_") and not part.endswith("__") and part not in known for part in parts)

    found: list[ast.AST] = []
    for each in ast.walk(node):
        match each:
            case ast.Attribute(attr=name) if private(name):
                found.append(each)
            case ast.Import(names=names) if private(*(one.name for one in names)):
                found.append(each)
            case ast.ImportFrom(module=str(module), names=names) if private(module, *(one.name for one in names)):
                found.append(each)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(str(name)), *_]):
                found += [each] if private(name) else []
    return [ast.unparse(each) for each in found]


def state(module: ast.Module) -> list[str]:
    """What a file keeps in its module or sets in another: `global`, containers to fill, caches without a key."""
    top = {name for each in module.body if isinstance(each, ast.Assign | ast.AnnAssign) for name in names_stored(each)}
    imports = [each for each in ast.walk(module) if isinstance(each, ast.Import | ast.ImportFrom)]
    foreign = {(one.asname or one.name).partition(".")[0] for each in imports for one in each.names}
    found: list[ast.AST] = []
    for each in module.body:
        match each:
            case ast.Assign(value=value) | ast.AnnAssign(value=value) if _is_filled_later(value):
                found.append(each)
            case ast.Expr(value=ast.Call()):  # a call for its effect
                found.append(each)
    for each in ast.walk(module):
        match each:
            case ast.Global():
                found.append(each)
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in top:
                found.append(each)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=change)) if (
                name in top and change in CHANGES
            ):
                found.append(each)
            case ast.Attribute(value=owner, ctx=ast.Store() | ast.Del()) if ast.unparse(owner).split(".")[0] in foreign:
                found.append(each)
            case ast.FunctionDef(decorator_list=decorators, args=arguments) if not ast.unparse(arguments):
                names = {ast.unparse(one).partition("(")[0].rpartition(".")[2] for one in decorators}
                found += [each] if names & {"cache", "lru_cache"} else []
    return [ast.unparse(each) for each in found]


def _is_filled_later(value: ast.expr | None) -> bool:
    match value:
        case ast.Dict(keys=[]) | ast.List(elts=[]):
            return True
        case ast.Call(func=ast.Name(id=name), args=args) if name in FILLED_LATER:
            return not args or name in ("defaultdict", "ContextVar")
    return False


@pytest.fixture(scope="module")
def known() -> set[str]:
    return DOCUMENTED.union(*(names_stored(tree(path)) for path in MODULES))


@pytest.mark.parametrize("name", OURS)
def test_only_compat_uses_private_names_of_other_packages(name, known):
    assert {path: found for path in OURS[name] if (found := private_names(tree(path), known))} == {}


@pytest.mark.parametrize("name", OURS)
def test_no_module_has_state(name):
    """What a process keeps over several runs is in its RuntimeContext."""
    assert {path: found for path in OURS[name] if (found := state(tree(path)))} == {}


@pytest.mark.parametrize("path", COMPAT, ids=module_name)
def test_a_workaround_says_when_to_remove_it(path):
    assert "\nRemove " in (ast.get_docstring(tree(path)) or "")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\nx = torch.cuda._lazy_init", ["torch.cuda._lazy_init"]),
        ("from torch._subclasses import A", ["from torch._subclasses import A"]),
        ("hasattr(model, '_orig_mod')", ["hasattr(model, '_orig_mod')"]),
        ("class A:\n    def f(self):\n        self._x = 1\n        return self._x, row._replace(a=1)", []),
    ],
)
def test_private_names_are_found(code, found):
    assert private_names(ast.parse(code), DOCUMENTED | names_stored(ast.parse(code))) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("SEEN: dict[int, int] = {}", ["SEEN: dict[int, int] = {}"]),
        ("A = defaultdict(list)", ["A = defaultdict(list)"]),
        ("A = {1: 2}\ndef f():\n    A[3] = 4", ["A[3]"]),
        ("A = [1]\ndef f():\n    A.append(2)", ["A.append(2)"]),
        ("def f():\n    global count\n    count = 1", ["global count"]),
        ("@functools.cache\ndef f():\n    pass", ["@functools.cache\ndef f():\n    pass"]),
        ("import matplotlib\nmatplotlib.use('Agg')", ["matplotlib.use('Agg')"]),
        ("import torch\ntorch.backends.cudnn.benchmark = True", ["torch.backends.cudnn.benchmark"]),
        ("A = {1: 2}\n@cache\ndef f(x):\n    own = {}\n    own[x] = A[1]\n    return own", []),
    ],
)
def test_state_is_found(code, found):
    assert state(ast.parse(code)) == found
