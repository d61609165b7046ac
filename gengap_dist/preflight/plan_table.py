"""Formats a plan for the terminal."""

from rich.table import Table
from rich.text import Text

from gengap_dist.preflight.batch_layout import Layout
from gengap_dist.preflight.machine_constants import Constants
from gengap_dist.preflight.plan import Plan, Time


def plan_page(plan: Plan, constants: Constants) -> list[Table | Text]:
    """Batches, memory, bytes and time; then errors, warnings and assumptions: tables and lines."""
    cluster = plan.cluster
    size = f", {plan.num_parameters:,} parameters" if plan.num_parameters else ""
    samples = f", {plan.data.num_train:,} training samples" if plan.data else ""
    head = Text.assemble(
        (plan.model, "bold"),
        f"{size}{samples}; {cluster.nodes:,} node(s) x {cluster.gpus_per_node:,} = {cluster.num_ranks:,} rank(s), "
        f"{plan.strategy}",
    )
    tables = [table for table in (_steps(plan), _memory(plan), _traffic(plan)) if table]
    messages = [
        Text.assemble((f"{word:8}", style), f"     {line}")
        for style, word, lines in (
            ("bold red", "refused", plan.refused),
            ("yellow", "warning", plan.warned),
            ("dim", "assumed", plan.assumed),
        )
        for line in lines
    ]
    return [head, *tables, *map(Text, _notes(plan)), *_times(plan, constants), *messages]


def _steps(plan: Plan) -> Table | None:
    if plan.batch is None:
        return None
    updates = f": {plan.num_steps:,} updates, {plan.steps_per_epoch:,} per epoch" if plan.num_steps else ""
    table = Table(title=f"steps{updates}", title_justify="left")
    for number, head in enumerate(
        ("step", "samples", "per rank", "micro-batches per rank", "of size", "idle ranks", "batch-norm groups of")
    ):
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    table.add_row("every", *_layout(plan.batch, plan.has_batch_norm))
    if plan.ragged:
        table.add_row("last of an epoch", *_layout(plan.ragged, plan.has_batch_norm))
    return table


def _layout(layout: Layout, has_batch_norm: bool) -> list[str]:
    groups = ", ".join(map(str, layout.norm_sizes[:4])) + (", ..." if len(layout.norm_sizes) > 4 else "")
    spans = (layout.samples_per_rank, layout.micro_batches_per_rank, layout.micro_sizes)
    shown = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in spans]
    return [f"{layout.global_size:,}", *shown, f"{layout.num_idle:,}", groups if has_batch_norm else "-"]


def _memory(plan: Plan) -> Table | None:
    memory = plan.memory
    if memory is None:
        return None
    table = Table(title=f"memory per rank: {in_bytes(memory.total)}", title_justify="left")
    rows = {
        "weights": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer_state,
        "kept weights": memory.kept_weights,
        "data set": memory.data,
        "a micro-batch": memory.activations,
        "or the probe": memory.probe,
        "(its limit)": memory.probe_limit,
    }
    for name in rows:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*map(in_bytes, rows.values()))
    return table


def _traffic(plan: Plan) -> Table | None:
    if plan.memory is None or plan.cluster.num_ranks == 1:
        return None
    probe = plan.probe
    table = Table(title="messages per rank", title_justify="left")
    for number, head in enumerate(("for", "what", "operation", "times", "bytes", "on the wire")):
        table.add_column(head, justify="left" if number < 3 else "right", no_wrap=True)
    for name, messages in (("a step", plan.messages), ("a probe", probe.messages if probe else [])):
        for message in messages:
            wire = in_bytes(message.on_wire(plan.cluster.num_ranks))
            table.add_row(
                name, message.what, message.operation, f"{message.times:,}", in_bytes(message.num_bytes), wire
            )
            name = ""
    return table


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.memory:
        notes.append(f"micro-batch  memory saved for the backward pass, from {plan.memory.activations_method}")
    if probe := plan.probe:
        wide = sum("rows" in form for form in probe.forms.values())
        notes.append(
            f"probe        {probe.num_samples:,} samples on {probe.num_ranks_with_samples:,} rank(s), "
            f"{len(probe.forms)} matrices ({wide} with more columns than rows), {probe.num_passes} pass(es), "
            f"{in_bytes(probe.bytes_on_wire)} sent"
        )
    return notes


def _times(plan: Plan, constants: Constants) -> list[Text]:
    lines = []
    if plan.time:
        lines.append(Text(f"predicted    {_time(plan.time)}"))
    if plan.time_at_best:
        best = _time(plan.time_at_best)
        rest = f"      {best}, if links between nodes were as fast as inside this machine"
        lines.append(Text.assemble(("at best", "bold"), rest))
    if plan.missing:
        lines.append(Text(f"time         {plan.missing}"))
    links = {"inside": constants.inside, "between": constants.between}
    known = [f"{name} nodes {c.alpha:.3g} s + {c.beta:.3g} s/byte" for name, c in links.items() if c]
    if known and (plan.time or plan.time_at_best):
        lines.append(Text(f"constants    {', '.join(known)}; {constants.where}"))
    return lines


def _time(time: Time) -> str:
    return (
        f"{in_seconds(time.step)} per step (compute {in_seconds(time.compute)} + communication "
        f"{in_seconds(time.communication)}), {in_seconds(time.of_run)} in total; "
        f"communication of a probe {in_seconds(time.probe_communication)}"
    )


def in_bytes(num_bytes: float) -> str:
    """Bytes as text with a suitable unit.

    >>> in_bytes(12), in_bytes(1536), in_bytes(3 * 2**30)
    ('12 B', '1.5 KiB', '3.0 GiB')
    """
    power = min(4, (max(1, int(num_bytes)).bit_length() - 1) // 10)
    return f"{num_bytes / 1024**power:.{min(1, power)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def in_seconds(seconds: float) -> str:
    """Seconds as text with a suitable unit.

    >>> in_seconds(2e-5), in_seconds(0.0123), in_seconds(90), in_seconds(7200)
    ('20 us', '12.3 ms', '90.0 s', '2.0 h')
    """
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} us"
    if seconds < 1:
        return f"{1e3 * seconds:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 3600 else f"{seconds / 3600:.1f} h"
