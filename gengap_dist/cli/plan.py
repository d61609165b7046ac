"""Predict batches, memory, traffic, time and configuration errors of a run on a cluster, before it is started.

Nothing is trained and no data are read. The exit code is 2 if the configuration is refused. Of a study, each arm is
planned, and the schedule of its runs on this machine is predicted from costs that were measured: by an earlier start of
the study, or by --calibrate.

Examples:
  gengap plan --config configs/demo_train.yaml --batch.global_size 1024 --nodes 64 --gpus-per-node 8
  gengap plan --model.name torchvision:resnet50 --data.name cifar10 --batch.global_size 8192 --nodes 16 --json
  gengap plan --config configs/demo_train.yaml --gpus-per-node 2 --calibrate
  gengap plan --config study.yaml --calibrate    when would this study end?
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gengap_dist.cli.exit_codes import OK, USAGE, run_command, warn
from gengap_dist.cli.options import PlanOptions, parse
from gengap_dist.config.loading import to_yaml
from gengap_dist.config.sections import RunConfig
from gengap_dist.config.study import StudyConfig, resolve_run_or_study

PROG = "gengap plan"
_warn = partial(warn, PROG)


def command(argv: Sequence[str]) -> int:
    """Print the plan; returns the exit code."""
    options, overrides = parse(PlanOptions, argv, prog=PROG, description=str(__doc__), settings=StudyConfig)
    config = resolve_run_or_study(list(options.config), overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK
    return _plan_study(config, options) if isinstance(config, StudyConfig) else _plan_run(config, options)


def _plan_run(config: RunConfig, options: PlanOptions) -> int:
    from gengap_dist.preflight.batch_layout import Cluster
    from gengap_dist.preflight.machine_constants import Constants, load, save
    from gengap_dist.preflight.plan import make_plan

    create = options.calibrate and options.constants is not None and not options.constants.exists()
    constants = Constants() if create else load(options.constants)
    cluster = Cluster(options.nodes, options.gpus_per_node)
    plan = make_plan(config, cluster, constants)
    if options.calibrate and plan.memory:
        from gengap_dist.preflight.calibrate import calibrate

        assert plan.data
        assert plan.batch
        constants = calibrate(config, plan.data, plan.batch.micro_sizes[1], constants)
        if problem := save(constants, options.constants):
            _warn(problem)
        plan = make_plan(config, cluster, constants)
    if options.as_json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        from gengap_dist.cli.terminal import print_page
        from gengap_dist.preflight.plan_table import plan_page

        print_page(plan_page(plan, constants))
    return USAGE if plan.refused else OK


def _plan_study(config: StudyConfig, options: PlanOptions) -> int:
    """The arms of a study, each planned by itself, and the schedule of its runs on this machine."""
    import torch

    from gengap_dist.cli.study_page import study_page, study_plan_page
    from gengap_dist.cli.terminal import MEASURING, RunProgress, print_page
    from gengap_dist.preflight.batch_layout import Cluster
    from gengap_dist.preflight.machine_constants import load
    from gengap_dist.preflight.plan import make_plan
    from gengap_dist.study.packing import predict
    from gengap_dist.study.run_matrix import planned_runs, planned_trials
    from gengap_dist.study.tuning import points
    from gengap_dist.training.run_cost import ArmFacts

    constants, cluster = load(options.constants), Cluster(options.nodes, options.gpus_per_node)
    untuned = config.study.model_copy(update={"tune": None})
    runs = planned_runs(config.model_copy(update={"study": untuned}), Path(), {})
    trials = planned_trials(config, Path(), points(config.study.tune)) if config.study.tune else []
    plans = {run.arm: make_plan(run.config, cluster, constants) for run in runs[: len(config.arms)]}
    refused = any(plan.refused for plan in plans.values())
    num_gpus = torch.cuda.device_count() if config.launch.device != "cpu" else 0
    phases = []
    with RunProgress(MEASURING) if options.calibrate else nullcontext() as progress:
        on_measure = (lambda done, total: progress(done, total, "")) if progress else None
        for phase in (trials, runs) if not refused and options.nodes == 1 else ():
            schedule = predict(phase, config.study.num_at_once, num_gpus, on_measure=on_measure, warn=_warn)
            if schedule is None:
                phases = []
                break
            phases.append([(phase[run.number].title, run) for run in schedule])
    if options.as_json:
        print(json.dumps(_study_as_json(plans, phases), indent=1))
    else:
        facts = {
            arm: ArmFacts(plan.num_steps, plan.num_steps / plan.steps_per_epoch, plan.num_parameters)
            for arm, plan in plans.items()
            if plan.num_steps and plan.steps_per_epoch
        }
        print_page([*(study_page(config, facts) if len(facts) == len(plans) else []), *study_plan_page(plans, phases)])
    return USAGE if refused else OK


def _study_as_json(plans: dict[str, Any], phases: list[Any]) -> dict[str, Any]:
    schedule = [
        {
            "run": title,
            "ranks": run.option.layout.ranks,
            "threads": run.option.layout.threads,
            "start": round(run.start, 1),
            "end": round(run.end, 1),
        }
        for phase in phases
        for title, run in phase
    ]
    seconds = sum(max((run.end for _, run in phase), default=0.0) for phase in phases)
    arms = {arm: plan.as_json() for arm, plan in plans.items()}
    return {"arms": arms, "schedule": schedule, "seconds": round(seconds, 1) if phases else None}


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
