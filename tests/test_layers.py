"""The direction of imports: a module imports from lower floors, or from its own room."""

import ast

import pytest

from tests.conftest import ROOT

FLOORS = {  # the longest matching name decides; higher may import lower
    "gengap_dist": -1,  # __init__: imports nothing
    "gengap_dist.config.sections": 0,
    "gengap_dist.compat.fast_imports": 0,
    "gengap_dist.allocator": 0,
    "gengap_dist.compat.float32_precision": 0,
    "gengap_dist.distributed.batch_plan": 0,
    "gengap_dist.distributed.phase_timer": 0,
    "gengap_dist.distributed.preemption": 0,
    "gengap_dist.distributed.process_group": 0.5,  # raises config's errors
    "gengap_dist.distributed.stall_detector": 1,
    "gengap_dist.parallel.out_of_memory": 1,
    "gengap_dist.data": 1,
    "gengap_dist.models": 1.1,  # dropout draws as augmentation does
    "gengap_dist.optim": 1.5,  # a schedule counts the steps of an order
    "gengap_dist.probes": 2,
    "gengap_dist.parallel.strategies": 2,
    "gengap_dist.tracking": 2.5,  # records what probes found
    "gengap_dist.training.export": 3.25,  # builds the network of a checkpoint
    "gengap_dist.tracking.mlflow.uploader": 3.5,
    "gengap_dist.tracking.mlflow.process": 3.75,
    "gengap_dist.tracking.mlflow.importer": 3.75,
    "gengap_dist.training.step": 3,
    "gengap_dist.runs.checkpoint": 3,
    "gengap_dist.training.checks": 3,
    "gengap_dist.training.algorithms": 3.25,
    "gengap_dist.profiling": 3,
    "gengap_dist.training.observer": 3.5,
    "gengap_dist.training.trainer": 4,
    "gengap_dist.distributed.launchers": 5,
    "gengap_dist.analysis.results": 0,
    "gengap_dist.analysis.results.arms": 0.25,  # knows which settings are machinery
    "gengap_dist.study": 5,
    "gengap_dist.study.ray_runner": 5.25,  # starts launchers' ranks
    "gengap_dist.study.runner": 5.5,
    "gengap_dist.report": 5.25,
    "gengap_dist.planning": 5.1,  # starts ranks, to measure them
    "gengap_dist.preflight.machine_constants": 3,
    "gengap_dist.training.autotune.available_memory": 3,
    "gengap_dist.parallel.memory_model": 3,
    "gengap_dist.training.autotune.synthetic_workload": 3.25,  # passes of the loop
    "gengap_dist.training.autotune.search": 3.5,
    "gengap_dist.training.autotune.memory_format": 3.8,
    "gengap_dist.training.autotune.micro_batch": 3.75,  # a run settles it before its first step
    "gengap_dist.cli.options": 5.5,
    "gengap_dist.preflight.doctor_subprocess": 5.25,  # runs launchers' ranks
    "gengap_dist.preflight.doctor_checks": 5.5,
    "gengap_dist.train": 6,
    "gengap_dist.compare": 6,
    "gengap_dist.doctor": 6,
    "gengap_dist.probe": 6,
    "gengap_dist.plan": 6,
    "gengap_dist.cli.study": 6,
    "gengap_dist.cli.report": 6,
    "gengap_dist.__main__": 7,
}
MODULES = sorted((ROOT / "gengap_dist").rglob("*.py"))


def floor(name: str) -> float:
    return FLOORS[max((known for known in FLOORS if name == known or name.startswith(known + ".")), key=len)]


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def module_name(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = (ROOT / node.module.replace(".", "/")).is_dir()
            names |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
    return {name for name in names if name.split(".")[0] == "gengap_dist"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for other in imported(path):
        assert floor(other) < floor(name) or (floor(other) == floor(name) and room(other) == room(name)), (
            f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        )


def test_every_module_has_a_floor():
    assert {room(module_name(path)) for path in MODULES} <= set(FLOORS)
