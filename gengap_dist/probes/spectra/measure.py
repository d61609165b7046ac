"""Near-rank loss of a network's layers on a fixed set of inputs, exact over all ranks, within a memory limit.

Shapes: N rows over all ranks, D units, A [N, D] the activation matrix of one layer in one view. Each rank computes the
activations of its own inputs and sends rows to other ranks only when columns are redistributed (see
`accumulate.DualAccumulator`). Activations of wide layers are stored until then; those that do not fit in memory
together are measured in several passes over the inputs, in blocks of columns if necessary. Passes after the first end
at the last layer that they need.
"""

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gengap_dist.config.measures import Method
from gengap_dist.config.metric_key import layer_metric
from gengap_dist.distributed.process_group import World, initialized_world
from gengap_dist.errors import UsageError, first_of
from gengap_dist.probes.activations import (
    capture_activations,
    device_of,
    eval_context,
    leaf_names,
    leaves_that_run,
    unwrapped,
)
from gengap_dist.probes.layer_view import LayerView, build_layer_views, columns
from gengap_dist.probes.layers import Pattern, select_layers
from gengap_dist.probes.spectra.accumulate import METHODS, DualAccumulator, PrimalAccumulator, merge_ranks
from gengap_dist.probes.spectra.cost import MeasurementCost
from gengap_dist.probes.spectra.layer_spectrum import ACTIVATION_FLOORS, LayerSpectrum
from gengap_dist.probes.trace import Layer

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
    on_outputs: Callable[[int, Any], None] | None = None,
    cost: MeasurementCost | None = None,
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
        world: the participating ranks; None: those of torch.distributed's process group, or this process only if there
            is none.
        memory_mib: maximum memory of matrices, stored activations and buffers on this rank, in MiB.
        method: `gram` (float64 Gram matrices; floor 6e-8 s_1) or `tsqr` (QR factors, slower; floor 1e-14 s_1).
        on_outputs: called once for each batch with samples, with its number and the output of the network.
        cost: gets the seconds of this rank by part, and what is left while it measures.

    Returns:
        One spectrum per layer, view and centring, in the order in which layers run, identical on every rank. A layer
        with a non-finite activation is left out, with a warning; so is one that `auto` finds and that does not put out
        the same number of rows for every sample.

    Raises:
        UsageError: on every rank, if a name matches no layer, a layer that is named does not put out the same number of
            rows for every sample, ranks have different inputs or layers, there are fewer than 2 samples, or the
            smallest matrix that a layer needs exceeds `memory_mib`.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = model[0].weight.data.copy_(torch.eye(2))
    >>> raw, _ = measure(model, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    >>> (raw.singular_values * 2**0.5).round(decimals=6).tolist()
    [3.0, 1.0]
    """
    model = unwrapped(model)
    world, cost = world or initialized_world(device_of(model)), cost or MeasurementCost()
    inputs = list(batches) if iter(batches) is batches else batches
    patterns = [layers] if isinstance(layers, str | type) else layers
    counts = _count_inputs(inputs, world)
    if sum(counts) < 2:
        raise UsageError(f"the probe set holds {sum(counts)} sample(s), needs at least 2: give more inputs")
    spectra: dict[int, list[LayerSpectrum]] = {}
    with eval_context(model):
        example, problem = _example_inputs(inputs, counts, world)
        with leaves_that_run(model) as traced:
            layer_views = _agreed_layer_views(
                lambda: build_layer_views(select_layers(model, example, patterns), views, sum(counts)), problem, world
            )
        block_bytes = stream_bytes(world.device.type, memory_mib)
        accumulators: dict[int, PrimalAccumulator | DualAccumulator] = {}
        left_out: set[str] = set()
        planned_passes = plan_passes(layer_views, max(counts), memory_mib)
        _plan_cost(cost, planned_passes, layer_views, centred, counts[world.rank], world)
        if cost.is_watched:
            _time_methods(cost, method, world.device)
        for pass_number, planned_blocks in enumerate(planned_passes):
            blocks = [block for block in planned_blocks if layer_views[block.view_index].layer.name not in left_out]
            if not blocks:
                continue
            for number in dict.fromkeys(block.view_index for block in blocks):
                view = layer_views[number]
                if number not in accumulators:  # already there if its columns take several passes
                    accumulators[number] = (DualAccumulator if view.is_wide else PrimalAccumulator)(
                        METHODS[method](view.size, world.device), torch.finfo(view.layer.dtype).eps
                    )
            count, is_first = counts[world.rank], not pass_number
            one_pass = _Pass(model, layer_views, blocks, accumulators, count, block_bytes, cost, is_first=is_first)
            left_out |= one_pass.run(inputs, world, *((None, None) if pass_number else (traced, on_outputs)))
            blocks = [block for block in blocks if layer_views[block.view_index].layer.name not in left_out]
            for block, own_rows_nw in one_pass.stored_columns(blocks, world.device).items():
                view, accumulator = layer_views[block.view_index], accumulators[block.view_index]
                assert isinstance(accumulator, DualAccumulator)
                with cost.measured("gram", _gram_work(view.size, own_rows_nw.shape[1] / world.size)):
                    accumulator.redistribute_columns(
                        own_rows_nw, [count * view.rows_per_input for count in counts], world, block_bytes
                    )
            del one_pass
            complete = {block.view_index for block in blocks if block.stop == layer_views[block.view_index].num_units}
            complete_accumulators = {number: accumulators.pop(number) for number in sorted(complete)}
            if complete_accumulators:
                with cost.measured("gram"):
                    merge_ranks(list(complete_accumulators.values()), world)
                with cost.measured("decomposition"):
                    spectra |= _solve(complete_accumulators, layer_views, centred, world, cost)
    return [spectrum for number in range(len(layer_views)) for spectrum in spectra.get(number, [])]


def _plan_cost(
    cost: MeasurementCost,
    passes: Sequence[Sequence["ColumnBlock"]],
    layer_views: Sequence[LayerView],
    centred: Sequence[bool],
    num_own_inputs: int,
    world: World,
) -> None:
    """Tell `cost` the work of this rank: samples through the network, and products for matrices and solvers."""
    for number, blocks in enumerate(passes):
        cost.plan("forward", num_own_inputs * (_share_needed(layer_views, blocks) if number else 1.0))
    for view in layer_views:
        share = view.num_units / world.size if view.is_wide else num_own_inputs * view.rows_per_input
        cost.plan("gram", _gram_work(view.size, share))
        cost.plan("decomposition", view.size**3 * len({False, *centred}) / world.size)


def _time_methods(cost: MeasurementCost, method: Method, device: torch.device) -> None:
    """Measure a small matrix, so that there is an estimate before the first layer is complete."""
    size, num_columns = 256, 1024
    block_kn = torch.rand(size, num_columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    accumulator = METHODS[method](size, device)
    accumulator.add(block_kn.clone())  # the first call loads libraries
    began = time.perf_counter()
    accumulator.add(block_kn)
    added = time.perf_counter()
    accumulator.singular_values().cpu()
    cost.plan("gram", 0.0, (added - began) / _gram_work(size, num_columns))
    cost.plan("decomposition", 0.0, (time.perf_counter() - added) / size**3)


def _share_needed(layer_views: Sequence[LayerView], blocks: Sequence["ColumnBlock"]) -> float:
    """About the share of a forward pass up to the last layer of `blocks`: that of the layers until then."""
    last = max(block.view_index for block in blocks)
    return (last + 1) / len(layer_views)


def _gram_work(size: int, num_columns: float) -> float:
    """Products for adding columns to a matrix of `size` rows; reading a value takes as long as about 100."""
    return num_columns * size * (size + 100)


class ColumnBlock(NamedTuple):
    """Columns of one layer view that are measured in one pass."""

    view_index: int
    start: int
    stop: int


def stream_bytes(device_type: str, memory_mib: int) -> int:
    """Bytes of a float64 block that is added to an accumulator."""
    return min(STREAM_BYTES[device_type], memory_mib * 2**20 // 16)


def plan_passes(layer_views: Sequence[LayerView], max_inputs: int, memory_mib: int) -> list[list[ColumnBlock]]:
    """The column blocks of each pass over the inputs, the last layers first; the same on every rank.

    The first pass runs the whole network anyway, and later ones end the sooner the earlier their layers are.

    Three quarters of the memory are for data kept during a pass: k x k matrices (twice, for solving) and the stored
    columns of wide views on the rank with the most inputs. The rest is for temporary blocks.

    Raises:
        UsageError: if the matrix of a view and one of its columns do not fit.
    """
    max_bytes = memory_mib * 2**20 * 3 // 4
    passes: list[list[ColumnBlock]] = [[]]
    free_bytes = max_bytes
    for number, view in reversed([*enumerate(layer_views)]):
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


def _example_inputs(inputs: Iterable[Tensor], counts: Sequence[int], world: World) -> tuple[Tensor, str]:
    """Two inputs, the same on every rank: the first of the first rank that has any; a single one twice. Collective.

    Returns:
        The inputs, and what is wrong with this rank's own, or ''.
    """
    if any(batch.layout != torch.strided for batch in inputs):
        raise UsageError("probe batches are sparse tensors, and probes need dense ones: give batch.to_dense()")
    own = next((batch[:2] for batch in inputs if len(batch)), None)
    if own is not None:
        own = torch.cat([own, own])[:2]
        if world.size == 1:
            return own, ""
    first = next(rank for rank, count in enumerate(counts) if count)
    own_facts: list[float] = []
    if own is not None:
        own_facts = [INPUT_DTYPES.index(own.dtype) if own.dtype in INPUT_DTYPES else -1, *own.shape[1:]]
    facts = torch.zeros(10, dtype=torch.float64, device=world.device)  # dtype, shape
    if world.rank == first:
        facts[: len(own_facts)] = facts.new_tensor(own_facts)
    dtype, *sizes = map(int, world.all_reduce_to_cpu(facts).tolist())
    sizes = [size for size in sizes if size]
    problem = ""
    if own is not None and own_facts != [dtype, *sizes]:
        problem = f"rank {world.rank} has inputs of another shape or dtype than rank {first}: give all ranks one kind"
    if dtype < 0:
        known = ", ".join(str(each).removeprefix("torch.") for each in INPUT_DTYPES)
        problem = f"inputs have a dtype that cannot be sent to other ranks: choose among {known}"
    example = torch.zeros(2, *sizes, dtype=torch.float64, device=world.device)
    if world.rank == first and own is not None:
        example.copy_(own)
    return world.all_reduce(example).to(INPUT_DTYPES[dtype]), problem


def _agreed_layer_views(choose: Callable[[], list[LayerView]], problem: str, world: World) -> list[LayerView]:
    """What `choose` returns, which must be the same on every rank. Collective.

    Raises:
        UsageError: if it is not, if `choose` failed on a rank, or if a rank has a `problem`.
    """
    views: list[LayerView] = []
    failure: Exception | None = UsageError(problem) if problem else None
    if failure is None:
        try:
            views = choose()
        except Exception as error:  # of any network: the other ranks wait
            failure = error
    facts = [(view.layer._replace(module=nn.Identity()), *view[1:]) for view in views]
    digest = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:6])  # exact in float64
    shared = torch.tensor([failure is not None, world.rank == 0 and digest], dtype=torch.float64, device=world.device)
    num_failed, of_rank_0 = world.all_reduce_to_cpu(shared).tolist()
    if failure is not None:
        _raise_failure(failure)
    if num_failed:
        raise UsageError("the network cannot be traced on another rank, which reports why")
    if world.all_reduce_to_cpu(shared.new_tensor([digest != of_rank_0])).any():
        raise UsageError(
            "ranks find different layers, or layers of different shapes: give all ranks the same network and layers"
        )
    return views


def _raise_failure(failure: Exception) -> NoReturn:
    """Raise what a forward pass of the network raised, as one sentence."""
    if isinstance(failure, UsageError | torch.OutOfMemoryError | MemoryError):
        raise failure
    raise UsageError(
        f"the network failed in a forward pass in eval mode ({type(failure).__name__}: {failure}): give inputs that it "
        "takes"
    ) from failure


class _AllCaptured(Exception):
    """Ends a forward pass whose further layers are not needed."""


class _Pass:
    """One pass over this rank's inputs: adds rows of D <= N views, and stores columns of wide ones."""

    def __init__(
        self,
        model: nn.Module,
        layer_views: Sequence[LayerView],
        blocks: Sequence[ColumnBlock],
        accumulators: Mapping[int, PrimalAccumulator | DualAccumulator],
        count: int,
        block_bytes: int,
        cost: MeasurementCost,
        *,
        is_first: bool,
    ) -> None:
        """A pass for `blocks`, over `count` inputs in total. The first one passes and checks all layers."""
        self.model, self.layer_views, self.blocks, self.accumulators = model, layer_views, blocks, accumulators
        self.count, self.block_bytes, self.cost, self.is_first = count, block_bytes, cost, is_first
        self.blocks_by_layer: dict[str, list[ColumnBlock]] = {}
        for block in blocks:
            self.blocks_by_layer.setdefault(layer_views[block.view_index].layer.name, []).append(block)
        views = layer_views if is_first else [layer_views[block.view_index] for block in blocks]
        self.layers = list({view.layer.name: view.layer for view in views}.values())
        self.share = 1.0 if is_first else _share_needed(layer_views, blocks)
        self.num_inputs = 0  # of the current batch
        self._num_missing = 0  # layers that the current pass has not reached
        self._may_end = False  # whether the current pass ends when there is none
        self.problems: dict[str, str] = {}
        """Layer name to why its rows on this rank are not those of its inputs."""
        self._stored: dict[ColumnBlock, Tensor] = {}
        self._filled: Counter[ColumnBlock] = Counter()

    def run(
        self,
        inputs: Iterable[Tensor],
        world: World,
        traced: set[str] | None,
        on_outputs: Callable[[int, Any], None] | None,
    ) -> set[str]:
        """Pass all inputs through the network. Collective.

        Args:
            inputs: this rank's batches.
            world: the ranks.
            traced: names of the modules without children that ran in the traced pass, to warn of others; None: do not.
            on_outputs: see `measure`.

        Returns:
            The names of layers that do not have the same number of rows for every input on every rank.

        Raises:
            UsageError: if the user named such a layer, or the network failed on a rank.
        """
        failure: Exception | None = None
        with leaves_that_run(self.model) as ran:
            try:
                self._forward(inputs, on_outputs)
            except Exception as error:  # of any network: the other ranks wait
                failure = error
        leaves = [] if traced is None else leaf_names(self.model)
        own = [failure is not None, *(layer.name in self.problems for layer in self.layers)]
        own += [name in ran and name not in (traced or ()) for name in leaves]
        flags = torch.tensor(own, dtype=torch.float64, device=world.device)
        failed, *flagged = (world.all_reduce_to_cpu(flags) > 0).tolist()
        if failure is not None:
            _raise_failure(failure)
        if failed:
            raise UsageError("the network failed in a forward pass on another rank, which reports why")
        wrong = [layer for layer, flag in zip(self.layers, flagged, strict=False) if flag]
        for layer in wrong:
            problem = self.problems.get(layer.name, f"layer {layer.name} has wrong rows, as another rank reports")
            if layer.is_asked:
                raise UsageError(f"{problem}: leave it out of probe.layers")
            warnings.warn(f"{problem}: it is left out", stacklevel=3)
        if extra := [name for name, flag in zip(leaves, flagged[len(self.layers) :], strict=True) if flag]:
            warnings.warn(
                f"{first_of(extra)} did not run for the two traced samples and ran for others: not measured",
                stacklevel=3,
            )
        return {layer.name for layer in wrong}

    def stored_columns(self, blocks: Sequence[ColumnBlock], device: torch.device) -> dict[ColumnBlock, Tensor]:
        """The columns of wide views among `blocks`, [rows, columns]; without rows on a rank without inputs."""
        wide = [block for block in blocks if self.layer_views[block.view_index].is_wide]
        return {
            block: self._stored[block]
            if block in self._stored
            else torch.empty(0, block.stop - block.start, dtype=self.layer_views[block.view_index].dtype, device=device)
            for block in wide
        }

    def _forward(self, inputs: Iterable[Tensor], on_outputs: Callable[[int, Any], None] | None) -> None:
        with capture_activations(self.model, self.layers, self._on_activation) as capture:
            num_left = self.count
            for number, batch in enumerate(inputs):
                self.num_inputs = len(batch)
                if not self.num_inputs:
                    continue
                num_left -= self.num_inputs
                capture.begin_pass()
                self._num_missing = len(self.layers)
                # the last batch passes all layers: a network that keeps something between layers is left without it
                self._may_end = not self.is_first and num_left > 0
                with self.cost.measured("forward", self.num_inputs * self.share):
                    try:
                        outputs = self.model(batch.clone())  # which a network may change in place
                    except _AllCaptured:
                        continue
                if on_outputs is not None:
                    with capture.paused(), self.cost.measured(None):
                        on_outputs(number, outputs)
                for layer in self.layers:
                    if capture.calls[id(layer.module), layer.function] != layer.num_calls:
                        self.problems.setdefault(
                            layer.name,
                            f"layer {layer.name} ran {capture.calls[id(layer.module), layer.function]} time(s) in one "
                            f"pass and {layer.num_calls} in another, so its rows do not belong to samples",
                        )

    def _on_activation(self, layer: Layer, activation: Any) -> None:
        with self.cost.measured("gram"):
            self._add_activation(layer, activation)
        self._num_missing -= 1
        if self._may_end and not self._num_missing:
            raise _AllCaptured

    def _add_activation(self, layer: Layer, activation: Any) -> None:
        per_two = layer.output.numel()
        if (
            not isinstance(activation, Tensor)
            or 2 * activation.numel() != self.num_inputs * per_two
            or not (activation.shape[0] == self.num_inputs if layer.output[0] == 2 else True)
            or activation.shape[-1 if layer.channels_last else 1] != layer.output[-1 if layer.channels_last else 1]
        ):
            shape = list(activation.shape) if isinstance(activation, Tensor) else type(activation).__name__
            self.problems.setdefault(
                layer.name,
                f"layer {layer.name} outputs {shape} for {self.num_inputs} samples and {list(layer.output)} for two, "
                "so its rows do not belong to samples",
            )
        if layer.name in self.problems:
            return
        for block in self.blocks_by_layer.get(layer.name, []):
            view, accumulator = self.layer_views[block.view_index], self.accumulators[block.view_index]
            if view.is_wide and block not in self._stored:
                rows = self.count * view.rows_per_input
                self._stored[block] = activation.new_empty(rows, block.stop - block.start, dtype=view.dtype)
            for part in activation.split(max(1, self.block_bytes // (8 * activation[0].numel()))):
                matrix_Dn = columns(part, view.view, channels_last=layer.channels_last)
                if isinstance(accumulator, PrimalAccumulator):
                    with self.cost.measured("gram", _gram_work(view.size, matrix_Dn.shape[1])):
                        accumulator.add(matrix_Dn)
                else:
                    at = self._filled[block]
                    self._filled[block] += matrix_Dn.shape[1]
                    self._stored[block][at : self._filled[block]] = matrix_Dn[block.start : block.stop].T


def _solve(
    complete_accumulators: Mapping[int, PrimalAccumulator | DualAccumulator],
    layer_views: Sequence[LayerView],
    centred: Sequence[bool],
    world: World,
    cost: MeasurementCost,
) -> dict[int, list[LayerSpectrum]]:
    """Spectra of complete matrices: computed round-robin, then shared: bitwise equal on all. Collective.

    The floor is the method's error, relative to the largest singular value of the matrix, plus the rounding error of
    the activations, relative to the largest singular value of the raw matrix.
    """
    num_dead = {number: accumulator.dead_units() for number, accumulator in complete_accumulators.items()}
    num_constant = {number: accumulator.constant_units() for number, accumulator in complete_accumulators.items()}
    matrix_keys = list(
        product(complete_accumulators, sorted({False, *centred}, reverse=True))
    )  # always raw: its s_1 sets the floor
    sizes = [
        min(layer_views[number].num_units, layer_views[number].num_rows - centred) for number, centred in matrix_keys
    ]
    values = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
    for at, ((number, c), part) in enumerate(zip(matrix_keys, values.split(sizes), strict=True)):
        if at % world.size == world.rank:
            with cost.measured("decomposition", layer_views[number].size ** 3):
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
                    constant_units=num_constant[number],
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
