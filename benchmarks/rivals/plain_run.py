"""One run of a study in plain PyTorch, as one writes it for a shell loop: trains, measures, writes one JSON file.

    python plain_run.py --data digits.npz --network lenet5 --global_size 256 --lr 0.02 --num_steps 180 --out run.json

DATA holds uint8 `images` [n, h, w] and `test_images`, and int64 `labels` [n] and `test_labels`. Split, initial weights
and order of the images are drawn as gengap_dist draws them, so that results can be compared run by run.
"""

import argparse
import json
from collections import OrderedDict, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 256  # images in one pass without gradients
SIDE = 32
TAUS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--network", choices=["lenet5", "mlp"], required=True)
parser.add_argument("--widths", type=int, nargs="+", default=[256, 256], help="of mlp")
parser.add_argument("--global_size", type=int, required=True, help="images of a step")
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--warmup_steps", type=int, default=0)
parser.add_argument("--num_steps", type=int, required=True)
parser.add_argument("--num_evals", type=int, default=20)
parser.add_argument("--num_probe_samples", type=int, default=1024)
parser.add_argument("--no_probes", action="store_true", help="leave out near-rank loss")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, required=True)


def load(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images [n, 1, SIDE, SIDE] and labels [n] of train, val and test."""
    with np.load(path) as file:
        images, labels, test_images, test_labels = (torch.from_numpy(array) for array in file.values())
    drawn = torch.from_numpy(np.random.default_rng([0, 0]).permutation(len(images)))
    val, train = drawn[: len(images) // 10].sort().values, drawn[len(images) // 10 :].sort().values
    std, mean = torch.std_mean(images[train].float())
    parts = {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
    pad = [(SIDE - images.shape[-1]) // 2] * 4
    return {
        name: ((F.pad(pixels[:, None].float(), pad) - mean) / std, targets)
        for name, (pixels, targets) in (parts | {"test": (test_images, test_labels)}).items()
    }


def network(name: str, widths: list[int]) -> nn.Sequential:
    """LeNet-5, or a multilayer perceptron with batch norm; the non-linearity of a layer is named LAYER_relu."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if name == "lenet5":
        for number, (inputs, units) in enumerate([(1, 6), (6, 16)], 1):
            layers |= {f"conv{number}": nn.Conv2d(inputs, units, 5), f"conv{number}_relu": nn.ReLU()}
            layers |= {f"pool{number}": nn.MaxPool2d(2)}
    layers |= {"flatten": nn.Flatten()}
    sizes = [16 * 5 * 5, 120, 84] if name == "lenet5" else [SIDE * SIDE, *widths]
    for number, (inputs, units) in enumerate(pairwise(sizes), 1):
        norm = {} if name == "lenet5" else {f"norm{number}": nn.BatchNorm1d(units)}
        layers |= {f"fc{number}": nn.Linear(inputs, units), **norm, f"fc{number}_relu": nn.ReLU()}
    return nn.Sequential(layers | {"head": nn.Linear(sizes[-1], 10)})


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy."""
    model.eval()
    logits = torch.cat([model(block) for block in images.split(BLOCK)])
    model.train()
    accuracy = (logits.argmax(1) == labels).double().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


@torch.no_grad()
def near_rank_loss(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of small singular values of every non-linearity's activations; of convolutions by position and pooled."""
    blocks: defaultdict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        module.register_forward_hook(lambda *call, name=name: blocks[name.removesuffix("_relu")].append(call[2]))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    score(model, images, labels)
    for hook in hooks:
        hook.remove()
    matrices: dict[str, Tensor] = {}
    for layer, acts in ((layer, torch.cat(parts)) for layer, parts in blocks.items()):
        if acts.ndim == 4:
            matrices |= {f"{layer}/channel": acts.movedim(1, 3).flatten(0, 2), f"{layer}/pool": acts.mean((2, 3))}
        else:
            matrices[layer] = acts
    found: dict[str, float] = {}
    for name, matrix_ND in matrices.items():
        for key, each in ((name, matrix_ND), (f"{name}/centred", matrix_ND - matrix_ND.mean(0))):
            s = torch.linalg.svdvals(each) / len(each) ** 0.5
            for label, tau in TAUS.items():
                found[f"{key}/abs_{label}"] = float((s < tau).double().mean())
                found[f"{key}/rel_{label}"] = float((s < tau * s[0]).double().mean())
    return found


class Plan:
    """What happens at which step, and the optimizer; tune_lightning.py shares it."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(int(np.random.default_rng([options.seed, 0]).integers(2**62)))
        self.options, self.data = options, load(options.data)
        self.model = network(options.network, options.widths)
        num_steps, num_evals = options.num_steps, options.num_evals
        self.eval_steps = {-(-number * num_steps // num_evals) for number in range(num_evals + 1)}
        spaced = {round(10 ** (number / 3)) for number in range(31)}  # three per factor of ten
        self.probe_steps = set() if options.no_probes else {0, num_steps, *(s for s in spaced if s < num_steps)}
        images, labels = self.data["train"]
        chosen = np.sort(np.random.default_rng([0, 2]).permutation(len(images))[: options.num_probe_samples])
        self.probe_set = images[chosen], labels[chosen]

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        options = self.options
        return torch.optim.SGD(self.model.parameters(), lr=options.lr, momentum=options.momentum, fused=True)

    def lr(self, step: int) -> float:
        """A constant rate after linear warm-up, in units of --lr."""
        return min(1.0, (step + 1) / max(1, self.options.warmup_steps))

    def write(self, **record: object) -> dict[str, float]:
        """Write the options, the record and the final scores; returns those of the test images."""
        scores = {part: score(self.model, *self.data[part]) for part in ("train", "test")}
        self.options.out.write_text(json.dumps(vars(self.options) | scores | record, default=str))
        return scores["test"]


def main(words: list[str] | None = None) -> None:
    """Train, measure, write."""
    plan = Plan(parser.parse_args(words))
    (images, labels), model = plan.data["train"], plan.model
    size, num_steps = plan.options.global_size, plan.options.num_steps
    steps_per_epoch, order = -(-len(images) // size), np.empty(0)
    optimizer = plan.optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr)
    val, spectra, losses = {}, {}, []
    for step in range(num_steps + 1):
        if step in plan.eval_steps:
            val[step] = score(model, *plan.data["val"])
        if step in plan.probe_steps:
            spectra[step] = near_rank_loss(model, *plan.probe_set)
        if step == num_steps:
            break
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            order = np.random.default_rng([plan.options.seed, 1, epoch]).permutation(len(images))
        chosen = torch.from_numpy(order[position * size : (position + 1) * size])
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    plan.write(val=val, near_rank_loss=spectra, losses=torch.stack(losses).tolist())


if __name__ == "__main__":
    main()
