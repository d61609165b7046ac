"""Measure the near-rank loss of a network that this package does not know, before and after one step of training.

python examples/probe_any_model.py
"""

import torch
from torch import nn
from torchvision.models import resnet18

from gengap_dist.probes import measure, metrics


def main() -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    inputs, targets = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    before = metrics(measure(model, [inputs], views=("channel",)))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    after = metrics(measure(model, [inputs], views=("channel",)))

    print("effective rank of each layer, 64 inputs of noise, untrained -> after one step")
    for name, value in before.items():
        if name.startswith("effective_rank/") and not name.endswith("/centred"):
            print(f"{name.removeprefix('effective_rank/'):32} {value:8.2f} -> {after[name]:8.2f}")


if __name__ == "__main__":
    main()
