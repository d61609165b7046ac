"""What the runs of a study cost in each layout: from the cache, or measured side by side before the study starts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

from gengap_dist.config.sections import RunConfig
from gengap_dist.distributed.cgroups import free_memory
from gengap_dist.distributed.preemption import PreemptionFlag
from gengap_dist.errors import OutOfMemory, UsageError
from gengap_dist.study.layouts import keeps_ranks, possible_layouts, with_ranks
from gengap_dist.study.ranks import Ranks, Task, drive
from gengap_dist.study.schedule import Layout, Option, Resources, best_schedule, length
from gengap_dist.training.run_cost import CostCache, RunCost, cost_key, measure_cost

GIB = 2**30
START_SECONDS = 4.0  # of ranks: they import torch
WORTH_SECONDS = 15.0  # what further layouts must be able to save to be measured

Costs = dict[str, dict[Layout, RunCost]]
"""By key of a run, then by layout."""


@final
class CostTable:
    """What the runs of a study cost in each layout, as far as that is known."""

    def __init__(self, ranks: Ranks, cache: CostCache) -> None:
        """Costs for these ranks; those in the cache are known."""
        self.ranks, self.cache = ranks, cache
        self.device = "gpu" if ranks.gpus else "cpu"
        self._costs: Costs = {}
        self._unknown: set[str] = set()  # keys of the cache; could not be measured

    def key(self, config: RunConfig) -> str:
        """The name of a run without its seed."""
        return cost_key(config, self.device, 0, config.launch.num_processes)

    def _cache_key(self, config: RunConfig, layout: Layout) -> str:
        return cost_key(with_ranks(config, layout.ranks), self.device, *layout)

    def find(self, config: RunConfig, layout: Layout) -> RunCost | None:
        """The cost of a run in a layout, if it is known."""
        of_run = self._costs.setdefault(self.key(config), {})
        if layout not in of_run:
            key = self._cache_key(config, layout)
            if key in self.cache.found:
                of_run[layout] = self.cache.found[key]
        return of_run.get(layout)

    def is_fixed(self, config: RunConfig) -> bool:
        """Whether a run keeps launch.num_processes ranks: by its settings, or by what was measured of its network."""
        known = self._costs.get(self.key(config), {})
        return keeps_ranks(config) or any(cost.depends_on_ranks for cost in known.values())

    def layouts(self, config: RunConfig) -> list[Layout]:
        """The layouts in which a run may be executed on these ranks, smallest first."""
        return possible_layouts(
            config, self.ranks.size, fixed=self.is_fixed(config), threads_beside_gpu=self.ranks.threads_beside_gpu
        )

    def num_cores(self, layout: Layout) -> int:
        """Cores or GPUs that a layout occupies, at most all."""
        return min(self.ranks.size, layout.ranks if self.ranks.gpus else layout.cores)

    def options(self, config: RunConfig) -> list[Option]:
        """The layouts whose cost is known; the smallest, if none is."""
        layouts = self.layouts(config)
        known = [(layout, self.find(config, layout)) for layout in layouts]
        found = [
            Option(
                layout,
                self.num_cores(layout),
                cost.seconds + START_SECONDS * (layout != layouts[0]),
                0 if self.ranks.gpus else layout.ranks * cost.memory_bytes,  # a GPU has one run at a time
            )
            for layout, cost in known
            if cost
        ]
        return found or [Option(layouts[0], self.num_cores(layouts[0]), 0.0)]

    def measure(
        self,
        wanted: Sequence[tuple[RunConfig, Layout]],
        stop_requested: PreemptionFlag,
        progress: Callable[[int, int], None],
    ) -> None:
        """Measure what is not known yet, side by side.

        Raises:
            UsageError: if a run is refused, or its ranks are killed.
            Preempted: if a signal came.
        """
        waiting: dict[str, tuple[RunConfig, Layout]] = {}
        for config, layout in wanted:
            key = self._cache_key(config, layout)
            if self.find(config, layout) is None and key not in self._unknown:
                waiting.setdefault(key, (config, layout))
        named, total, new = dict(waiting), len(waiting), dict[str, RunCost]()

        def next_task(active: Sequence[Task]) -> Task | None:
            free = self.ranks.size - sum(task.option.cores for task in active)
            for key, (config, layout) in waiting.items():
                cores = self.num_cores(layout)
                if cores <= free:
                    del waiting[key]
                    return Task(
                        Option(layout, cores, 0.0),
                        measure_cost,
                        (with_ranks(config, layout.ranks),),
                        on_message=lambda message: None,
                        on_result=partial(keep, key),
                        on_failure=partial(fail, key),
                        can_stop=False,
                    )
            return None

        def keep(key: str, costs: list[RunCost]) -> None:
            slowest = max(costs, key=lambda cost: cost.seconds)
            new[key] = slowest.model_copy(update={"memory_bytes": max(cost.memory_bytes for cost in costs)})
            progress(len(new), total)

        def fail(key: str, error: Exception) -> None:
            if isinstance(error, UsageError) and not isinstance(error, OutOfMemory):
                raise error
            if "exit code -9" in str(error):
                raise UsageError(
                    f"a run was killed while its cost was measured ({str(error).strip()}), probably because memory is "
                    f"too small ({free_memory() / GIB:.1f} GiB are free): choose a smaller batch.micro_size or model"
                )
            self._unknown.add(key)  # the run itself reports it

        if waiting:
            progress(0, total)
            drive(self.ranks, next_task, stop_requested)
            for key, (config, layout) in named.items():
                if key in new:
                    self._costs[self.key(config)][layout] = new[key]
            self.cache.add(new)


def measure_what_matters(
    table: CostTable,
    configs: Sequence[RunConfig],
    stop_requested: PreemptionFlag,
    progress: Callable[[int, int], None],
) -> None:
    """Measure each distinct run in its smallest layout, then in larger ones if the study could end much sooner."""
    for _ in range(2):  # what depends on ranks is known after the first time
        table.measure([(config, table.layouts(config)[0]) for config in configs], stop_requested, progress)
    resources = Resources(table.ranks.size)
    if not all(table.find(config, table.layouts(config)[0]) for config in configs):
        return
    for _ in range(2):
        now = length(best_schedule([table.options(config) for config in configs], resources))
        hoped = best_schedule([_with_hoped(table, config) for config in configs], resources)
        if now - length(hoped) < max(WORTH_SECONDS, 0.1 * now):
            return
        chosen = [(configs[run.number], run.option.layout) for run in hoped]
        larger = [
            (config, layout)
            for config, of_chosen in chosen
            for layout in table.layouts(config)
            if table.num_cores(layout) == table.num_cores(of_chosen)
        ]
        table.measure(larger, stop_requested, progress)


def _with_hoped(table: CostTable, config: RunConfig) -> list[Option]:
    """The options of a run, and those that are not known yet as if they scaled perfectly."""
    known = table.options(config)
    layouts = {option.layout for option in known}
    first = known[0]
    return known + [
        Option(layout, cores, first.seconds * first.cores / cores + START_SECONDS, first.memory * layout.ranks)
        for layout in table.layouts(config)
        if layout not in layouts and (cores := table.num_cores(layout)) > first.cores
    ]
