"""Curvature of the loss at a network's weights, on fixed samples: largest Hessian eigenvalues, trace, Keskar sharpness.

Shapes: P trainable parameters, flattened and concatenated; M Krylov vectors; n samples of one block.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gengap_dist.distributed.process_group import World, initialized_world
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import device_of, eval_context, unwrapped
from gengap_dist.probes.progress import Progress, no_progress
from gengap_dist.probes.weights import flat_parameters, trainable_parameters

Batches = Sequence[tuple[Tensor, Tensor]]
LossSum = Callable[[Tensor, Tensor], Tensor]
"""(outputs [n, ...] in float64, targets [n, ...]) to the sum of the losses of all targets, a scalar."""
NumTargets = Callable[[Tensor], Tensor]
"""Targets [n, ...] to the number of them that each sample has in the loss, [n] int64."""

VECTOR_BYTES = 256 * 2**20  # of vectors whose products are computed together


def one_each(targets: Tensor) -> Tensor:
    """One target for each sample: [n]."""
    return torch.ones(len(targets), dtype=torch.int64, device=targets.device)


class MeanLoss:
    """The mean loss over all ranks' targets as a function of the trainable parameters. Methods are collective.

    The function is deterministic: the model is in eval mode, and every call starts from the same random state. Samples
    are processed block by block, so memory use is that of one block; sums over blocks and ranks are float64. The model
    is not changed: perturbed weights are passed with `functional_call`.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> loss_sum = nn.CrossEntropyLoss(reduction="sum")
    >>> loss = MeanLoss(model, [(torch.tensor([[2.0]]), torch.tensor([0]))], loss_sum, World())
    >>> loss.hessian_vector_product(torch.tensor([1.0, 0.0]))  # H = x^2 p (1 - p) [[1, -1], [-1, 1]]
    tensor([ 1., -1.], dtype=torch.float64)
    """

    def __init__(
        self, model: nn.Module, batches: Batches, loss_sum: LossSum, world: World, num_targets: NumTargets = one_each
    ) -> None:
        """Collective.

        Args:
            model: any network; its trainable parameters are the variables.
            batches: this rank's inputs and targets, [n, ...] each; some ranks, but not all, may have none.
            loss_sum: the sum of the losses of a batch, not their mean.
            world: the participating ranks.
            num_targets: number of targets of each sample.

        Raises:
            UsageError: if no rank has samples with targets, or the model has no trainable parameters.
        """
        self._model, self._batches, self._world, self._sum = unwrapped(model), batches, world, loss_sum
        self._trainable = trainable_parameters(model)
        self.weights_P = flat_parameters(model)
        own = torch.tensor([sum(int(num_targets(targets).sum()) for _, targets in batches)])
        self._num_targets = int(world.all_reduce(own.to(self.weights_P.device)))
        if not self._num_targets:
            raise UsageError("no rank has any samples: give at least one batch")

    def gradient(self, at_P: Tensor) -> tuple[float, Tensor]:
        """The loss at parameters `at_P`, and its gradient: [P] float64."""

        def block(weights: list[Tensor], loss: Tensor) -> Sequence[Tensor]:
            return loss, *torch.autograd.grad(loss, weights, materialize_grads=True)

        mean = self._mean_over_targets(block, at_P, 1 + len(at_P))
        return float(mean[0]), mean[1:]

    def hessian_vector_product(self, vector_P: Tensor) -> Tensor:
        """The product of the Hessian at the model's weights and `vector_P`: [P] float64, by double backward.

        Raises:
            UsageError: on every rank, if an operation of the network has no second derivative.
        """
        return self.hessian_vector_products(vector_P[None])[0]

    def hessian_vector_products(self, vectors_KP: Tensor, on_progress: Progress = no_progress) -> Tensor:
        """The products of the Hessian with each row of `vectors_KP`: [K, P] float64, as `hessian_vector_product`.

        Loss and gradient of a block of samples are computed once for all rows, in the model's dtype, like the products.
        """
        rows = [self._split(vector_P) for vector_P in vectors_KP]

        def block(weights: list[Tensor], loss: Tensor) -> Sequence[Tensor]:
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            _refuse_once_differentiable(gradients)
            products: list[Tensor] = []
            for number, vectors in enumerate(rows, 1):
                directional = torch.stack(
                    [(gradient * v).sum().double() for gradient, v in zip(gradients, vectors, strict=True)]
                ).sum()
                products += torch.autograd.grad(
                    directional, weights, retain_graph=number < len(rows), materialize_grads=True
                )
            return products

        products = self._mean_over_targets(block, self.weights_P, vectors_KP.numel(), on_progress)
        return products.view(vectors_KP.shape)

    def _mean_over_targets(
        self,
        per_block: Callable[[list[Tensor], Tensor], Sequence[Tensor]],
        at_P: Tensor,
        length: int,
        on_progress: Progress = no_progress,
    ) -> Tensor:
        """The flattened results of `per_block(weights, sum of losses)`, averaged over all ranks' targets."""
        total = torch.zeros(length + 1, dtype=torch.float64, device=self.weights_P.device)
        failure = None
        # only the math kernel of attention supports double backward
        with eval_context(self._model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                for number, (inputs, targets) in enumerate(self._batches, 1):
                    weights = [w.requires_grad_() for w in self._split(at_P)]
                    parts = per_block(weights, self._loss_sum(weights, inputs, targets))
                    total[:-1] += torch.cat([part.detach().double().reshape(-1) for part in parts])
                    on_progress(number, len(self._batches))
            except RuntimeError as error:
                if "derivative" not in str(error):
                    raise
                failure, total[-1] = error, 1.0
        total = self._world.all_reduce(total)
        if total[-1]:  # the same on all ranks: ranks without batches raise as well
            raise UsageError(
                f"{type(self._model).__name__} cannot be differentiated twice "
                f"({failure or 'see the error of another rank'}): "
                "replace the operation that has no second derivative, or leave sharpness out"
            ) from failure
        return total[:-1] / self._num_targets

    def _loss_sum(self, weights: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        buffers = {
            name: buffer.clone() for name, buffer in self._model.named_buffers()
        }  # some modules update buffers in eval mode
        outputs = functional_call(self._model, buffers | dict(zip(self._trainable, weights, strict=True)), (inputs,))
        return self._sum(outputs.double(), targets)

    def _split(self, vector_P: Tensor) -> list[Tensor]:
        parts = vector_P.detach().split([p.numel() for p in self._trainable.values()])
        return [v.view(p.shape).to(p.dtype) for v, p in zip(parts, self._trainable.values(), strict=True)]


def _refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Raise if the graph holds the Error node of @once_differentiable, which autograd.grad ignores silently."""
    pending, seen = [gradient.grad_fn for gradient in gradients], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("an autograd.Function is marked @once_differentiable: no second derivative")
        seen.add(node)
        pending += [before for before, _ in node.next_functions]


def hessian_eigenvalues(
    model: nn.Module,
    batches: Batches,
    loss_sum: LossSum,
    *,
    num_targets: NumTargets = one_each,
    world: World | None = None,
    num: int = 3,
    max_steps: int = 80,
    tolerance: float = 1e-5,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> list[float]:
    """The largest eigenvalues of the Hessian of the mean loss, by the Lanczos method. Collective.

    Full reorthogonalisation, applied twice (Golub & Van Loan, 10.3). The Krylov vectors take max_steps * P * 8 bytes on
    every rank (5 GB for 8 million parameters), in CPU memory, because a GPU needs its memory for the passes. A multiple
    eigenvalue may be returned only once.

    Args:
        model: any network; not changed.
        batches: this rank's inputs and targets, [n, ...] each; some ranks, but not all, may have none.
        loss_sum: the sum of the losses of a batch, not their mean.
        num_targets: number of targets of each sample.
        world: the participating ranks; None: those of torch.distributed's process group, or this process only if there
            is none.
        num: number of eigenvalues.
        max_steps: maximum number of Hessian-vector products; each costs about two gradients.
        tolerance: residual |H v - lambda v| at which an eigenvalue is accepted, relative to the largest |lambda|.
        seed: of the start vector.
        on_progress: called after each product, with max_steps as the total; fewer may be enough.

    Returns:
        The algebraically largest eigenvalues, descending, the same on every rank; at most P. With a warning: the
        current estimates, if max_steps was too small; nan, if the loss is not finite.

    Raises:
        UsageError: if there are no samples, trainable parameters or second derivatives, or if max_steps < num.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> batches, loss_sum = [(torch.tensor([[2.0]]), torch.tensor([0]))], nn.CrossEntropyLoss(reduction="sum")
    >>> eigenvalues = hessian_eigenvalues(model, batches, loss_sum)
    >>> [round(value, 6) + 0.0 for value in eigenvalues]  # H = [[1, -1], [-1, 1]]
    [2.0, 0.0]
    """
    if max_steps < num:
        raise UsageError(f"max_steps ({max_steps}) limits the number of eigenvalues: choose {num} (num) or more")
    world = world or initialized_world(device_of(model))
    loss = MeanLoss(model, batches, loss_sum, world, num_targets)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every rank

    def draw() -> Tensor:
        return torch.randn(len(loss.weights_P), dtype=torch.float64, generator=generator)

    num_products = 0

    def product(vector_P: Tensor) -> Tensor:
        nonlocal num_products
        image_P = loss.hessian_vector_product(vector_P.to(loss.weights_P.device)).cpu()
        num_products += 1
        on_progress(num_products, max_steps)
        return image_P

    rounding = min(64 * torch.finfo(loss.weights_P.dtype).eps, tolerance)
    eigenvalues, residual = lanczos(product, draw, world, num, max_steps, tolerance, rounding)
    if not math.isfinite(residual):
        warnings.warn("the loss or its curvature is not finite: its eigenvalues are nan", stacklevel=2)
    elif residual > tolerance:
        warnings.warn(
            f"Hessian eigenvalues have a residual of {residual:.1e} |lambda_max| after {max_steps} Lanczos steps, "
            f"above {tolerance:.1e}: increase max_steps or tolerance",
            stacklevel=2,
        )
    return eigenvalues


def lanczos(
    operator: Callable[[Tensor], Tensor],
    draw_vector: Callable[[], Tensor],
    world: World,
    num: int,
    max_steps: int,
    tolerance: float,
    rounding: float,
) -> tuple[list[float], float]:
    """The `num` largest eigenvalues of a symmetric operator, descending, and their largest residual. Collective.

    A closed Krylov subspace (H maps it into itself) holds one copy of every eigenvalue whose eigenspace the start
    vector overlaps. A new vector, orthogonal to all previous ones, starts the next subspace, until `num` are closed.

    Args:
        operator: the symmetric operator, [P] to [P] float64.
        draw_vector: returns a new random vector [P] float64 at every call, the same on every rank.
        world: the participating ranks; rank 0 decides when to stop.
        num: number of eigenvalues; at most P are returned.
        max_steps: maximum number of calls of `operator`.
        tolerance: residual at which to stop, relative to the largest |eigenvalue|, like the returned residual.
        rounding: relative error of `operator`: a remainder below it closes a subspace.

    >>> H = torch.diag(torch.tensor([1.0, 5.0, 5.0, -9.0])).double()
    >>> draw = lambda: torch.randn(4, generator=generator, dtype=torch.float64)
    >>> generator = torch.Generator().manual_seed(0)
    >>> values, _ = lanczos(lambda v: H @ v, draw, World(), 3, 80, 1e-5, 1e-14)
    >>> [round(value, 9) for value in values]
    [5.0, 5.0, 1.0]
    """
    vector_P = draw_vector()
    num, max_steps = min(num, len(vector_P)), min(max_steps, len(vector_P))
    basis_MP = vector_P.new_empty(max_steps, len(vector_P))
    closed_pairs: list[tuple[float, float]] = []  # eigenvalues of closed subspaces, with their residuals
    num_closed, alphas, betas = 0, [], []  # T of the current subspace: diagonal and off-diagonal
    best: list[tuple[float, float]] = []
    scale = 0.0
    for step in range(max_steps):
        basis_MP[step] = vector_P / vector_P.norm()
        image_P = operator(basis_MP[step])
        alphas.append(float(basis_MP[step] @ image_P))
        vector_P = _orthogonalize(basis_MP[: step + 1], image_P)
        beta = float(vector_P.norm())
        if not math.isfinite(alphas[-1] + beta):  # the same on every rank, like `operator`
            return [math.nan] * num, math.nan
        pairs = _ritz_pairs(alphas, betas, beta)
        best = sorted(closed_pairs + pairs, reverse=True)
        scale = max(abs(best[0][0]), abs(best[-1][0]))
        closed = beta <= rounding * scale
        converged = len(pairs) >= num and all(residual <= tolerance * scale for _, residual in pairs[:num])
        done = num_closed + 1 == num if closed else converged
        # ranks on different hardware may differ in the last bit: rank 0 decides
        closed, done = map(bool, _broadcast_from_rank_0(world, [closed, done], basis_MP.device))
        if done:
            break
        betas.append(beta)
        if closed and step + 1 < max_steps:
            closed_pairs, num_closed, alphas, betas = closed_pairs + pairs, num_closed + 1, [], []
            vector_P = _orthogonalize(basis_MP[: step + 1], draw_vector())
    residual = max(residual for _, residual in best[:num]) / (scale or 1.0)
    *eigenvalues, residual = _broadcast_from_rank_0(
        world, [value for value, _ in best[:num]] + [residual], basis_MP.device
    )
    return eigenvalues, residual


def _orthogonalize(basis_MP: Tensor, vector_P: Tensor) -> Tensor:
    """`vector_P` minus its projection on the span of the rows; twice, because the first pass leaves rounding."""
    for _ in range(2):
        vector_P = vector_P - basis_MP.T @ (basis_MP @ vector_P)
    return vector_P


def _ritz_pairs(alphas: list[float], betas: list[float], beta: float) -> list[tuple[float, float]]:
    """Eigenvalues of the tridiagonal T, descending, each with its residual beta |last component of the eigenvector|.

    >>> _ritz_pairs([2.0, 1.0], [0.0], 0.5)
    [(2.0, 0.0), (1.0, 0.5)]
    """
    diagonal, off_diagonal = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(
        torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    )
    return [*zip(values.flip(0).tolist(), (beta * vectors[-1].abs()).flip(0).tolist(), strict=True)]


def _broadcast_from_rank_0(world: World, values: Sequence[float], device: torch.device) -> list[float]:
    """Rank 0's values, on every rank. Collective."""
    own_values = torch.tensor(values, dtype=torch.float64, device=device)
    return world.all_reduce_to_cpu(own_values if world.rank == 0 else torch.zeros_like(own_values)).tolist()


def hessian_trace(
    model: nn.Module,
    batches: Batches,
    loss_sum: LossSum,
    *,
    num_targets: NumTargets = one_each,
    world: World | None = None,
    num_vectors: int = 16,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> tuple[float, float]:
    """Trace of the Hessian of the mean loss, and its standard error. Collective.

    Hutchinson 1989: the mean of v^T H v over random vectors of +1 and -1; the standard error is the sample standard
    deviation (num_vectors - 1) divided by sqrt(num_vectors). It is 0 for a diagonal Hessian.

    Args:
        model: any network; not changed.
        batches: this rank's inputs and targets, [n, ...] each; some ranks, but not all, may have none.
        loss_sum: the sum of the losses of a batch, not their mean.
        num_targets: number of targets of each sample.
        world: the participating ranks; None: those of torch.distributed's process group, or this process only if there
            is none.
        num_vectors: number of vectors, 2 or more; each costs about two gradients. Those that share a gradient take at
            most `VECTOR_BYTES`.
        seed: of the vectors.
        on_progress: called after each batch.

    Raises:
        UsageError: if there are no samples, trainable parameters or second derivatives, or if num_vectors < 2.

    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ZeroPad1d((0, 1)))  # logits w x and 0
    >>> _ = nn.init.zeros_(model[0].weight)
    >>> batches, loss_sum = [(torch.tensor([[2.0]]), torch.tensor([0]))], nn.CrossEntropyLoss(reduction="sum")
    >>> hessian_trace(model, batches, loss_sum)  # H = x^2 p (1 - p)
    (1.0, 0.0)
    """
    if num_vectors < 2:
        raise UsageError(f"num_vectors ({num_vectors}) gives no standard error: choose 2 or more")
    world = world or initialized_world(device_of(model))
    loss = MeanLoss(model, batches, loss_sum, world, num_targets)
    generator = torch.Generator().manual_seed(seed)
    samples: list[float] = []
    while len(samples) < num_vectors:
        num_now = min(num_vectors - len(samples), max(1, VECTOR_BYTES // (8 * len(loss.weights_P))))
        signs = [2.0 * torch.randint(2, loss.weights_P.shape, generator=generator) - 1 for _ in range(num_now)]
        signs_KP = torch.stack(signs).to(loss.weights_P.device, torch.float64)

        def after_block(done: float, total: float, *, before: int = len(samples), num_now: int = num_now) -> None:
            on_progress(before + num_now * done / total, num_vectors)

        images_KP = loss.hessian_vector_products(signs_KP, after_block)
        samples += [float(signs_P @ image_P) for signs_P, image_P in zip(signs_KP, images_KP, strict=True)]
    values = torch.tensor(_broadcast_from_rank_0(world, samples, loss.weights_P.device), dtype=torch.float64)
    return float(values.mean()), float(values.std() / num_vectors**0.5)


def keskar_sharpness(
    model: nn.Module,
    batches: Batches,
    loss_sum: LossSum,
    *,
    num_targets: NumTargets = one_each,
    world: World | None = None,
    epsilon: float = 1e-3,
    steps: int = 20,
    on_progress: Progress = no_progress,
) -> float:
    """Sharpness by Keskar et al. 2017 (eq. 4, full space): 100 (max f(x + z) - f(x)) / (1 + f(x)). Collective.

    f is the mean loss, which must not be negative, x the trainable parameters, and |z_i| <= epsilon (|x_i| + 1). The
    maximum is approximated by projected ascent along the signs of the gradient: the first step goes to a corner of the
    box, and the step size decreases to zero. The best point counts, so the result is a lower bound and never negative.

    Args:
        model: any network; not changed.
        batches: this rank's inputs and targets, [n, ...] each; some ranks, but not all, may have none.
        loss_sum: the sum of the losses of a batch, not their mean.
        num_targets: number of targets of each sample.
        world: the participating ranks; None: those of torch.distributed's process group, or this process only if there
            is none.
        epsilon: size of the box.
        steps: number of ascent steps, each costs one gradient; fixed, so that all ranks do the same number.
        on_progress: called after each gradient.

    Returns:
        A percentage, the same on every rank; nan if the loss is not finite at x.

    Raises:
        UsageError: if there are no samples or no trainable parameters.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> batches, loss_sum = [(torch.tensor([[1.0]]), torch.tensor([0]))], nn.CrossEntropyLoss(reduction="sum")
    >>> sharpness = keskar_sharpness(model, batches, loss_sum, epsilon=0.5)
    >>> round(sharpness, 5), round(100 * (math.log(1 + math.e) - math.log(2)) / (1 + math.log(2)), 5)
    (36.62496, 36.62496)
    """
    loss = MeanLoss(model, batches, loss_sum, world or initialized_world(device_of(model)), num_targets)
    start_P = loss.weights_P.double()
    bound_P = epsilon * (start_P.abs() + 1)
    start, gradient_P = loss.gradient(start_P)
    on_progress(1, steps + 1)
    best, shift_P = start, torch.zeros_like(start_P)
    for step in range(steps):
        stride = 2 * (1 - step / steps)  # 2: from any point of the box to any corner
        shift_P = (shift_P + stride * bound_P * gradient_P.sign()).clamp(-bound_P, bound_P)
        value, gradient_P = loss.gradient(start_P + shift_P)
        best = max(best, value)
        on_progress(step + 2, steps + 1)
    return 100 * (best - start) / (1 + start)
