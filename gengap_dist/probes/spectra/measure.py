"""Near-rank loss of a network's layers on a fixed set of inputs, exact across ranks, within a budget of memory.

Shapes: N rows over all ranks, D units, A [N, D] the activation matrix of one layer in one view. Each rank computes the
activations of its own inputs and says nothing of single rows to any other rank but the columns it turns (see
`matrices.DualAccumulator`). Wide layers are held until they can be turned; those that do not fit the budget together are measured
in several passes over the inputs, in blocks of columns if need be.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import capture_activations, eval_context, unwrapped
from gengap_dist.probes.layer_view import LayerView, columns, layer_views
from gengap_dist.probes.layers import Layer, Pattern, choose
from gengap_dist.probes.spectra.accumulate import METHODS, DualAccumulator, PrimalAccumulator, merge
from gengap_dist.probes.spectra.layer_spectrum import ACTIVATION_FLOORS, LayerSpectrum

INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
STREAM_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}  # of a float64 block: a cache full; enough for a GPU


def measure(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    layers: str | Sequence[Pattern] | type[nn.Module] = "auto",
    views: Sequence[str] = ("channel", "token", "pool"),
    centred: Sequence[bool] = (False, True),
    world: World | None = None,
    memory_mib: int = 512,
    method: Literal["gram", "tsqr"] = "gram",
) -> list[LayerSpectrum]:
    """Activation spectra of a network's layers over the inputs of all ranks. Collective.

    Args:
        model: any network, also compiled or wrapped in DDP or a DeepSpeed engine; left as found (modes, hooks,
            gradients, random numbers, flags).
        batches: this rank's inputs, each [n, ...]; a rank may have none as long as another has some. A one-shot
            iterator is kept as a list, because wide layers may take several passes.
        layers: `auto` (outputs of every non-linearity, and of residual blocks after the addition), names, globs or
            classes of modules.
        views: how an activation becomes a matrix. Of [N, C, H, W]: `channel` (rows are positions, (N H W) x C), `pool`
            (mean over positions, N x C), `flatten` (N x (C H W)); of tokens [N, T, D]: `token` ((N T) x D), `pool`,
            `flatten`. [N, D] has one view, whatever is asked for.
        centred: whether to measure the matrix as it is, with column means taken out, or both.
        world: the ranks that take part; None for this process alone.
        memory_mib: most memory that matrices, held activations and buffers may take on this rank, in MiB.
        method: `gram` (float64 Gram matrices; floor 6e-8 s_1) or `tsqr` (QR factors, slower; floor 1e-14 s_1).

    Returns:
        One spectrum per layer, view and centring, in the order in which layers run, identical on every rank. A layer
        with a non-finite activation is left out, with a warning.

    Raises:
        UsageError: if a name matches no layer, a layer puts out no matrix, there are fewer than 2 samples, or the
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
    counts = _counts(inputs, world)
    if sum(counts) < 2:
        raise UsageError(f"the probe set holds {sum(counts)} sample(s), needs at least 2: give more inputs")
    found: dict[int, list[LayerSpectrum]] = {}
    with eval_context(model):
        sites = layer_views(choose(model, _example(inputs, world), patterns), views, sum(counts))
        block_bytes = stream_bytes(world.device.type, memory_mib)
        matrices: dict[int, PrimalAccumulator | DualAccumulator] = {}
        for pieces in plan_passes(sites, max(counts), memory_mib):
            for number in dict.fromkeys(piece.site for piece in pieces):
                site = sites[number]
                if number not in matrices:  # a site whose columns take several passes has one from the last pass
                    matrices[number] = (DualAccumulator if site.wide else PrimalAccumulator)(
                        METHODS[method](site.size, world.device)
                    )
            held = _run(model, inputs, sites, pieces, matrices, counts[world.rank], block_bytes)
            for piece, held_nw in held.items():
                site, wide = sites[piece.site], matrices[piece.site]
                assert isinstance(wide, DualAccumulator)
                wide.redistribute_columns(held_nw, [count * site.rows_each for count in counts], world, block_bytes)
            del held
            complete = {piece.site for piece in pieces if piece.stop == sites[piece.site].num_units}
            ready = {number: matrices.pop(number) for number in sorted(complete)}
            merge(list(ready.values()), world)
            found |= _solve(ready, sites, centred, world)
    return [spectrum for number in range(len(sites)) for spectrum in found[number]]


