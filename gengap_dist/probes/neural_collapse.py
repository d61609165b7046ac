"""Neural collapse: the variability within classes relative to that between classes, at the input of the classifier.

Shapes: n samples of one block, D features, K classes of the network, C classes present, R directions between them.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gengap_dist.distributed.process_group import World, initialized_world
from gengap_dist.errors import UsageError
from gengap_dist.probes.activations import device_of, eval_context, unwrapped
from gengap_dist.probes.progress import Progress, no_progress


def nc1(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    world: World | None = None,
    features: "ClassifierInputs | None" = None,
    on_progress: Progress = no_progress,
) -> float:
    """NC1, the collapse of variability: tr(Sigma_W pinv(Sigma_B)) / C (Papyan, Han & Donoho 2020). Collective.

    With h the features that enter the classifier, mu_c their mean over class c, mu_G the mean of the class means:
    Sigma_W = mean over samples of (h - mu_c)(h - mu_c)^T, Sigma_B = mean over classes of (mu_c - mu_G)(mu_c - mu_G)^T;
    C is the number of classes present. 0 is full collapse. Features are centred before squaring, in float64.

    The pseudo-inverse ignores directions in which the class means differ by less than the rounding of the features:
    singular values of the centred means below 4 eps |means|_F.

    Args:
        model: any network whose output is that of an nn.Linear on [n, D] features; not changed.
        batches: this rank's images [n, ...] and labels [n]; some ranks, but not all, may have none. The features of
            all batches are kept in memory.
        world: the participating ranks; None: those of torch.distributed's process group, or this process only if there
            is none.
        features: those of `batches`, collected in passes of another measurement; None: run the network for them.
        on_progress: called after each batch.

    Returns:
        NC1, the same on every rank; nan, with a warning, if features are not finite or all class means are equal.

    Raises:
        UsageError: if the network does not end in such a classifier, or fewer than 2 classes are present.

    >>> images, labels = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([0, 0, 1, 1])
    >>> nc1(nn.Linear(1, 2), [(images, labels)])  # Sigma_W = 1, Sigma_B = 4
    0.125
    """
    model = unwrapped(model)
    world = world or initialized_world(device_of(model))
    device = next(model.parameters(), torch.empty(0)).device
    found = features or _run(model, batches, on_progress)
    rows, num_classes, problem = ([] if found.problem else found.rows), found.num_classes, found.problem
    shared_facts = torch.zeros(5, dtype=torch.float64, device=device)  # not known on a rank without batches
    if batches:
        shared_facts[:2] = shared_facts.new_tensor([1, bool(problem)])
    if rows:
        shared_facts[2:] = shared_facts.new_tensor([rows[0].shape[1], num_classes, torch.finfo(rows[0].dtype).eps])
    num_ranks_with_samples, num_problems, *shared = world.all_reduce_to_cpu(shared_facts).tolist()
    if not num_ranks_with_samples:
        raise UsageError("no rank has any samples: give at least one batch")
    if num_problems:
        problem = problem or "differently, as another rank reports"
        raise UsageError(
            f"NC1 needs a network that ends in an nn.Linear on features [n, D], and {type(model).__name__} "
            f"ends {problem}: leave NC1 out, or wrap the network so that it returns the output of its classifier"
        )
    num_units, num_classes, eps = (
        int(shared[0] / num_ranks_with_samples),
        int(shared[1] / num_ranks_with_samples),
        shared[2] / num_ranks_with_samples,
    )

    one_hot_labels = [one_hot(labels, num_classes).double() for _, labels in batches]  # [n, K]
    sums_KD = torch.zeros(num_classes, num_units + 1, dtype=torch.float64, device=device)  # last column: counts
    for member_NK, h_ND in zip(one_hot_labels, rows, strict=True):
        sums_KD[:, :-1] += member_NK.T @ h_ND.double()
        sums_KD[:, -1] += member_NK.sum(0)
    sums_KD = world.all_reduce(sums_KD)
    if not sums_KD.isfinite().all():
        warnings.warn("the features before the classifier are not finite: NC1 is nan", stacklevel=2)
        return float("nan")
    counts_K = sums_KD[:, -1]
    present = counts_K > 0
    if present.sum() < 2:
        raise UsageError(
            f"NC1 needs samples of 2 or more classes, and all samples are of class {int(counts_K.argmax())}"
        )
    means_KD = sums_KD[:, :-1] / counts_K.clamp(min=1)[:, None]
    whiten_DR = _whiten(means_KD[present], eps)
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for (_, labels), h_ND in zip(batches, rows, strict=True):
        total += ((h_ND - means_KD[labels]) @ whiten_DR).square().sum()
    total = world.all_reduce(total)
    if not whiten_DR.shape[1]:
        warnings.warn("all classes have the same mean before the classifier: NC1 is nan", stacklevel=2)
        return float("nan")
    return float(total / counts_K.sum() / present.sum())


def _whiten(means_CD: Tensor, eps: float) -> Tensor:
    """W [D, R] with W W^T = pinv(Sigma_B), from the singular values of the centred class means, without a D x D matrix.

    >>> _whiten(torch.tensor([[1.0, 0.0], [5.0, 0.0]]).double(), 1e-7).abs()
    tensor([[0.5000],
            [0.0000]], dtype=torch.float64)
    """
    num_classes = len(means_CD)
    _, s, directions_RD = torch.linalg.svd(means_CD - means_CD.mean(0), full_matrices=False)
    keep = s > 4 * eps * means_CD.norm()
    keep[num_classes - 1 :] = False  # centred rows sum to 0, so the last singular value is rounding noise
    return directions_RD[keep].T * (num_classes**0.5 / s[keep])


@final
class ClassifierInputs:
    """Collects what enters the nn.Linear whose output is that of the network, while it is attached."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing yet."""
        model = unwrapped(model)
        self._names = {
            module: name or "itself" for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self._last: list[Any] = []  # of this forward pass: module, input, output
        self.rows: list[Tensor] = []
        """[n, D] per batch."""
        self.num_classes = 0
        self.problem = ""
        """Why the network is unsuitable, as the end of a sentence."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the network's classifiers are observed; `add` is to be called after each forward pass."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._last[:] = [module, [*args, *kwargs.values()][0], output]

        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def add(self, outputs: Any) -> None:
        """The pass of a batch has returned `outputs`."""
        if self.problem:
            return
        if not self._last:
            self.problem = "without running any nn.Linear"
            return
        module, h_nD, output = self._last
        self._last.clear()
        if output is not outputs:
            self.problem = f"in something after its last nn.Linear ({self._names[module]})"
        elif h_nD.ndim != 2:
            self.problem = f"in {self._names[module]}, whose input has shape {[*h_nD.shape]}"
        else:
            self.rows.append(h_nD)
            self.num_classes = outputs.shape[1]


def _run(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], on_progress: Progress) -> ClassifierInputs:
    found = ClassifierInputs(model)
    with found.attached(), eval_context(model):
        for number, (images, _) in enumerate(batches, 1):
            found.add(model(images))
            if found.problem:
                break
            on_progress(number, len(batches))
    return found
