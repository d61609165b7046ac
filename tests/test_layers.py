"""The house: one line of packages, no circle, and what an import may load."""

import ast
import subprocess
import sys
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINE = (
    "config", "statistics", "distributed", "data", "models", "probes", "runs", "tracking", "parallel", "training",
    "analysis", "study", "preflight", "cli",
)  # fmt: skip
"""A package imports from itself, and from what stands to its left."""
OUTSIDE = ("errors", "credentials", "compat")  # a line of their own; anything may import them
DOORS = ("__init__", "__main__", "train")
MODULES = sorted((ROOT / "gengap_dist").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path, root: Path, own: str) -> set[str]:
    """Modules below `root` whose names begin with `own` that a file imports, also inside functions and for types."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = (root / node.module.replace(".", "/")).is_dir()
            files = {f"{node.module}.{alias.name}" for alias in node.names if inside}
            known = {name for name in files if exists(root, name)}
            names |= known | ({node.module} if not inside or files - known else set())
    return {name for name in names if name.startswith(own) and exists(root, name)}


def exists(root: Path, name: str) -> bool:
    path = root / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def package(name: str) -> str:
    return [*name.split("."), "__init__"][1]


PACKAGES = {name: [*paths] for name, paths in groupby(MODULES, lambda path: package(module_name(path)))}
"""Their files: a test for each file would cost more than it looks at."""


@pytest.mark.parametrize("name", sorted({*PACKAGES} - {*DOORS}))
def test_imports_point_left(name):
    line = [*OUTSIDE, *LINE]
    allowed = {"__init__", *line[: line.index(name)]}
    for path in PACKAGES[name]:
        others = {package(other) for other in imported(path, ROOT, "gengap_dist")} - {name}
        assert others <= allowed, path


def test_ranks_know_no_settings():
    """Launchers read those of `launch`; mesh, collectives, timers and what else serves a rank is given numbers."""
    paths = [*(ROOT / "gengap_dist" / "distributed").glob("*.py")]
    assert len(paths) > 5
    assert not set().union(*(imported(path, ROOT, "gengap_dist.config") for path in paths))


def test_every_file_has_its_place():
    assert {*PACKAGES} == {*LINE, *OUTSIDE, *DOORS}
    assert sum(map(len, PACKAGES.values())) == len(MODULES)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := visit(other, [*trail, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in graph)), [])


@pytest.mark.parametrize("own", ["gengap_dist", "benchmarks"])
def test_no_file_imports_itself_by_way_of_others(own):
    root = ROOT if own == "gengap_dist" else ROOT / "benchmarks"
    paths = MODULES if own == "gengap_dist" else BENCHMARKS
    prefix = "gengap_dist" if own == "gengap_dist" else ""
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    graph = {names[path]: imported(path, root, prefix) - {names[path]} for path in paths}
    assert sum(map(len, graph.values())) > 20
    assert not circle(graph)


def test_no_package_within_a_package_imports_back():
    """`probes.spectra` and the other files of `probes`, and so on: files beside a package stand for themselves."""
    graph: dict[str, set[str]] = {}
    folders = {module_name(path) for path in MODULES if path.name == "__init__.py"}

    def room(name: str) -> str:
        inner = [folder for folder in folders if folder.count(".") > 1 and f"{name}.".startswith(f"{folder}.")]
        return max(inner, key=len, default=name)

    for path in MODULES:
        name = room(module_name(path))
        graph.setdefault(name, set()).update(room(other) for other in imported(path, ROOT, "gengap_dist"))
    assert not circle({name: others - {name} for name, others in graph.items()})


def loaded(code: str, suspects: set[str]) -> set[str]:
    code += f"\nimport sys; print(*sorted({suspects} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_the_probes_are_a_library():
    """They load torch and numpy, and neither settings nor services."""
    suspects = {"pydantic", "yaml", "rich", "mlflow", "ray", "scipy", "matplotlib", "torchvision"}
    suspects |= {f"gengap_dist.config.{name}" for name in ("sections", "loading", "identity", "study")}
    assert not loaded("import gengap_dist.probes", suspects)


def test_statistics_are_formulas_on_numbers():
    """They load numpy; scipy, which takes a second, is loaded by the first function that needs it."""
    names = [path.stem for path in MODULES if path.parent.name == "statistics" and path.stem != "__init__"]
    assert len(names) > 5
    code = "\n".join(f"import gengap_dist.statistics.{name}" for name in names)
    assert not loaded(code, {"torch", "pydantic", "yaml", "scipy", "gengap_dist.config"})


def test_reading_and_comparing_runs_loads_no_torch():
    modules = ["config.study", "statistics.correlation", "runs.run_folder", "runs.metrics_table", "analysis.compare"]
    modules += ["analysis.study_data", "analysis.group_runs", "analysis.report.html"]
    code = "\n".join(f"import gengap_dist.{name}" for name in modules)
    assert not loaded(code, {"torch"})