class ColumnBlock(NamedTuple):
    """Columns of a site that one pass measures."""

    site: int
    start: int
    stop: int


def stream_bytes(device_type: str, memory_mib: int) -> int:
    """Of a block that is on its way into a matrix, in float64."""
    return min(STREAM_BYTES[device_type], memory_mib * 2**20 // 16)


def plan_passes(sites: Sequence[LayerView], most_inputs: int, memory_mib: int) -> list[list[ColumnBlock]]:
    """What each pass over the inputs measures; the same on every rank.

    Three quarters of the budget are for what stays during a pass: k x k matrices (twice, for solving) and the held
    columns of wide sites on the rank with the most inputs. The rest is for what streams.

    Raises:
        UsageError: if a site's matrix and one of its columns do not fit.
    """
    budget = memory_mib * 2**20 * 3 // 4
    passes: list[list[ColumnBlock]] = [[]]
    room = budget
    for number, site in enumerate(sites):
        state, column = site.state_bytes, site.column_bytes(most_inputs)
        if state + column > budget:
            raise UsageError(
                f"layer {site.layer.name} has {site.num_rows:,} rows and {site.num_units:,} units in view "
                f"{site.view or '[N, D]'}, and its {site.size:,} x {site.size:,} matrices exceed the {memory_mib} MiB "
                f"of memory_mib: raise it to {-(-4 * (state + column) // (3 * 2**20)):,}, or measure fewer samples"
            )
        at = 0
        while at < site.num_units:
            left = site.num_units - at
            most = left if not column else (room - state) // column
            if most < left and passes[-1] and (most < 1 or state + left * column <= budget):
                passes.append([])  # what a new pass can hold whole is not cut; and nothing is cut to nothing
                room = budget
                continue
            take = min(left, most)
            passes[-1].append(ColumnBlock(number, at, at + take))
            room -= state + take * column
            at += take
    return [pieces for pieces in passes if pieces]


def _counts(inputs: Iterable[Tensor], world: World) -> list[int]:
    """Inputs of every rank. Collective."""
    counts = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    counts[world.rank] = sum(len(batch) for batch in inputs)
    return [int(count) for count in world.all_reduce(counts)]


def _example(inputs: Iterable[Tensor], world: World) -> Tensor:
    """One input: the first of this rank, or zeros like those that other ranks have. Collective."""
    mine = next((batch[:1] for batch in inputs if len(batch)), None)
    seen = torch.zeros(10, dtype=torch.float64, device=world.device)  # ranks with inputs, dtype, shape
    if mine is not None:
        seen[: mine.ndim + 1] = seen.new_tensor([1, INPUT_DTYPES.index(mine.dtype), *mine.shape[1:]])
    seen = world.all_reduce(seen)
    if mine is not None:
        return mine
    dtype, *dims = (int(value / seen[0]) for value in seen[1:])
    return torch.zeros(1, *filter(None, dims), dtype=INPUT_DTYPES[dtype], device=world.device)


def _run(
    model: nn.Module,
    inputs: Iterable[Tensor],
    sites: Sequence[LayerView],
    pieces: Sequence[ColumnBlock],
    matrices: Mapping[int, PrimalAccumulator | DualAccumulator],
    count: int,
    block_bytes: int,
) -> dict[ColumnBlock, Tensor]:
    """One pass over this rank's inputs: tall sites are added up; what wide ones hold is returned, [rows, columns]."""
    held: dict[ColumnBlock, Tensor] = {}
    filled: Counter[ColumnBlock] = Counter()
    wanted: dict[str, list[ColumnBlock]] = {}
    for piece in pieces:
        wanted.setdefault(sites[piece.site].layer.name, []).append(piece)

    def take(layer: Layer, activation: Tensor) -> None:
        if activation.numel() != num * layer.output.numel():
            raise UsageError(
                f"layer {layer.name} puts out {list(activation.shape)} for {num} samples and {list(layer.output)} for "
                "one, so its rows are not the samples': leave it out of probe.layers"
            )
        for piece in wanted[layer.name]:
            site, matrix = sites[piece.site], matrices[piece.site]
            if site.wide and piece not in held:
                rows = count * site.rows_each
                held[piece] = activation.new_empty(rows, piece.stop - piece.start, dtype=site.dtype)
            for part in activation.split(max(1, block_bytes // (8 * activation[0].numel()))):
                matrix_Dn = columns(part, site.view, channels_last=layer.channels_last)
                if isinstance(matrix, PrimalAccumulator):
                    matrix.add(matrix_Dn)
                else:
                    at = filled[piece]
                    filled[piece] += matrix_Dn.shape[1]
                    held[piece][at : filled[piece]] = matrix_Dn[piece.start : piece.stop].T

    with capture_activations([sites[piece.site].layer for piece in pieces], take) as new_pass:
        for batch in inputs:
            if num := len(batch):
                new_pass()
                model(batch)
    device = next(iter(matrices.values())).square.squared_row_norms().device
    nothing = (piece for piece in pieces if sites[piece.site].wide and piece not in held)  # no inputs on this rank
    held |= {p: torch.empty(0, p.stop - p.start, dtype=sites[p.site].dtype, device=device) for p in nothing}
    return {piece: held[piece] for piece in pieces if piece in held}


def _solve(
    ready: Mapping[int, PrimalAccumulator | DualAccumulator],
    sites: Sequence[LayerView],
    centred: Sequence[bool],
    world: World,
) -> dict[int, list[LayerSpectrum]]:
    """Singular values of complete matrices: dealt to ranks in turn, then shared, so all have the same bits. Collective.

    Floor: what the method leaves of the matrix's own largest singular value, plus what the rounding of the activations
    themselves leaves, which is relative to the largest singular value of the raw matrix.
    """
    num_dead = {number: matrix.dead_units() for number, matrix in ready.items()}
    jobs = list(product(ready, sorted({False, *centred}, reverse=True)))  # raw always: its s_1 sets the floor
    sizes = [min(sites[number].num_units, sites[number].num_rows) for number, _ in jobs]
    values = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
    for at, ((number, c), part) in enumerate(zip(jobs, values.split(sizes), strict=True)):
        if at % world.size == world.rank:
            part.copy_(ready[number].merged(c).singular_values()[: len(part)])
    by_job = dict(zip(jobs, world.all_reduce_to_cpu(values).split(sizes), strict=True))
    found: dict[int, list[LayerSpectrum]] = {}
    for number, matrix in ready.items():
        site = sites[number]
        found[number] = []
        if not all(torch.isfinite(by_job[number, c]).all() for c in (False, *centred)):
            warnings.warn(f"layer {site.layer.name} has non-finite activations: its spectrum is left out", stacklevel=3)
            continue
        rounding = ACTIVATION_FLOORS[site.layer.dtype] * float(by_job[number, False][0])
        for c in centred:
            s = by_job[number, c]
            floor = matrix.square.relative_floor * float(s[0]) + rounding
            found[number].append(
                LayerSpectrum(
                    layer=site.layer.name,
                    view=site.view,
                    centred=c,
                    num_samples=site.num_rows,
                    num_units=site.num_units,
                    singular_values=torch.where(s > floor, s, 0.0) / site.num_rows**0.5,
                    floor=floor / site.num_rows**0.5,
                    dead_units=num_dead[number],
                )
            )
    return found


def metrics(found: Iterable[LayerSpectrum], probe_set: str = "") -> dict[str, float]:
    """Flat metric names, `<measure>/<layer>[/<view>][/centred][/<probe set>][/<threshold>]`.

    >>> s = LayerSpectrum("fc2", "", False, 9, 2, torch.tensor([1.0, 1e-3]).double(), 0.0, 0)
    >>> metrics([s])["near_rank_loss/fc2/abs_1e-2"], metrics([s], "n9")["sigma_max/fc2/n9"]
    (0.5, 1.0)
    """
    out = {}
    for layer in found:
        for name, value in layer.measures().items():
            measure_name, _, threshold = name.partition("/")
            out["/".join(filter(None, (measure_name, layer.key, probe_set, threshold)))] = value
    return out
