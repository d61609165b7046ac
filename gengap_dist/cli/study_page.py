"""What is known of a study before its first run: baseline, roles of its arms, what it can decide and will take."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gengap_dist.analysis.decidable import Outlook, Planned, outlook
from gengap_dist.cli.terminal import MAX_WIDTH, duration
from gengap_dist.config.loading import flat
from gengap_dist.config.study import StudyConfig
from gengap_dist.errors import first_of
from gengap_dist.study.run_matrix import Forecast
from gengap_dist.study.runner import num_runs
from gengap_dist.study.schedule import Placed
from gengap_dist.training.run_cost import ArmFacts

if TYPE_CHECKING:  # it imports torch, which the driver process of a study does not need
    from gengap_dist.preflight.plan import Plan

MAX_ROWS = 16  # of the table of arms: those of more are one row for each role
ROLES = ("baseline", "plain", "other length", "scaled", "longer", "raised", "trace", "lowered", "placebo", "other")
MATCHED = 1.0  # stands for a strength that study.match has yet to find

Page = list[Table | Text | Padding]


def study_page(config: StudyConfig, facts: Mapping[str, ArmFacts]) -> Page:
    """Baseline and why, arms by role, claims that can be decided, and disk: for 80 columns.

    Args:
        config: the study.
        facts: of its arms; without all of them, roles and claims are not known.
    """
    name, seeds = config.baseline, len(config.study.seeds)
    why = "study.baseline names it"
    if not config.study.baseline:
        why = "the smallest batch of the arms that set only batch and length"
    elif treatment := config.treatment_of(next(arm for arm in config.arms if arm.name == name)):
        why += f", although it sets {first_of(treatment, 2)}"
    page: Page = [
        Text.assemble(("study    ", "dim"), f"{config.study.name}: {len(config.arms)} arms, {seeds} seeds, ",
                      f"at most {num_runs(config):,} runs" if config.study.match else f"{num_runs(config):,} runs"),
        Padding(Text.assemble(("baseline ", "dim"), (name, "bold"), f": {why}"), 0, expand=False),
    ]  # fmt: skip
    page += [Padding(Text.assemble(("note     ", "dim"), line), 0, expand=False) for line in _duplicates(config)]
    if not all(arm.name in facts for arm in config.arms):
        return [*page, Text("the data are not on this machine: roles and lengths of the arms are not known here")]
    found = outlook(_planned(config, facts), name, config.study.seeds)
    page += [
        _arms_table(config, facts, found),
        Text("this study has the arms to ask, if they train to the end, whether"),
    ]
    page += [Padding(Text(f"+ {each.claim}"), (0, 0, 0, 2), expand=False) for each in found.claims if not each.missing]
    if open_claims := [each for each in found.claims if each.missing]:
        page.append(Text("it lacks, to decide whether"))
        page += [Padding(Text(f"- {each.claim}: {each.missing}"), (0, 0, 0, 2), expand=False) for each in open_claims]
    each_run = [facts[arm.name].disk_bytes for arm in config.arms]
    if None not in each_run:
        runs_per_arm = num_runs(config) / len(config.arms)
        gib = sum(filter(None, each_run)) * runs_per_arm / 2**30
        shown = f"about {gib:.1f} GiB" if gib >= 1 else f"about {max(1, gib * 1024):,.0f} MiB"
        page.append(Text.assemble(("disk     ", "dim"), f"{shown} in the study's folder, without what MLflow keeps"))
    return page


def _duplicates(config: StudyConfig) -> Iterator[str]:
    """A sentence for each arm that stands for others, too."""
    names: dict[str, list[str]] = {}
    for name, original in config.duplicates.items():
        names.setdefault(original, []).append(name)
    for original, same in names.items():
        verb, again = ("has", "it is") if len(same) == 1 else ("have", "they are")
        arms = f"arm{'s' * (len(same) > 1)} {first_of(same)}"
        yield f"{arms} {verb} the same settings as {original}, so {again} not run again"


def forecast_line(config: StudyConfig, forecast: Forecast) -> Text:
    """Time and memory, from a few measured steps of each arm; validations and measurements are training, too."""
    time = "not known: the costs of these runs were not measured"
    if forecast.seconds:
        time = f"about {duration(forecast.seconds)} of training here"
    line = Text.assemble(("time     ", "dim"), (time, "bold"))
    if forecast.seconds:
        line.append(", without start, reports and MLflow")
    if memory := forecast.memory_bytes:
        most = max(memory, key=lambda arm: memory[arm])
        line.append("\nmemory   ", "dim").append(f"up to {memory[most] / 2**20:,.0f} MiB a run (arm {most})")
    return line


def _planned(config: StudyConfig, facts: Mapping[str, ArmFacts]) -> dict[str, Planned]:
    """The arms as the finished study will see them: without settings that are tuned."""
    tuned = [*config.study.tune.space] if config.study.tune else []
    matches = config.study.match.arms if config.study.match else ()
    matched = {name for match in matches for name in (match.arm, *match.shared)}
    planned = {}
    for arm in config.arms:
        settings = {name: value for name, value in flat(config.run_config(arm, 0)).items() if name not in tuned}
        if arm.name in matched:
            strength = settings["algorithm.rank_penalty"]
            settings["algorithm.rank_penalty"] = MATCHED if strength > 0 else -MATCHED
        planned[arm.name] = Planned(settings, facts[arm.name].num_steps, facts[arm.name].num_epochs)
    return planned


class _Row(NamedTuple):
    role: str
    arm: str
    size: int
    num_steps: int


def _arms_table(config: StudyConfig, facts: Mapping[str, ArmFacts], found: Outlook) -> Table:
    """A row for each arm, by role and batch; of many arms, one for each role."""
    rows = [
        _Row(found.role_of[arm.name], arm.name, config.run_config(arm, 0).batch.global_size, facts[arm.name].num_steps)
        for arm in config.arms
    ]
    rows.sort(key=lambda row: (ROLES.index(row.role.partition(" + ")[0]), row.role, row.size))
    table = Table(box=None, pad_edge=False)
    for head in ("role", "arm", "batch", "updates"):
        is_text = head in ("role", "arm")
        table.add_column(head, justify="left" if is_text else "right", max_width=MAX_WIDTH - 10, overflow="fold")
    if len(rows) <= MAX_ROWS:
        for row in rows:
            table.add_row(row.role, row.arm, f"{row.size:,}", f"{row.num_steps:,}")
        return table
    for role, group in groupby(rows, key=lambda row: row.role):
        arms = [*group]
        named = arms[0].arm if len(arms) == 1 else f"{len(arms)} arms: {first_of([row.arm for row in arms], 2)}"
        ends = (_ends(row.size for row in arms), _ends(row.num_steps for row in arms))
        table.add_row(role, named, *ends)
    return table


def _ends(numbers: Iterator[int]) -> str:
    """Smallest and largest.

    >>> _ends(iter([1000, 64])), _ends(iter([5, 5]))
    ('64 to 1,000', '5')
    """
    low, *_, high = [*sorted({*numbers})] * 2
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def study_plan_page(plans: "Mapping[str, Plan]", phases: "Sequence[Sequence[tuple[str, Placed]]]") -> Page:
    """A row for each arm of a study, what is refused, and the schedule: tables and lines.

    Args:
        plans: by arm.
        phases: tuning and runs, each a schedule of (title, run); empty if it cannot be predicted.
    """
    table = Table(title="arms", title_justify="left")
    for head in ("arm", "batch", "updates", "parameters", "memory per rank"):
        table.add_column(head, justify="left" if head == "arm" else "right", no_wrap=True, max_width=MAX_WIDTH)
    for arm, plan in plans.items():
        size = f"{plan.batch.global_size:,}" if plan.batch else "-"
        memory = f"{plan.memory.total / 2**20:,.0f} MiB" if plan.memory else "-"
        numbers = (f"{number:,}" if number else "-" for number in (plan.num_steps, plan.num_parameters))
        table.add_row(arm, size, *numbers, memory)
    page: Page = [table]
    for style, head in (("bold red", "refused"), ("yellow", "warning")):
        for arm, plan in plans.items():
            lines = plan.refused if head == "refused" else plan.warned
            page += [Text.assemble((f"{head:8}", style), f"     {arm}: {line}") for line in lines]
    for name, phase in zip(("tuning", "runs"), phases, strict=False):
        if phase:
            page.append(_schedule_table(name, phase))
    total = sum(max((run.end for _, run in phase), default=0.0) for phase in phases)
    if phases:
        rest = " of training on this machine, without start, reports and MLflow"
        page.append(Text.assemble((duration(total), "bold"), rest))
    elif not any(plan.refused for plan in plans.values()):
        page.append(Text("schedule: the costs of these runs on this machine are not known: --calibrate measures them"))
    return page


def _schedule_table(name: str, phase: "Sequence[tuple[str, Placed]]") -> Table:
    """When each run starts and ends, with a bar."""
    width, end = 40, max(run.end for _, run in phase)
    table = Table(title=f"schedule of the {name}: {duration(end)}", title_justify="left")
    for head in ("run", "ranks", "threads", "start", "end", ""):
        table.add_column(head, justify="left" if head in ("run", "") else "right", no_wrap=True, max_width=MAX_WIDTH)
    for title, run in sorted(phase, key=lambda entry: entry[1].start):
        first, last = (round(width * at / end) for at in (run.start, run.end))
        layout = run.option.layout
        bar = " " * first + "\u2588" * max(1, last - first)
        table.add_row(title, str(layout.ranks), str(layout.threads), f"{run.start:.0f} s", f"{run.end:.0f} s", bar)
    return table
