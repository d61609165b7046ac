"""Predict batches, memory, traffic, time and configuration errors of a run on a cluster, before it is started.

Nothing is trained and no data are read. The exit code is 2 if the configuration is refused.

Examples:
  gengap plan --config configs/demo_train.yaml --nodes 64 --gpus-per-node 8
  gengap plan --model.name torchvision:resnet50 --data.name cifar10 --batch.global_size 8192 --nodes 16 --json
  gengap plan --config configs/demo_train.yaml --gpus-per-node 2 --calibrate
"""

import json
from collections.abc import Sequence
from typing import Any

from gengap_dist.cli.exit_codes import OK, USAGE, run_command
from gengap_dist.cli.options import PlanOptions, PlanSettings, parse
from gengap_dist.config.loading import resolve, to_yaml
from gengap_dist.config.sections import RunConfig

PROG = "gengap plan"


def command(argv: Sequence[str]) -> int:
    """Print the plan; returns the exit code."""
    options, overrides = parse(PlanSettings, PlanOptions, argv, prog=PROG, description=str(__doc__))
    config = resolve(RunConfig, list(options.config), overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return OK

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
        save(constants, options.constants)
        plan = make_plan(config, cluster, constants)
    if options.as_json:
        print(json.dumps(plan.as_json(), indent=1))
    else:
        from gengap_dist.cli.terminal import print_page
        from gengap_dist.preflight.plan_table import plan_page

        print_page(plan_page(plan, constants))
    return USAGE if plan.refused else OK


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point."""
    run_command(PROG, command, argv)
