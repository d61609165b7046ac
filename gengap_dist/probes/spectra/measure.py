"""Near-rank loss of a network's layers on a fixed set of inputs, exact over all ranks, within a memory limit.

Shapes: N rows over all ranks, D units, A [N, D] the activation matrix of one layer in one view. Each rank computes the
activations of its own inputs and sends rows to other ranks only when columns are redistributed (see
`accumulate.DualAccumulator`). Activations of wide layers are stored until then; those that do not fit in memory
together are measured in several passes over the inputs, in blocks of columns if necessary.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gengap_dist.config.measures import Method
from gengap_dist.config.metric_key import layer_metric
from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import capture_activations, eval_context, unwrapped
from gengap_dist.probes.layer_view import LayerView, build_layer_views, columns
from gengap_dist.probes.layers import Layer, Pattern, select_layers
from gengap_dist.probes.spectra.accumulate import METHODS, DualAccumulator, PrimalAccumulator, merge_ranks
from gengap_dist.probes.spectra.layer_spectrum import ACTIVATION_FLOORS, LayerSpectrum

INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
STREAM_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}  # of a float64 block: about one cache; enough for a GPU


def measure(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    layers: str | Sequence[Pattern] | type[nn.Module] = "auto",
    views: Sequence[str] = ("channel", "token", "pool"),
    centred: Sequence[bool] = (False, True),
    world: World | None = None,
    memory_mib: int = 512,
    method: Method = "gram",
) -> list[LayerSpectrum]:
    """Activation spectra of a network's layers over the inputs of all ranks. Collective.

    Args:
        model: any network, also compiled or wrapped in DDP or a DeepSpeed engine; not changed (modes, hooks,
            gradients, random state, flags).
        batches: this rank's inputs, each [n, ...]; some ranks, but not all, may have none. An iterator is
            stored as a list, because wide layers may take several passes.
        layers: `auto` (outputs of every non-linearity, and of residual blocks after the addition), names, globs or
            module classes.
        views: how an activation becomes a matrix. Of [N, C, H, W]: `channel` (rows are positions, (N H W) x C), `pool`
            (mean over positions, N x C), `flatten` (N x (C H W)); of tokens [N, T, D]: `token` ((N T) x D), `pool`,
            `flatten`. [N, D] has only one view.
        centred: False: the raw matrix; True: with column means subtracted.
        world: the participating ranks; None for this process only.
        memory_mib: maximum memory of matrices, stored activations and buffers on this rank, in MiB.
        method: `gram` (float64 Gram matrices; floor 6e-8 s_1) or `tsqr` (QR factors, slower; floor 1e-14 s_1).

    Returns:
        One spectrum per layer, view and centring, in the order in which layers run, identical on every rank. A layer
        with a non-finite activation is skipped, with a warning.

    Raises:
        UsageError: if a name matches no layer, a layer does not output a matrix, there are fewer than 2 samples, or the
            smallest matrix that a layer needs exceeds `memory_mib`.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = model[0].weight.data.copy_(torch.eye(2))
    >>> raw, _ = measure(model, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    >>> (raw.singular_values * 2**0.5).round(decimals=6).tolist()
    [3.0, 1.0]
    """
    model = unwrapped(model)
    world = world or World(device=next((p.device for p in model.parameters()), torch.device("cpu")))
    inputs = list(batches) if iter(batches) is batches else batches
    patterns = [layers] if isinstance(layers, str | type) else layers
    counts = _count_inputs(inputs, world)
    if sum(counts) < 2:
        raise UsageError(f"the probe set holds {sum(counts)} sample(s), needs at least 2: give more inputs")
    spectra: dict[int, list[LayerSpectrum]] = {}
    with eval_context(model):
        layer_views = build_layer_views(
            select_layers(model, _example_input(inputs, world), patterns), views, sum(counts)
        )
        block_bytes = stream_bytes(world.device.type, memory_mib)
        accumulators: dict[int, PrimalAccumulator | DualAccumulator] = {}
        for blocks in plan_passes(layer_views, max(counts), memory_mib):
            for number in dict.fromkeys(block.view_index for block in blocks):
                view = layer_views[number]
                if number not in accumulators:  # already there if its columns take several passes
                    accumulators[number] = (DualAccumulator if view.is_wide else PrimalAccumulator)(
                        METHODS[method](view.size, world.device)
                    )
            stored_columns = _run_pass(
                model, inputs, layer_views, blocks, accumulators, counts[world.rank], block_bytes
            )
            for block, own_rows_nw in stored_columns.items():
                view, accumulator = layer_views[block.view_index], accumulators[block.view_index]
                assert isinstance(accumulator, DualAccumulator)
                accumulator.redistribute_columns(
                    own_rows_nw, [count * view.rows_per_input for count in counts], world, block_bytes
                )
            del stored_columns
            complete = {block.view_index for block in blocks if block.stop == layer_views[block.view_index].num_units}
            complete_accumulators = {number: accumulators.pop(number) for number in sorted(complete)}
            merge_ranks(list(complete_accumulators.values()), world)
            spectra |= _solve(complete_accumulators, layer_views, centred, world)
    return [spectrum for number in range(len(layer_views)) for spectrum in spectra[number]]


class ColumnBlock(NamedTuple):
    """Columns of one layer view that are measured in one pass."""

    view_index: int
    start: int
    stop: int


def stream_bytes(device_type: str, memory_mib: int) -> int:
    """Bytes of a float64 block that is added to an accumulator."""
    return min(STREAM_BYTES[device_type], memory_mib * 2**20 // 16)


def plan_passes(layer_views: Sequence[LayerView], max_inputs: int, memory_mib: int) -> list[list[ColumnBlock]]:
    """The column blocks of each pass over the inputs; the same on every rank.

    Three quarters of the memory are for data kept during a pass: k x k matrices (twice, for solving) and the stored
    columns of wide views on the rank with the most inputs. The rest is for temporary blocks.

    Raises:
        UsageError: if the matrix of a view and one of its columns do not fit.
    """
    max_bytes = memory_mib * 2**20 * 3 // 4
    passes: list[list[ColumnBlock]] = [[]]
    free_bytes = max_bytes
    for number, view in enumerate(layer_views):
        state, column = view.state_bytes, view.column_bytes(max_inputs)
        if state + column > max_bytes:
            raise UsageError(
                f"layer {view.layer.name} has {view.num_rows:,} rows and {view.num_units:,} units in view "
                f"{view.view or '[N, D]'}, and its {view.size:,} x {view.size:,} matrices exceed the {memory_mib} MiB "
                f"of memory_mib: increase it to {-(-4 * (state + column) // (3 * 2**20)):,}, or measure fewer samples"
            )
        at = 0
        while at < view.num_units:
            left = view.num_units - at
            max_columns = left if not column else (free_bytes - state) // column
            if max_columns < left and passes[-1] and (max_columns < 1 or state + left * column <= max_bytes):
                passes.append([])  # do not split what fits a new pass completely; no empty blocks
                free_bytes = max_bytes
                continue
            num_columns = min(left, max_columns)
            passes[-1].append(ColumnBlock(number, at, at + num_columns))
            free_bytes -= state + num_columns * column
            at += num_columns
    return [blocks for blocks in passes if blocks]


def _count_inputs(inputs: Iterable[Tensor], world: World) -> list[int]:
    """Number of inputs on every rank. Collective."""
    counts = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    counts[world.rank] = sum(len(batch) for batch in inputs)
    return [int(count) for count in world.all_reduce(counts)]


def _example_input(inputs: Iterable[Tensor], world: World) -> Tensor:
    """One input: the first of this rank, or zeros with the shape of other ranks' inputs. Collective."""
    own_input = next((batch[:1] for batch in inputs if len(batch)), None)
    shared_facts = torch.zeros(10, dtype=torch.float64, device=world.device)  # ranks with inputs, dtype, shape
    if own_input is not None:
        shared_facts[: own_input.ndim + 1] = shared_facts.new_tensor(
            [1, INPUT_DTYPES.index(own_input.dtype), *own_input.shape[1:]]
        )
    shared_facts = world.all_reduce(shared_facts)
    if own_input is not None:
        return own_input
    dtype, *dims = (int(value / shared_facts[0]) for value in shared_facts[1:])
    return torch.zeros(1, *filter(None, dims), dtype=INPUT_DTYPES[dtype], device=world.device)


def _run_pass(
    model: nn.Module,
    inputs: Iterable[Tensor],
    layer_views: Sequence[LayerView],
    blocks: Sequence[ColumnBlock],
    accumulators: Mapping[int, PrimalAccumulator | DualAccumulator],
    count: int,
    block_bytes: int,
) -> dict[ColumnBlock, Tensor]:
    """One pass over this rank's inputs: adds rows of D <= N views, returns columns of wide ones [rows, columns]."""
    stored_columns: dict[ColumnBlock, Tensor] = {}
    filled: Counter[ColumnBlock] = Counter()
    blocks_by_layer: dict[str, list[ColumnBlock]] = {}
    for block in blocks:
        blocks_by_layer.setdefault(layer_views[block.view_index].layer.name, []).append(block)

    def add_activation(layer: Layer, activation: Tensor) -> None:
        if activation.numel() != num_inputs * layer.output.numel():
            raise UsageError(
                f"layer {layer.name} outputs {list(activation.shape)} for {num_inputs} samples "
                f"and {list(layer.output)} for one, so its rows do not belong to samples: leave it out of probe.layers"
            )
        for block in blocks_by_layer[layer.name]:
            view, accumulator = layer_views[block.view_index], accumulators[block.view_index]
            if view.is_wide and block not in stored_columns:
                rows = count * view.rows_per_input
                stored_columns[block] = activation.new_empty(rows, block.stop - block.start, dtype=view.dtype)
            for part in activation.split(max(1, block_bytes // (8 * activation[0].numel()))):
                matrix_Dn = columns(part, view.view, channels_last=layer.channels_last)
                if isinstance(accumulator, PrimalAccumulator):
                    accumulator.add(matrix_Dn)
                else:
                    at = filled[block]
                    filled[block] += matrix_Dn.shape[1]
                    stored_columns[block][at : filled[block]] = matrix_Dn[block.start : block.stop].T

    with capture_activations(
        [layer_views[block.view_index].layer for block in blocks], add_activation
    ) as reset_call_counts:
        for batch in inputs:
            if num_inputs := len(batch):
                reset_call_counts()
                model(batch)
    device = next(iter(accumulators.values())).spectrum.squared_row_norms().device
    nothing = (
        block for block in blocks if layer_views[block.view_index].is_wide and block not in stored_columns
    )  # this rank has no inputs
    stored_columns |= {
        p: torch.empty(0, p.stop - p.start, dtype=layer_views[p.view_index].dtype, device=device) for p in nothing
    }
    return {block: stored_columns[block] for block in blocks if block in stored_columns}


def _solve(
    complete_accumulators: Mapping[int, PrimalAccumulator | DualAccumulator],
    layer_views: Sequence[LayerView],
    centred: Sequence[bool],
    world: World,
) -> dict[int, list[LayerSpectrum]]:
    """Spectra of complete matrices: computed round-robin, then shared: bitwise equal on all. Collective.

    The floor is the method's error, relative to the largest singular value of the matrix, plus the rounding error of
    the activations, relative to the largest singular value of the raw matrix.
    """
    num_dead = {number: accumulator.dead_units() for number, accumulator in complete_accumulators.items()}
    matrix_keys = list(
        product(complete_accumulators, sorted({False, *centred}, reverse=True))
    )  # always raw: its s_1 sets the floor
    sizes = [
        min(layer_views[number].num_units, layer_views[number].num_rows - centred) for number, centred in matrix_keys
    ]
    values = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
    for at, ((number, c), part) in enumerate(zip(matrix_keys, values.split(sizes), strict=True)):
        if at % world.size == world.rank:
            part.copy_(complete_accumulators[number].finalized(c).singular_values()[: len(part)])
    by_job = dict(zip(matrix_keys, world.all_reduce_to_cpu(values).split(sizes), strict=True))
    spectra: dict[int, list[LayerSpectrum]] = {}
    for number, accumulator in complete_accumulators.items():
        view = layer_views[number]
        spectra[number] = []
        if not all(torch.isfinite(by_job[number, c]).all() for c in (False, *centred)):
            warnings.warn(f"layer {view.layer.name} has non-finite activations: its spectrum is left out", stacklevel=3)
            continue
        rounding = ACTIVATION_FLOORS[view.layer.dtype] * float(by_job[number, False][0])
        for c in centred:
            s = by_job[number, c]
            floor = accumulator.spectrum.relative_floor * float(s[0]) + rounding
            spectra[number].append(
                LayerSpectrum(
                    layer=view.layer.name,
                    view=view.view,
                    centred=c,
                    num_samples=view.num_rows,
                    num_units=view.num_units,
                    singular_values=torch.where(s > floor, s, 0.0) / view.num_rows**0.5,
                    floor=floor / view.num_rows**0.5,
                    dead_units=num_dead[number],
                )
            )
    return spectra


def metrics(spectra: Iterable[LayerSpectrum], probe_set: str = "") -> dict[str, float]:
    """All measures of the spectra by metric name, see `config.metric_key`.

    >>> s = LayerSpectrum("fc2", "", False, 9, 2, torch.tensor([1.0, 1e-3]).double(), 0.0, 0)
    >>> metrics([s])["near_rank_loss/fc2/abs_1e-2"], metrics([s], "n9")["sigma_max/fc2/n9"]
    (0.5, 1.0)
    """
    return {
        layer_metric(name, layer.key, probe_set): value for layer in spectra for name, value in layer.measures().items()
    }
