"""How sharply the loss bends around a network's weights, on fixed samples: largest curvatures, their sum, Keskar's box.

Shapes: P trainable parameters laid end to end, M Krylov vectors, n samples of one block.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gengap_dist.distributed.process_group import World
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import eval_context, unwrapped
from gengap_dist.probes.weights import flat, trainable

Batches = Sequence[tuple[Tensor, Tensor]]


class MeanLoss:
    """Mean cross entropy over all ranks' samples as a function of the trainable parameters. Methods are collective.

    One and the same function at every call: eval mode, and every call starts from the same random numbers. Samples go
    through block by block, so that memory is that of one block; sums over blocks and ranks are float64. The model is
    left as found: perturbed weights are handed to it, never written into it.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> loss = MeanLoss(model, [(torch.tensor([[2.0]]), torch.tensor([0]))], World())
    >>> loss.product(torch.tensor([1.0, 0.0]))  # H = x^2 p (1 - p) [[1, -1], [-1, 1]]
    tensor([ 1., -1.], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, batches: Batches, world: World) -> None:
        """Collective.

        Args:
            model: any network that gives logits; its trainable parameters are the variables.
            batches: this rank's images [n, ...] and labels [n]; a rank may have none as long as another has some.
            world: the ranks that take part.

        Raises:
            UsageError: if there are no samples on any rank, or no trainable parameters.
        """
        self._model, self._batches, self._world = unwrapped(model), batches, world
        self._trainable = trainable(model)
        self.weights_P = flat(model)
        samples = torch.tensor([sum(len(labels) for _, labels in batches)], device=self.weights_P.device)
        self._num_samples = int(world.all_reduce(samples))
        if not self._num_samples:
            raise UsageError("no rank has any samples: give at least one batch")

    def gradient(self, at_P: Tensor) -> tuple[float, Tensor]:
        """The loss at parameters `at_P`, and its gradient [P] float64."""

        def block(weights: list[Tensor], loss: Tensor) -> Sequence[Tensor]:
            return loss, *torch.autograd.grad(loss, weights, materialize_grads=True)

        mean = self._mean(block, at_P, 1 + len(at_P))
        return float(mean[0]), mean[1:]

    def product(self, vector_P: Tensor) -> Tensor:
        """The Hessian at the model's weights times `vector_P`: [P] float64, by differentiating twice.

        Raises:
            UsageError: on every rank, if some operation of the network has no second derivative.
        """
        vectors = self._split(vector_P)

        def block(weights: list[Tensor], loss: Tensor) -> Sequence[Tensor]:
            slopes = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            _refuse_once_differentiable(slopes)
            along = torch.stack([(slope * v).sum().double() for slope, v in zip(slopes, vectors, strict=True)]).sum()
            return torch.autograd.grad(along, weights, materialize_grads=True)

        return self._mean(block, self.weights_P, len(vector_P))

    def _mean(self, block: Callable[[list[Tensor], Tensor], Sequence[Tensor]], at_P: Tensor, length: int) -> Tensor:
        """What `block(weights, sum of losses)` gives, end to end, summed over all blocks of all ranks, per sample."""
        total = torch.zeros(length + 1, dtype=torch.float64, device=self.weights_P.device)
        problem = None
        # only the math kernel of attention can be differentiated twice
        with eval_context(self._model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                for images, labels in self._batches:
                    weights = [w.requires_grad_() for w in self._split(at_P)]
                    parts = block(weights, self._loss_sum(weights, images, labels))
                    total[:-1] += torch.cat([part.detach().double().reshape(-1) for part in parts])
            except RuntimeError as error:
                if "derivative" not in str(error):
                    raise
                problem, total[-1] = error, 1.0
        total = self._world.all_reduce(total)
        if total[-1]:  # known to all by now: ranks without batches stop as well
            raise UsageError(
                f"{type(self._model).__name__} cannot be differentiated twice ({problem or 'another rank says why'}): "
                "replace the operation that has no second derivative, or leave sharpness out"
            ) from problem
        return total[:-1] / self._num_samples

    def _loss_sum(self, weights: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}  # some count in eval mode, too
        logits = functional_call(self._model, buffers | dict(zip(self._trainable, weights, strict=True)), (images,))
        return cross_entropy(logits.double(), labels, reduction="sum")

    def _split(self, vector_P: Tensor) -> list[Tensor]:
        parts = vector_P.detach().split([p.numel() for p in self._trainable.values()])
        return [v.view(p.shape).to(p.dtype) for v, p in zip(parts, self._trainable.values(), strict=True)]


def _refuse_once_differentiable(slopes: Sequence[Tensor]) -> None:
    """A function marked @once_differentiable hangs an Error into the graph, which autograd.grad passes by silently."""
    todo, seen = [slope.grad_fn for slope in slopes], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("an autograd.Function is marked @once_differentiable: no second derivative")
        seen.add(node)
        todo += [before for before, _ in node.next_functions]


def hessian_eigenvalues(
    model: nn.Module,
    batches: Batches,
    *,
    world: World | None = None,
    num: int = 3,
    max_steps: int = 80,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> list[float]:
    """The largest eigenvalues of the Hessian of the mean cross entropy, by Lanczos's method. Collective.

    Full reorthogonalisation, twice (Golub & Van Loan, 10.3): the Krylov vectors cost max_steps * P * 8 bytes on every
    rank, 5 GB for 8 million parameters, in the CPU's memory: a GPU needs its own for the passes. An eigenvalue that is
    there several times over may be given only once.

    Args:
        model: any network that gives logits; left as found.
        batches: this rank's images [n, ...] and labels [n]; a rank may have none as long as another has some.
        world: the ranks that take part; None for this process alone.
        num: how many eigenvalues.
        max_steps: most Hessian-vector products, each worth about two gradients.
        tolerance: residual |H v - lambda v| at which an eigenvalue is good enough, in units of the largest |lambda|.
        seed: of the vector to start from.

    Returns:
        The algebraically largest eigenvalues, descending, the same on every rank; no more than P. With a warning:
        those found so far, if max_steps were not enough, and nan, if the loss is not finite.

    Raises:
        UsageError: without samples or trainable parameters, without second derivatives, or if max_steps < num.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> found = hessian_eigenvalues(model, [(torch.tensor([[2.0]]), torch.tensor([0]))])
    >>> [round(value, 6) + 0.0 for value in found]  # H = [[1, -1], [-1, 1]]
    [2.0, 0.0]
    """
    if max_steps < num:
        raise UsageError(f"max_steps ({max_steps}) gives at most as many eigenvalues: choose {num} (num) or more")
    world = world or World()
    loss = MeanLoss(model, batches, world)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every rank

    def draw() -> Tensor:
        return torch.randn(len(loss.weights_P), dtype=torch.float64, generator=generator)

    def product(vector_P: Tensor) -> Tensor:
        return loss.product(vector_P.to(loss.weights_P.device)).cpu()

    rounding = min(64 * torch.finfo(loss.weights_P.dtype).eps, tolerance)
    found, residual = lanczos(product, draw, world, num, max_steps, tolerance, rounding)
    if not math.isfinite(residual):
        warnings.warn("the loss or its curvature is not finite: its eigenvalues are nan", stacklevel=2)
    elif residual > tolerance:
        warnings.warn(
            f"Hessian eigenvalues have a residual of {residual:.1e} |lambda_max| after {max_steps} Lanczos steps, "
            f"above {tolerance:.1e}: raise max_steps or the tolerance",
            stacklevel=2,
        )
    return found


def lanczos(
    product: Callable[[Tensor], Tensor],
    draw: Callable[[], Tensor],
    world: World,
    num: int,
    max_steps: int,
    tolerance: float,
    rounding: float,
) -> tuple[list[float], float]:
    """The `num` largest eigenvalues of a symmetric operator, descending, and their largest residual. Collective.

    A subspace that closes (H maps it into itself) holds one copy of every eigenvalue that its first vector touched:
    then a new vector, orthogonal to all so far, starts the next subspace, until `num` of them are closed.

    Args:
        product: [P] to [P] float64, the operator.
        draw: a random vector [P] float64 at every call, the same on every rank.
        world: the ranks that take part; rank 0 decides when to stop.
        num: how many eigenvalues; all P, if there are fewer.
        max_steps: most calls of `product`.
        tolerance: residual at which to stop, in units of the largest |eigenvalue|, like the residual returned.
        rounding: relative error of `product`: a remainder below it closes a subspace.

    >>> H = torch.diag(torch.tensor([1.0, 5.0, 5.0, -9.0])).double()
    >>> draw = lambda: torch.randn(4, generator=generator, dtype=torch.float64)
    >>> generator = torch.Generator().manual_seed(0)
    >>> values, _ = lanczos(lambda v: H @ v, draw, World(), 3, 80, 1e-5, 1e-14)
    >>> [round(value, 9) for value in values]
    [5.0, 5.0, 1.0]
    """
    vector_P = draw()
    num, max_steps = min(num, len(vector_P)), min(max_steps, len(vector_P))
    basis_MP = vector_P.new_empty(max_steps, len(vector_P))
    known: list[tuple[float, float]] = []  # eigenvalues of closed subspaces, with their residuals
    num_closed, alphas, betas = 0, [], []  # T of the present subspace: its diagonal, and what stands beside it
    best: list[tuple[float, float]] = []
    scale = 0.0
    for step in range(max_steps):
        basis_MP[step] = vector_P / vector_P.norm()
        image_P = product(basis_MP[step])
        alphas.append(float(basis_MP[step] @ image_P))
        vector_P = _outside(basis_MP[: step + 1], image_P)
        beta = float(vector_P.norm())
        if not math.isfinite(alphas[-1] + beta):  # the same on every rank, as `product` is
            return [math.nan] * num, math.nan
        pairs = _ritz(alphas, betas, beta)
        best = sorted(known + pairs, reverse=True)
        scale = max(abs(best[0][0]), abs(best[-1][0]))
        closed = beta <= rounding * scale
        settled = len(pairs) >= num and all(residual <= tolerance * scale for _, residual in pairs[:num])
        done = num_closed + 1 == num if closed else settled
        # ranks on unlike machines may differ in the last bit: all do what rank 0 does
        closed, done = map(bool, _of_first(world, [closed, done], basis_MP.device))
        if done:
            break
        betas.append(beta)
        if closed and step + 1 < max_steps:
            known, num_closed, alphas, betas = known + pairs, num_closed + 1, [], []
            vector_P = _outside(basis_MP[: step + 1], draw())
    residual = max(residual for _, residual in best[:num]) / (scale or 1.0)
    *found, residual = _of_first(world, [value for value, _ in best[:num]] + [residual], basis_MP.device)
    return found, residual


def _outside(basis_MP: Tensor, vector_P: Tensor) -> Tensor:
    """`vector_P` without its part in the span of the rows; twice, as the first time leaves rounding of what it took."""
    for _ in range(2):
        vector_P = vector_P - basis_MP.T @ (basis_MP @ vector_P)
    return vector_P


def _ritz(alphas: list[float], betas: list[float], beta: float) -> list[tuple[float, float]]:
    """Eigenvalues of the tridiagonal T, descending, each with its residual beta |last component of its eigenvector|.

    >>> _ritz([2.0, 1.0], [0.0], 0.5)
    [(2.0, 0.0), (1.0, 0.5)]
    """
    diagonal, beside = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1))
    return [*zip(values.flip(0).tolist(), (beta * vectors[-1].abs()).flip(0).tolist(), strict=True)]


def _of_first(world: World, values: Sequence[float], device: torch.device) -> list[float]:
    """Rank 0's values, on every rank. Collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    return world.all_reduce_to_cpu(mine if world.rank == 0 else torch.zeros_like(mine)).tolist()


def hessian_trace(
    model: nn.Module, batches: Batches, *, world: World | None = None, num_vectors: int = 16, seed: int = 0
) -> tuple[float, float]:
    """Trace of the Hessian of the mean cross entropy, and its standard error. Collective.

    Hutchinson 1989: the mean of v^T H v over random vectors of +1 and -1; the standard error is the sample deviation
    (num_vectors - 1) over sqrt(num_vectors). A diagonal Hessian has none.

    Args:
        model: any network that gives logits; left as found.
        batches: this rank's images [n, ...] and labels [n]; a rank may have none as long as another has some.
        world: the ranks that take part; None for this process alone.
        num_vectors: how many vectors, 2 or more; each costs about two gradients.
        seed: of the vectors.

    Raises:
        UsageError: without samples or trainable parameters, without second derivatives, or if num_vectors < 2.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ZeroPad1d((0, 1)))  # logits w x and 0
    >>> _ = nn.init.zeros_(model[0].weight)
    >>> hessian_trace(model, [(torch.tensor([[2.0]]), torch.tensor([0]))])  # H = x^2 p (1 - p)
    (1.0, 0.0)
    """
    if num_vectors < 2:
        raise UsageError(f"num_vectors ({num_vectors}) gives no standard error: choose 2 or more")
    world = world or World()
    loss = MeanLoss(model, batches, world)
    generator = torch.Generator().manual_seed(seed)
    found: list[float] = []
    for _ in range(num_vectors):
        signs_P = 2.0 * torch.randint(2, loss.weights_P.shape, generator=generator) - 1
        signs_P = signs_P.to(loss.weights_P.device, torch.float64)
        found.append(float(signs_P @ loss.product(signs_P)))
    values = torch.tensor(_of_first(world, found, loss.weights_P.device), dtype=torch.float64)
    return float(values.mean()), float(values.std() / num_vectors**0.5)


def keskar(
    model: nn.Module, batches: Batches, *, world: World | None = None, epsilon: float = 1e-3, steps: int = 20
) -> float:
    """Sharpness by Keskar et al. 2017 (eq. 4, full space): 100 (max f(x + z) - f(x)) / (1 + f(x)). Collective.

    f is the mean cross entropy, x the trainable parameters, and z goes over the box |z_i| <= epsilon (|x_i| + 1). The
    maximum is sought by ascent along the gradient's signs: first into the corner they point to, then by steps that
    shrink to nothing, within the box; the best point counts. So it is a lower bound, and never below 0.

    Args:
        model: any network that gives logits; left as found.
        batches: this rank's images [n, ...] and labels [n]; a rank may have none as long as another has some.
        world: the ranks that take part; None for this process alone.
        epsilon: size of the box.
        steps: of the ascent, each worth one gradient; always as many, so that ranks stay together.

    Returns:
        A percentage, the same on every rank; nan if the loss is not finite at x.

    Raises:
        UsageError: without samples or trainable parameters.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> found = keskar(model, [(torch.tensor([[1.0]]), torch.tensor([0]))], epsilon=0.5)
    >>> round(found, 5), round(100 * (math.log(1 + math.e) - math.log(2)) / (1 + math.log(2)), 5)
    (36.62496, 36.62496)
    """
    loss = MeanLoss(model, batches, world or World())
    start_P = loss.weights_P.double()
    bound_P = epsilon * (start_P.abs() + 1)
    start, slope_P = loss.gradient(start_P)
    best, shift_P = start, torch.zeros_like(start_P)
    for step in range(steps):
        stride = 2 * (1 - step / steps)  # 2: from anywhere in the box to any corner
        shift_P = (shift_P + stride * bound_P * slope_P.sign()).clamp(-bound_P, bound_P)
        value, slope_P = loss.gradient(start_P + shift_P)
        best = max(best, value)
    return 100 * (best - start) / (1 + start)
